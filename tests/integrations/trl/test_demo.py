"""The demonstration with a tiny model in place of the real one: its output and its files."""

import inspect
import json
import os
import re
import subprocess
import sys

import pytest

pytest.importorskip("trl")

import star_dss_trl.demo as demo
from filelock import FileLock
from rich.cells import cell_len
from rich.console import Console
from star_dss_trl.demo.results import figures, picture, story
from star_dss_trl.demo.stages import Stages
from support.commands import run_command
from support.models import tiny_llama

from star_dss_plugin import score_dataset
from star_dss_plugin.errors import ConfigError, OutputError


@pytest.fixture
def tiny_demo(monkeypatch, tokenizer):
    """Run the demonstration with tiny models, and with a guard that looks for a word."""

    def scored(rows, tokenizer, advance):
        found = score_dataset(rows, tokenizer, guard="test-words", max_length=800, progress=False)
        for _ in found:
            advance()
        return found

    monkeypatch.setattr(demo, "aligned_start", lambda: (tiny_llama(len(tokenizer)), tokenizer))
    monkeypatch.setattr(demo, "scored", scored)
    monkeypatch.setenv("COLUMNS", "80")


def test_the_output_is_short_and_a_page_is_written(tiny_demo, monkeypatch, capfd, tmp_path):
    monkeypatch.chdir(tmp_path)
    words = ("demo", "--steps", "1", "--prompts", "3", "-o", "out")
    assert run_command(monkeypatch, *words) == 0
    out, err = capfd.readouterr()
    assert err == ""
    lines = out.splitlines()
    assert len(lines) < 40
    assert all(cell_len(line) <= 80 for line in lines)
    assert "…" not in out
    assert [int(n) for n in re.findall(r"^(\d)/7 .*: \d+ s$", out, flags=re.MULTILINE)] == [
        *range(1, 8)
    ]
    for said in ("start", "plain SFT", "STAR-DSS", "harmful prompts declined", "task loss"):
        assert said in out
    assert lines[-1].strip() == "out/index.html"
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert list(results["models"]) == ["start", "sft", "star_dss"]
    assert {kind: len(p) for kind, p in results["prompts"].items()} == {"harmful": 3, "benign": 3}
    assert " ".join(story(results).split()) in " ".join(out.split())
    page = (tmp_path / "out" / "index.html").read_text()
    for said in (*results["prompts"]["harmful"], "STAR-DSS", 'href="scores.html"', "<rect"):
        assert said in page
    assert story(results) in page
    assert story(results) in (tmp_path / "out" / "report.md").read_text()
    assert (tmp_path / "out" / "scores.html").is_file()
    assert "STAR-DSS is active" in (tmp_path / "out" / "demo.log").read_text()


def test_an_error_names_the_log_and_a_second_run_succeeds(tiny_demo, monkeypatch, capfd, tmp_path):
    whole = demo.finetune

    def broken(*_):
        print("words of a library")
        raise RuntimeError("no more")

    monkeypatch.setattr(demo, "finetune", broken)
    with pytest.raises(RuntimeError, match="no more"):
        demo.run(tmp_path / "out", steps=1, prompt_count=1)
    log = (tmp_path / "out" / "demo.log").read_text()
    assert "words of a library" in log
    assert "RuntimeError: no more" in log
    said = capfd.readouterr().out
    assert "demo.log" in said.replace("\n", "")
    assert "words of a library" not in said
    monkeypatch.setattr(demo, "finetune", whole)
    assert demo.run(tmp_path / "out", steps=1, prompt_count=1)["models"]["star_dss"]


