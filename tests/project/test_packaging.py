"""What is published: the files of the wheel and the sdist, and their metadata."""

import email
import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile

import pytest
from packaging.requirements import Requirement
from support.paths import ROOT

from star_dss_plugin import __version__

for needed in ("hatchling", "hatch_fancy_pypi_readme"):
    pytest.importorskip(needed, reason="building needs the extra 'test'")

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PACKAGES = {
    "star_dss_plugin": ROOT / "star_dss_plugin",
    "star_dss_trl": ROOT / "integrations" / "star_dss_trl",
    "star_dss_axolotl": ROOT / "integrations" / "star_dss_axolotl",
}
INFO = f"star_dss_plugin-{__version__}.dist-info"
JUNK = re.compile(
    r"__pycache__|\.pyc$|\.venv|\.nox|\.git/|\.\w+_cache|\.hypothesis|/runs/|\.ci/|_build|\.log$"
)


def build(source, target, kind):
    """Return the path of the wheel or sdist that is built."""
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", kind, "-d", str(target)],
        cwd=source,
        check=True,
        capture_output=True,
        timeout=300,
    )
    (found,) = target.iterdir()
    return found


@pytest.fixture(scope="module")
def sdist(tmp_path_factory):
    return build(ROOT, tmp_path_factory.mktemp("sdist"), "sdist")


@pytest.fixture(scope="module")
def wheel(sdist, tmp_path_factory):
    """Build the wheel from the sdist, as an installer does."""
    source = tmp_path_factory.mktemp("source")
    with tarfile.open(sdist) as archive:
        archive.extractall(source, filter="data")
    return build(source / f"star_dss_plugin-{__version__}", tmp_path_factory.mktemp("w"), "wheel")


@pytest.fixture(scope="module")
def files(wheel):
    with zipfile.ZipFile(wheel) as archive:
        return {info.filename: archive.read(info) for info in archive.infolist()}


@pytest.fixture(scope="module")
def metadata(files):
    return email.message_from_bytes(files[f"{INFO}/METADATA"])


def test_the_wheel_holds_the_packages_and_nothing_else(files):
    expected = {
        f"{name}/{path.relative_to(folder).as_posix()}"
        for name, folder in PACKAGES.items()
        for path in folder.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert {name for name in files if not name.startswith(INFO)} == expected
    assert {name.removeprefix(INFO) for name in files if name.startswith(INFO)} == {
        "/METADATA",
        "/WHEEL",
        "/RECORD",
        "/entry_points.txt",
        "/licenses/LICENSE",
        "/licenses/NOTICE",
    }


def test_the_wheel_has_the_files_that_are_read_at_run_time(files):
    for name in (
        *(f"{package}/py.typed" for package in PACKAGES),
        "star_dss_plugin/guards/demo/probe.safetensors",
        "star_dss_plugin/data/assets/demo_mix.jsonl",
        "star_dss_plugin/report/assets/report.html.j2",
        "star_dss_plugin/report/assets/report.js",
        "star_dss_plugin/report/assets/report.css",
        "star_dss_trl/demo_assets/aligned_adapter/adapter_config.json",
        "star_dss_plugin/evaluate/assets/answers.html.j2",
        "star_dss_plugin/evaluate/assets/answers.css",
        "star_dss_plugin/evaluate/tasks/choices.yaml",
    ):
        assert name in files
    assert not any(re.search(r"^(tests|docs|benchmarks|trl|axolotl)/", name) for name in files)


def test_no_large_or_temporary_file_is_published(files, sdist):
    with tarfile.open(sdist) as archive:
        inside = archive.getnames()
    assert not [name for name in [*files, *inside] if JUNK.search(name)]
    adapter = files["star_dss_trl/demo_assets/aligned_adapter/adapter_model.safetensors"]
    assert len(adapter) < 3_000_000
    assert sum(map(len, files.values())) - len(adapter) < 2_000_000
    assert sdist.stat().st_size < 5_000_000


def test_the_sdist_has_the_files_for_tests_and_documentation(sdist):
    with tarfile.open(sdist) as archive:
        top = {name.split("/")[1] for name in archive.getnames() if "/" in name}
        inside = {"/".join(name.split("/")[1:]) for name in archive.getnames()}
    assert top >= {
        "tests",
        "docs",
        "examples",
        "LICENSE",
        "NOTICE",
        "CHANGELOG.md",
        "Makefile",
        "CITATION.cff",
        "SECURITY.md",
        "constraints",
        "noxfile.py",
    }
    assert {"tests/conftest.py", "tests/golden/shaped_loss.json", "docs/conf.py"} <= inside


def test_the_metadata_is_that_of_the_project(metadata, files):
    assert metadata["Name"] == "star-dss-plugin"
    assert metadata["Version"] == __version__
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Requires-Python"] == ">=3.11"
    assert set(metadata.get_all("Provides-Extra")) == set(PROJECT["optional-dependencies"])
    assert b"star-dss = star_dss_plugin.cli.app:main" in files[f"{INFO}/entry_points.txt"]


def test_the_description_needs_no_other_file(metadata):
    """PyPI shows the README without the repository."""
    text = metadata.get_payload()
    assert metadata["Description-Content-Type"] == "text/markdown"
    links = re.findall(r"\]\(([^)]*)\)", text)
    assert links
    assert all(link.startswith("https://") for link in links)
    assert "![" not in text
    headings = re.compile("^## .*$", re.MULTILINE)
    assert headings.findall(text) == headings.findall((ROOT / "README.md").read_text())


def test_the_version_is_in_one_place():
    assert PROJECT["dynamic"] == ["version", "readme"]
    assert f"## {__version__} " in (ROOT / "CHANGELOG.md").read_text()
    named = [
        path
        for folder in (*PACKAGES.values(), ROOT / "docs", ROOT / "examples")
        for path in folder.rglob("*.py")
        if f'"{__version__}"' in path.read_text()
    ]
    assert named == [ROOT / "star_dss_plugin" / "_version.py"]


def test_the_lowest_versions_that_are_tested_are_those_declared():
    lines = (ROOT / "constraints" / "lowest.txt").read_text().splitlines()
    tested = dict(line.split("==") for line in lines if "==" in line)
    extras = ("trl", "server", "ray", "report")
    declared = [*PROJECT["dependencies"]]
    declared += [r for extra in extras for r in PROJECT["optional-dependencies"][extra]]
    lowest = {}
    for requirement in map(Requirement, declared):
        (bound,) = (s.version for s in requirement.specifier if s.operator == ">=")
        lowest[requirement.name] = bound
    del lowest["torch"], tested["torch"]  # constraints/lowest.txt explains torch's version
    assert lowest.keys() == tested.keys()
    for name, bound in lowest.items():
        padded = f"{bound}.0.0".split(".")[: tested[name].count(".") + 1]
        assert ".".join(padded) == tested[name], name
