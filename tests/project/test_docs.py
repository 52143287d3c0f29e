"""The documentation names existing options, defaults, metrics, presets, hooks and errors."""

import ast
import re
import types
from dataclasses import fields
from pathlib import Path

import pytest
from datasets import Dataset
from support.paths import ROOT
from typer.main import get_command

from star_dss_plugin import StarDSSOptions, errors, hookspecs, provenance_of, score_dataset
from star_dss_plugin.cli import app as cli
from star_dss_plugin.engines.selection import _SERVER_OPTIONS
from star_dss_plugin.guards.presets import PRESETS
from star_dss_plugin.plugins import HOOK_KINDS, Origin, Plugins, load_plugins

REFERENCE = (ROOT / "docs" / "reference.md").read_text()
GUARDS = (ROOT / "docs" / "guards.md").read_text()
REPORT = (ROOT / "docs" / "report.md").read_text()
SCALE = (ROOT / "docs" / "scale.md").read_text()
PLUGINS = (ROOT / "docs" / "plugins.md").read_text()
API = (ROOT / "docs" / "api.md").read_text()
README = (ROOT / "README.md").read_text()


@pytest.mark.parametrize("option", fields(StarDSSOptions), ids=lambda f: f.name)
def test_every_option_has_a_row_with_its_default_and_help(option):
    row = next(line for line in REFERENCE.splitlines() if line.startswith(f"| `{option.name}` |"))
    default = "none" if option.default is None else str(option.default)
    assert row.split("|")[3].strip().strip("`") == default
    # TRL passes the help to argparse, for which a percent sign begins a format.
    assert option.metadata["help"]
    assert "%" not in option.metadata["help"]


AXOLOTL = ROOT / "integrations" / "star_dss_axolotl" / "README.md"


@pytest.mark.parametrize("option", fields(StarDSSOptions), ids=lambda f: f.name)
def test_every_option_is_in_the_readme_for_axolotl(option):
    rows = [line for line in AXOLOTL.read_text().splitlines() if line.startswith("| `")]
    row = next(line for line in rows if line.startswith(f"| `{option.name}` |"))
    default = "none" if option.default is None else str(option.default)
    assert row.split("|")[2].strip().strip("`") == default


def test_the_readme_for_axolotl_names_every_refused_setting():
    source = (AXOLOTL.parent / "conflicts.py").read_text()
    refused = set(re.findall(r'^    "(\w+)": \(', source, flags=re.MULTILINE))
    assert len(refused) > 10
    documented = (AXOLOTL.read_text() + (ROOT / "docs" / "axolotl.md").read_text()).casefold()
    for name in refused:
        assert name in documented, name
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", AXOLOTL.read_text()):
        assert (AXOLOTL.parent / target).exists(), target


SOURCES = "".join(
    path.read_text()
    for folder in ("star_dss_plugin", "integrations")
    for path in sorted((ROOT / folder).rglob("*.py"))
)


def test_every_metric_is_documented_and_no_other():
    logged = set(re.findall(r'"(star_dss/\w+)"', SOURCES))
    assert {"star_dss/ce", "star_dss/probe_safe_share"} <= logged
    assert logged == set(re.findall(r"`(star_dss/\w+)`", REFERENCE))


def test_every_environment_variable_is_documented():
    read = set(re.findall(r'"(STAR_DSS_[A-Z_]+)"', SOURCES))
    rows = re.findall(r"^\| `(STAR_DSS_[A-Z_]+)` \|", REFERENCE, flags=re.MULTILINE)
    assert read == set(rows)


def test_every_preset_and_hook_is_documented():
    for name in [*PRESETS, "demo"]:
        assert f"`{name}`" in GUARDS
    for hook in {name for name, f in vars(hookspecs).items() if hasattr(f, "star_dss_spec")}:
        assert f"| `{hook}` |" in PLUGINS
        assert f"`{hook}`" in REFERENCE
        assert hook in API
        assert hook in HOOK_KINDS