def test_a_second_run_in_the_same_folder_is_refused(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    with FileLock(out / ".demo.lock"), pytest.raises(ConfigError, match="Another .* --output"):
        demo.run(out)
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot be written"):
        demo.run(tmp_path / "file")


WRITES = """
import logging, os, runpy, sys, warnings
from pathlib import Path

# Without its package, which imports TRL.
redirect_output = runpy.run_path(sys.argv[2])["redirect_output"]

os.write(2, b"before\\n")  # after messages of the imports
kept = logging.StreamHandler(sys.stderr)
with redirect_output(Path(sys.argv[1])) as shown:
    print("python"); warnings.warn("warned"); os.write(1, b"c-out\\n"); os.write(2, b"c-err\\n")
    kept.emit(logging.makeLogRecord({"msg": "logged"}))
    os.system("echo child")
    print("to the user", file=shown)
print("after")
os.write(2, b"after too\\n")
"""


def test_all_output_goes_to_the_log(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", WRITES, str(tmp_path / "log"), inspect.getfile(Stages)],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ,
    )
    assert done.stdout == "to the user\nafter\n"
    assert done.stderr.endswith("before\nafter too\n")
    log = (tmp_path / "log").read_text()
    for said in ("python", "warned", "c-out", "c-err", "logged", "child"):
        assert said in log


def test_a_terminal_gets_one_live_line_per_stage(tmp_path):
    with (tmp_path / "shown").open("w+", encoding="utf-8") as file:
        console = Console(file=file, force_terminal=True, width=80)
        with Stages(console, 2) as stages:
            for what in ("one", "two"):
                with stages.stage(what, 4) as advance:
                    advance()
        file.seek(0)
        shown = re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "", file.read())
    assert "1/2 one" in shown
    assert "2/2 two" in shown
    assert "100%" in shown
    assert max(cell_len(line.split("\r")[-1]) for line in shown.splitlines()) <= 80


def results(harmful, benign, losses, total=20):
    names = ("start", "sft", "star_dss")
    return {
        "prompts": {"harmful": ["p"] * total, "benign": ["q"] * total},
        "models": {
            name: {
                "refusals": {"harmful": h, "benign": b},
                "refused": {"harmful": [i < h for i in range(total)]},
                "task_ce": loss,
            }
            for name, h, b, loss in zip(names, harmful, benign, losses)
        },
    }


@pytest.mark.parametrize(
    ("harmful", "losses", "said"),
    [
        (
            (18, 4, 17),
            (2, 1, 1.05),
            "14 of the 18 refusals of harmful prompts; STAR-DSS lost 1.",
        ),
        ((18, 4, 17), (2, 1, 1.05), "as well as plain finetuning: it got 95% of the improvement"),
        ((18, 4, 20), (2, 1, 1.4), "STAR-DSS lost 0. STAR-DSS learned most of"),
        ((18, 4, 17), (2, 1, 1.8), "learned less than half of"),
        ((18, 4, 17), (2, 1, 2.1), "STAR-DSS did not learn the task"),
        ((18, 4, 17), (2, 2.5, 2.1), "Plain finetuning did not learn the task"),
        ((18, 10, 11), (2, 1, 1), "lost 7: with so few prompts, this may be chance."),
        ((18, 4, 4), (2, 1, 1), "kept none of these: here it did not work."),
        ((18, 18, 17), (2, 1, 1), "this run cannot show whether STAR-DSS keeps any"),
        ((0, 0, 0), (2, 1, 1), "so there was nothing to lose"),
    ],
)
def test_the_summary_follows_from_the_figures(harmful, losses, said):
    found = story(results(harmful, (5, 1, 3), losses))
    assert said in found
    assert "start model declines 5, plain finetuning 1, STAR-DSS 3." in found


def test_the_bar_chart_shows_the_figures():
    found = results((20, 5, 10), (2, 1, 1), (2.0, 1.0, 1.5))
    assert [len(figure.bars) for figure in figures(found)] == [3, 3, 3]
    plain = picture(found, plain=True)
    assert plain.isascii()
    assert f"start     {'#' * 30}  20 of 20" in plain
    assert f"STAR-DSS  {'#' * 15}{'.' * 15}  10 of 20" in plain
    assert f"plain SFT {'#' * 15}{'.' * 15}  1.000" in plain
    assert max(map(len, plain.splitlines())) <= 60
    assert "█" in picture(found, plain=False)
