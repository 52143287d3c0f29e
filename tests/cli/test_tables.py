"""Tables of the commands fit 80 columns with no text cut; `--json` prints them as JSON."""

import json
import re
import shutil
from pathlib import Path

import pytest
from rich.cells import cell_len
from rich.console import Console
from support.commands import run_command
from support.paths import ROOT
from typer.main import get_command

from star_dss_plugin.cli import app as cli
from star_dss_plugin.tables import Sheet


def printed(sheet, width, *, lined=False):
    """Return the lines of a printed sheet."""
    console = Console(width=width, force_terminal=lined, color_system=None, highlight=False)
    with console.capture() as capture:
        console.print(sheet)
    return [line.rstrip() for line in capture.get().splitlines()]


def test_words_are_not_broken_and_numbers_are_right_aligned():
    rows = [("qwen3guard-gen-0.6b", "9.5"), ("a name of words", "110.25"), ("-", "-")]
    assert printed(Sheet(("guard", "size"), rows, title="What there is"), 28) == [
        "What there is",
        "guard                  size",
        "---------------------------",
        "qwen3guard-gen-0.6b     9.5",
        "a name of words      110.25",
        "-                         -",
    ]
    narrow = printed(Sheet(("names",), [("one-word another-word third",)]), 14)
    assert narrow[2:] == ["one-word", "another-word", "third"]
    assert printed(Sheet(("a", "b"), [("1.2.3", "x")]), 80)[2] == "1.2.3  x"


def test_columns_that_do_not_fit_follow_in_another_table():
    headings = ("task", "metric", *(f"model-{i}" for i in range(9)))
    sheet = Sheet(headings, [("sums", "acc", *["0.312 ± 0.013"] * 9)], keys=2)
    lines = printed(sheet, 80)
    assert max(map(cell_len, lines)) <= 80
    assert sum(line.split()[:2] == ["task", "metric"] for line in lines) == 3
    assert sum(line.count("0.312 ± 0.013") for line in lines) == 9
    assert all(any(f"model-{i}" in line for line in lines) for i in range(9))


@pytest.mark.parametrize("width", [20, 40, 80])
def test_no_text_is_cut_at_any_width(width):
    name, word = "n" * 50, "w" * 33
    lines = printed(Sheet(("model", "is", "value"), [(name, word, "12")] * 2), width)
    assert max(map(cell_len, lines)) <= width
    assert "…" not in "".join(lines)
    text = "".join(lines)
    tables = sum(line.startswith("--") for line in lines)  # each table repeats the names
    assert (text.count("n"), text.count("w")) == (tables * 2 * 50, 2 * 33)


def test_markup_and_escapes_in_cells_are_shown_as_text():
    shown = "\n".join(printed(Sheet(("a[b]",), [("[red]x[/red]",), ("\x1b[31m",)]), 80, lined=True))
    assert "[red]x[/red]" in shown
    assert "\x1b" not in shown
    assert "─" in shown


def test_only_one_module_imports_rich_tables():
    for folder in ("star_dss_plugin", "integrations"):
        for path in (ROOT / folder).rglob("*.py"):
            if path.name != "tables.py":
                assert "rich.table" not in path.read_text(), path


CHAT = [
    {"prompt": "how are you?", "response": "i am fine, thank you.", "label": 1},
    {"prompt": "is this bad?", "response": "no! a bad word.", "label": 0},
] * 12
LONG = "a-model-whose-name-is-rather-long"


@pytest.fixture
def workdir(tmp_path, monkeypatch, model_dir):
    """Change to a folder with two models and the input of the commands; set 80 columns."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    for name in ("start", LONG):
        shutil.copytree(model_dir, name)
    rows = "".join(json.dumps(row) + "\n" for row in CHAT)
    for name in ("chat", "harmful", "benign"):
        Path(f"{name}.jsonl").write_text(rows)
    task = {"prompt": "1 + 1 =", "choices": ["two", "three"], "answer": 0}
    Path("sums.jsonl").write_text((json.dumps(task) + "\n") * 2)
    Path("run.yaml").write_text(
        "model_name_or_path: start\ndataset_name: pairs.jsonl\noutput_dir: out\nguard: test-words\n"
        "max_steps: 1\nlogging_steps: 1\nuse_cpu: true\nbf16: false\nreport_to: none\n"
    )
    pairs = ({"prompt": row["prompt"], "completion": " " + row["response"]} for row in CHAT)
    Path("pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs))
    return tmp_path


FEW = "--max-new-tokens 2 --limit 2 -q"
TABLES = {
    "plugins": (None, "plugins"),
    "guards": (None, "guards"),
    "guards calibrate": ("matplotlib", "guards calibrate test-words chat.jsonl -o calibration"),
    "evaluate": (
        None,
        f"evaluate start {LONG} --prompts harmful.jsonl --benign benign.jsonl "
        f"--guard test-words {FEW}",
    ),
    "landscape": (
        None,
        f"landscape start --prompts harmful.jsonl --directions 9 --steps 2 --no-figure {FEW}",
    ),
    "capability": ("lm_eval", f"capability start {LONG} --tasks-data sums=sums.jsonl --limit 2"),
    "sft": ("trl", "sft --config run.yaml"),
}
"""A package that is needed, and a command line that prints a table, by command."""


@pytest.mark.parametrize("name", TABLES)
def test_tables_fit_80_columns(name, workdir, monkeypatch, capsys):
    needs, line = TABLES[name]
    if needs:
        pytest.importorskip(needs)
    assert run_command(monkeypatch, *line.split()) == 0
    out = capsys.readouterr().out
    assert re.search("^ ?-{5,}", out, flags=re.MULTILINE), "there is no table"
    lines = out.splitlines()
    if name == "sft":  # only the lines of this package
        start = next(i for i, text in enumerate(lines) if text.startswith("STAR-DSS: "))
        lines = [text for text in lines[start:] if not text.startswith(("Model saved", "{"))]
    for text in lines:
        assert cell_len(text) <= 80, text
        assert "…" not in text


@pytest.mark.parametrize("name", sorted(TABLES.keys() - {"sft"}))
def test_tables_can_be_printed_as_json(name, workdir, monkeypatch, capsys):
    needs, line = TABLES[name]
    if needs:
        pytest.importorskip(needs)
    assert run_command(monkeypatch, *line.split(), "--json") == 0
    assert json.loads(capsys.readouterr().out)


def test_every_command_with_json_output_is_tested():
    commands = get_command(cli.app).commands
    commands = {**commands, **{f"guards {n}": c for n, c in commands["guards"].commands.items()}}
    with_json = {n for n, c in commands.items() if any("--json" in p.opts for p in c.params)}
    assert with_json == TABLES.keys() - {"sft"}