def test_every_error_has_a_row():
    for name in errors.__all__:
        if issubclass(getattr(errors, name), Exception):
            assert f"| `{name}` |" in REFERENCE
            assert f".. autoexception:: star_dss_plugin.{name}" in API


def commands_below(command, path=()):
    """Yield the words of every command, and the command."""
    children = getattr(command, "commands", {})
    if not children or (command.callback is not None and path):
        yield path, command
    for name, child in children.items():
        yield from commands_below(child, (*path, name))


COMMANDS = dict(commands_below(get_command(cli.app)))


def test_all_kinds_of_commands_are_found():
    assert {("score",), ("guards",), ("guards", "check"), ("demo",)} <= set(COMMANDS)


@pytest.mark.parametrize("path", COMMANDS, ids=" ".join)
def test_every_command_and_its_options_are_documented(path):
    row = rf"^\| `star-dss {' '.join(path)}[ `]"
    assert re.search(row, REFERENCE, flags=re.MULTILINE)
    pages = "".join(page.read_text() for page in (ROOT / "docs").glob("*.md"))
    lines = [line for line in pages.splitlines() if line.startswith("| ")]
    for param in COMMANDS[path].params:
        for name in (*param.opts, *param.secondary_opts):
            if name.startswith("--") and name != "--help":
                assert any(re.search(rf"{name}\b[^-]", line) for line in lines), name


@pytest.mark.parametrize("name", PRESETS)
def test_the_table_of_guards_equals_the_presets(name):
    preset, info = PRESETS[name], load_plugins().guard_info(name)
    row = next(line for line in GUARDS.splitlines() if line.startswith(f"| `{name}` |"))
    cells = [cell.strip() for cell in row.split("|")][2:8]
    assert cells == [
        preset.options["model"],
        info.licence,
        "yes" if info.gated else "no",
        f"{info.billions:g} B",
        "–" if info.f1 is None else str(info.f1),
        info.cost,
    ]


def test_the_guard_in_the_documentation_works(tokenizer):
    snippets = re.findall(r"```python\n(.*?)```", PLUGINS, flags=re.DOTALL)
    (source,) = [text for text in snippets if "star_dss_register_guards" in text]
    module = types.ModuleType("shouting_guard")
    exec(source, module.__dict__)
    plugins = Plugins()
    plugins.register(module, Origin("shouting", "docs", "0"))
    guard = plugins.guard("shouting")(patience=4)
    rows = [
        {
            "messages": [
                {"role": "user", "content": "hello world"},
                {"role": "assistant", "content": "IT IS BAD. fine"},
            ]
        }
    ]
    scored = score_dataset(
        Dataset.from_list(rows),
        tokenizer,
        guard=guard,
        segmenter="words",
        chunk_size=1,
        progress=False,
    )
    trained = [s for s, y in zip(scored[0]["star_scores"], scored[0]["labels"]) if y != -100]
    assert sorted(set(trained), reverse=True) == [0.75, 0.5, 0.25]
    assert trained == sorted(trained, reverse=True)
    assert provenance_of(scored)["demonstration_guard"]


@pytest.mark.parametrize("folder", ["star_dss_plugin", "integrations/star_dss_trl"])
def test_every_public_name_is_documented_and_no_other(folder):
    source = (ROOT / folder / "__init__.py").read_text()
    (names,) = re.findall(r"__all__ = (\[.*?\])", source, flags=re.DOTALL)
    entry = rf"^\.\. (?!automodule)(?:auto|py:)\w+:: {Path(folder).name}\.(\w+)$"
    shown = re.findall(entry, API, flags=re.MULTILINE)
    assert {*shown, "__version__"} == {*ast.literal_eval(names)}


def test_every_option_of_the_report_is_documented():
    for param in get_command(cli.app).commands["report"].params:
        for name in param.opts:
            assert name in ("scored", "--help") or f"`{name}`" in REPORT, name


