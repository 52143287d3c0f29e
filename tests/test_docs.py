"""The documentation names what exists: options and defaults, metrics, presets, hooks, errors."""

import re
import types
from dataclasses import fields
from pathlib import Path

import pytest
from datasets import Dataset
from typer.main import get_command

import star_dss_plugin
from star_dss_plugin import StarDSSOptions, cli, hookspecs, provenance_of, score_dataset
from star_dss_plugin.engines.selection import _SERVER_OPTIONS
from star_dss_plugin.guards.presets import PRESETS
from star_dss_plugin.plugins import HOOK_KINDS, Origin, Plugins

ROOT = Path(__file__).resolve().parents[1]
REFERENCE = (ROOT / "docs" / "reference.md").read_text()
GUARDS = (ROOT / "docs" / "guards.md").read_text()
REPORT = (ROOT / "docs" / "report.md").read_text()
SCALE = (ROOT / "docs" / "scale.md").read_text()
README = (ROOT / "README.md").read_text()


@pytest.mark.parametrize("option", fields(StarDSSOptions), ids=lambda f: f.name)
def test_every_option_has_a_row_with_its_default(option):
    row = next(line for line in REFERENCE.splitlines() if line.startswith(f"| `{option.name}` |"))
    default = "none" if option.default is None else str(option.default)
    assert row.split("|")[3].strip().strip("`") == default
    assert option.metadata["help"]


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
    assert len(refused) > 15
    told = AXOLOTL.read_text().casefold()
    aliases = {"fsdp_config": "fsdp", "processor_type": "vision data", "fsdp": "fsdp"}
    for name in refused:
        assert aliases.get(name, name) in told, name
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", AXOLOTL.read_text()):
        assert (AXOLOTL.parent / target).exists(), target


def test_every_metric_is_documented():
    source = (ROOT / "star_dss_plugin" / "metrics.py").read_text()
    logged = set(re.findall(r'"(star_dss/\w+)":', source))
    assert logged
    assert logged <= set(re.findall(r"`(star_dss/\w+)`", REFERENCE))


def test_every_preset_and_hook_is_documented():
    for name in [*PRESETS, "demo"]:
        assert f"`{name}`" in GUARDS
    for hook in HOOK_KINDS:
        assert hasattr(hookspecs, hook)
        assert hook in GUARDS


@pytest.mark.parametrize("name", PRESETS)
def test_the_table_of_guards_says_what_the_presets_say(name):
    preset = PRESETS[name]
    row = next(line for line in GUARDS.splitlines() if line.startswith(f"| `{name}` |"))
    cells = [cell.strip() for cell in row.split("|")][2:8]
    assert cells == [
        preset.options["model"], preset.licence, "yes" if preset.gated else "no",
        f"{preset.billions:g} B", "–" if preset.f1 is None else str(preset.f1), preset.cost,
    ]  # fmt: skip


def test_the_guard_in_the_documentation_works(tokenizer):
    snippets = re.findall(r"```python\n(.*?)```", GUARDS, flags=re.DOTALL)
    (source,) = [text for text in snippets if "star_dss_register_guards" in text]
    module = types.ModuleType("shouting_guard")
    exec(source, module.__dict__)
    plugins = Plugins()
    plugins.register(module, Origin("shouting", "docs", "0"))
    guard = plugins.guard("shouting")(patience=4)
    rows = [{"messages": [{"role": "user", "content": "hello world"},
                          {"role": "assistant", "content": "IT IS BAD. fine"}]}]  # fmt: skip
    scored = score_dataset(
        Dataset.from_list(rows), tokenizer, guard=guard, segmenter="words", chunk_size=1,
        progress=False,
    )  # fmt: skip
    trained = [s for s, y in zip(scored[0]["star_scores"], scored[0]["labels"]) if y != -100]
    assert sorted(set(trained), reverse=True) == [0.75, 0.5, 0.25]
    assert trained == sorted(trained, reverse=True)
    assert provenance_of(scored)["demonstration_guard"]


def test_every_public_name_is_documented():
    for name in star_dss_plugin.__all__:
        if not name.startswith("__"):
            assert name in REFERENCE + GUARDS, name


def test_every_option_of_the_report_is_documented():
    for param in get_command(cli.app).commands["report"].params:
        for name in param.opts:
            assert name in ("scored", "--help") or f"`{name}`" in REPORT, name


def test_every_option_of_a_server_has_a_row_with_its_default():
    source = (ROOT / "star_dss_plugin" / "engines" / "server.py").read_text()
    given = re.findall(r"^        (\w+): [\w |]+ = (\S+),$", source, flags=re.MULTILINE)
    assert {name for name, _ in given} | {"model"} == set(_SERVER_OPTIONS)
    for name, default in given:
        row = next(line for line in SCALE.splitlines() if line.startswith(f"| `{name}` |"))
        shown = row.split("|")[2].strip().strip("`").replace("none", "None")
        assert shown in (default.strip('"'), default.removesuffix(".0")), name


def test_the_page_on_scale_names_what_exists():
    options = {o for param in get_command(cli.app).commands["score"].params for o in param.opts}
    told = set(re.findall(r"--[a-z][a-z-]+[a-z]", SCALE))
    others = {
        "--address", "--min-nodes", "--nodes", "--ntasks-per-node", "--gpus-per-node", "--time",
        "--cpus-per-task", "--requeue", "--dtype", "--api-key", "--model",
    }  # fmt: skip
    assert told - options <= others
    for name in ("--ray", "--address", "--num-workers", "--gpus-per-worker", "--shard-rows",
                 "--engine", "--engine-options"):  # fmt: skip
        assert name in options & told
    makefile = (ROOT / "Makefile").read_text()
    for command in re.findall(r"`make ([\w-]+)`", SCALE):
        assert f"\n{command}:" in makefile


def test_the_pictures_exist_and_are_small():
    pictures = re.findall(r"!\[[^\]]*\]\(([^)]+)\)", REPORT)
    assert pictures
    for picture in pictures:
        assert (ROOT / "docs" / picture).stat().st_size < 200_000


def test_the_readmes_links_and_commands_exist():
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert (ROOT / target).exists(), target
    makefile = (ROOT / "Makefile").read_text()
    for command in re.findall(r"^    make (\w+)", README, flags=re.MULTILINE):
        assert f"\n{command}:" in makefile


def test_python_in_the_documentation_compiles():
    for path in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        for snippet in re.findall(r"```python\n(.*?)```", path.read_text(), flags=re.DOTALL):
            compile(snippet, str(path), "exec")
