"""`star-dss report` and `star-dss inspect`, and the figures."""

import importlib.util
import json

import pytest
from datasets import load_from_disk
from support.commands import run_command as run
from support.guards import WordGuard
from support.report_data import HOSTILE, messages, response, scored_data

from star_dss_plugin import ConfigError
from star_dss_plugin.report import figures


def test_report_writes_a_page_and_figures_without_loading_a_guard(
    monkeypatch, capsys, scored_folder, tmp_path
):
    pytest.importorskip("matplotlib")
    out, png = tmp_path / "new" / "r.html", tmp_path / "png"
    loads = WordGuard.loads
    assert run(monkeypatch, "report", scored_folder, "-o", out, "--png", png, "--blur", "-q") == 0
    assert WordGuard.loads == loads
    assert "4 responses" in capsys.readouterr().out
    assert '<body class="blurred">' in out.read_text()
    assert {p.name for p in png.iterdir()} == {
        "trajectories.png",
        "histogram.png",
        "by_source.png",
    }
    assert all(p.read_bytes().startswith(b"\x89PNG") for p in png.iterdir())
    assert run(monkeypatch, "report", scored_folder, "-o", out, "--no-text", "-q") == 0
    assert "lazy" not in out.read_text()
    assert [p.name for p in out.parent.iterdir()] == ["r.html"]


def test_report_refuses_data_without_scores(monkeypatch, capsys, tmp_path):
    path = tmp_path / "chat.jsonl"
    path.write_text(json.dumps(messages("hi", "hello")) + "\n")
    assert run(monkeypatch, "report", path, "-o", tmp_path / "r.html", "-q") == 2
    assert "Score it first: star-dss score" in " ".join(capsys.readouterr().err.split())


def test_report_asks_for_the_tokenizer_of_a_file_without_provenance(
    monkeypatch, capsys, scored_folder, model_dir, tmp_path
):
    load_from_disk(str(scored_folder)).to_json(str(tmp_path / "s.jsonl"))
    out = tmp_path / "r.html"
    assert run(monkeypatch, "report", tmp_path / "s.jsonl", "-o", out, "-q") == 2
    assert "--tokenizer" in capsys.readouterr().err
    assert not out.exists()
    argv = ("report", tmp_path / "s.jsonl", "-o", out, "-q", "--tokenizer", model_dir)
    assert run(monkeypatch, *argv) == 0
    assert "Unknown guard." in out.read_text()


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["-o", "{tmp}"], "is a folder"),
        (["--rows", "1"], "Give a folder for them with --png"),
        (["--rows", "1;2", "--png", "{tmp}/p"], "numbers with commas"),
        (["--rows", "9", "--png", "{tmp}/p"], "Row 9 has no response"),
        (["--rows", "9" * 5000, "--png", "{tmp}/p"], "numbers with commas"),
        (["--png", "{tmp}/file"], "is a file"),
        (["--source", "sauce"], "no column 'sauce'"),
        (["--threshold", "nan"], "--threshold is nan"),
    ],
)
def test_report_refuses_wrong_options(monkeypatch, capsys, scored_folder, tmp_path, argv, message):
    if "--png" in argv:
        pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    argv = [a.format(tmp=tmp_path) for a in argv]
    assert run(monkeypatch, "report", scored_folder, "-q", *argv) == 2
    assert message in " ".join(capsys.readouterr().err.split())


def test_inspect_prints_a_row(monkeypatch, capsys, scored_folder):
    assert run(monkeypatch, "inspect", scored_folder, "--row", "0") == 0
    assert "is this bad?" in capsys.readouterr().out
    assert run(monkeypatch, "inspect", scored_folder, "--row", "7") == 2
    assert "no row 7" in capsys.readouterr().err


# Figures


def test_figures_without_matplotlib_name_the_extra(monkeypatch, capsys, scored_folder, tmp_path):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert run(monkeypatch, "report", scored_folder, "--png", tmp_path / "p", "-q") == 2
    assert "star-dss-plugin[report]" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="matplotlib"):
        figures.write_figures(scored_data(response()), tmp_path)


@pytest.mark.filterwarnings("ignore:Glyph")  # the font has no control pictures
def test_figures_with_hostile_source_names_are_written(tmp_path):
    pytest.importorskip("matplotlib")
    responses = [response(i, source=text, turn=i % 2) for i, text in enumerate([*HOSTILE, "$x_$"])]
    assert (
        len(figures.write_figures(scored_data(*responses, guard="$\\frac$"), tmp_path, rows=[0, 1]))
        == 3
    )