def test_every_option_of_an_evaluation_has_a_row_with_its_default():
    docs = ROOT / "docs"
    for command in ("evaluate", "landscape", "capability"):
        text = (docs / f"{command}.md").read_text()
        rows = [line for line in text.splitlines() if line.startswith("| `-")]
        for param in get_command(cli.app).commands[command].params:
            for name in (o for o in param.opts if o.startswith("-") and o != "--help"):
                default = "none" if param.default is None else str(param.default)
                default = "required" if param.required else default
                row = next(r for r in rows if f"`{name}`" in r.split("|")[1])
                assert row.split("|")[2].strip().strip("`") == default, name


def test_every_option_of_a_server_has_a_row_with_its_default():
    source = (ROOT / "star_dss_plugin" / "engines" / "server.py").read_text()
    given = re.findall(r"^        (\w+): [\w |]+ = (\S+),$", source, flags=re.MULTILINE)
    assert {name for name, _ in given} | {"model"} == set(_SERVER_OPTIONS)
    for name, default in given:
        row = next(line for line in SCALE.splitlines() if line.startswith(f"| `{name}` |"))
        shown = row.split("|")[2].strip().strip("`").replace("none", "None")
        assert shown in (default.strip('"'), default.removesuffix(".0")), name


def test_the_page_on_scale_names_existing_options_and_targets():
    options = {o for param in get_command(cli.app).commands["score"].params for o in param.opts}
    documented = set(re.findall(r"--[a-z][a-z-]+[a-z]", SCALE))
    others = {
        "--address",
        "--min-nodes",
        "--nodes",
        "--ntasks-per-node",
        "--gpus-per-node",
        "--time",
        "--cpus-per-task",
        "--requeue",
        "--dtype",
        "--api-key",
        "--model",
        "--served-model-name",
        "--rows",
        "--rounds",
    }
    assert documented - options <= others
    for name in (
        "--ray",
        "--address",
        "--num-workers",
        "--gpus-per-worker",
        "--shard-rows",
        "--engine",
        "--engine-options",
    ):
        assert name in options & documented
    makefile = (ROOT / "Makefile").read_text()
    for command in re.findall(r"`make ([\w-]+)`", SCALE):
        assert f"\n{command}:" in makefile


def test_the_pictures_exist_and_are_small():
    pictures = re.findall(r"!\[[^\]]*\]\(([^)]+)\)", REPORT)
    assert pictures
    for picture in pictures:
        assert (ROOT / "docs" / picture).stat().st_size < 200_000


PAGES = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), AXOLOTL]


def anchors(page):
    """Return the anchors of a page's headings, as Sphinx (`make docs`) and git hosts make them."""
    text = page.read_text()
    for included in re.findall(r"^```\{include\} (\S+)", text, flags=re.MULTILINE):
        text += (page.parent / included).read_text()
    headings = re.findall(r"^#+ (.*)$", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", h.lower()).strip().replace(" ", "-") for h in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_have_existing_targets(page):
    for target, anchor in re.findall(r"\]\((?!https?:)([^)#\s]*)#?([^)\s]*)\)", page.read_text()):
        found = (page.parent / target).resolve() if target else page
        assert found.exists(), target
        if anchor:
            assert anchor in anchors(found), f"{target}#{anchor}"


def test_every_page_is_in_the_table_of_contents():
    index = (ROOT / "docs" / "index.md").read_text()
    entries = re.findall(r"^(\w+)$", index, flags=re.MULTILINE)
    assert set(entries) == {page.stem for page in (ROOT / "docs").glob("*.md")} - {"index"}


def test_the_readme_is_two_screens_with_one_picture():
    assert len(README.splitlines()) <= 120
    (picture,) = re.findall(r"!\[[^\]]+\]\(([^)]+)\)", README)
    assert (ROOT / picture).is_file()
