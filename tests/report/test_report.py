"""The report: what it reads, what it says, and that text stays text."""

import importlib.util
import io
import json
import re
import subprocess
import sys

import numpy as np
import pytest
from datasets import Dataset, load_from_disk
from rich.console import Console
from support.commands import run_command as run
from support.guards import WordGuard
from support.report_data import PROVENANCE, data, response
from transformers import AutoTokenizer

from star_dss_plugin import ConfigError, DataError, provenance_of
from star_dss_plugin.data.provenance import write_note
from star_dss_plugin.report import figures, inspect_row
from star_dss_plugin.report.inspection import Inspection
from star_dss_plugin.report.page import render_page
from star_dss_plugin.report.reading import ScoredData, read_scored, tokenizer_of
from star_dss_plugin.scoring.scorer import score_dataset
from star_dss_plugin.visible import visible

HOSTILE = [
    "</script><script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "<!--<script>",
    "]]> &lt; &amp; \u2028 \u2029",
    "\u202eevil\u202c\u2066x",
    "nul \x00 escape \x1b[31m bell \x07 \x9b31m",
    "half \ud800 a pair",
    "{{ 7 * 7 }} {% raw %}",
]


def messages(*turns):
    roles = ["user", "assistant"] * len(turns)
    return {"messages": [{"role": r, "content": t} for r, t in zip(roles, turns)]}


@pytest.fixture
def scored(tokenizer, model_dir, monkeypatch):
    monkeypatch.setattr(tokenizer, "name_or_path", str(model_dir))
    rows = [
        {**messages("is this bad?", "no! it is a bad word."), "source": "a", "origin": 1},
        {**messages("how are you?", "fine.", "and you?", "bad, bad"), "source": "b", "origin": 2},
        {**messages("héllo", "the lazy dog 🐶 is lazy"), "source": "a", "origin": 3},
    ]
    return score_dataset(
        Dataset.from_list(rows), tokenizer, guard="test-words", chunk_size=2, progress=False
    )


def test_every_token_keeps_its_score_and_the_text_is_whole(scored, tokenizer):
    found = read_scored(scored, tokenizer)
    assert [(r.row, r.turn, r.source) for r in found.responses] == [
        (0, 0, "a"),
        (1, 0, "b"),
        (1, 1, "b"),
        (2, 0, "a"),
    ]
    texts = ["".join(r.pieces) for r in found.responses]
    assert texts == ["no! it is a bad word.", "fine.", "bad, bad", "the lazy dog 🐶 is lazy"]
    for row, of_row in ((i, [r for r in found.responses if r.row == i]) for i in range(3)):
        trained = np.asarray(scored[row]["labels"]) != -100
        expected = np.asarray(scored[row]["star_scores"])[trained]
        shown = np.concatenate([np.repeat(r.scores, r.lengths) for r in of_row])
        np.testing.assert_allclose(shown, expected, atol=1e-6)
    assert [m["content"] for m in found.responses[2].context] == [
        "how are you?",
        "fine.",
        "and you?",
    ]
    assert not any(r.raw_context for r in found.responses)
    assert found.guard == "test-words"


def test_tokens_without_messages_are_shown_as_the_guard_read_them(scored, tokenizer):
    columns = ["input_ids", "labels", "star_scores"]
    found = read_scored(scored.select_columns(columns), tokenizer)
    assert not any(r.raw_context or r.source for r in found.responses)
    assert [m["content"] for m in found.responses[2].context] == [
        "how are you?",
        "fine.",
        "and you?",
    ]
    cut = scored.map(
        lambda row: {c: row[c][1:] for c in columns}, remove_columns=scored.column_names
    )
    for shown in read_scored(cut, tokenizer).responses:
        assert shown.raw_context
    assert "is this bad?" in read_scored(cut, tokenizer).responses[0].context[0]["content"]


def test_another_source_column(scored, tokenizer):
    assert read_scored(scored, tokenizer, source="origin").responses[1].source == "2"
    with pytest.raises(ConfigError, match="no column 'orign'"):
        read_scored(scored, tokenizer, source="orign")


def test_the_tokenizer_is_noted_and_can_be_given(scored, tmp_path):
    assert tokenizer_of(scored, None).get_vocab()
    note = provenance_of(scored)
    write_note(scored, "scores", {**note, "tokenizer": str(tmp_path / "gone")})
    with pytest.raises(ConfigError, match="say where with --tokenizer"):
        tokenizer_of(scored, None)
    assert tokenizer_of(scored, note["tokenizer"])
    write_note(scored, "scores", {k: v for k, v in note.items() if k != "tokenizer"})
    with pytest.raises(ConfigError, match="does not say which tokenizer"):
        tokenizer_of(scored, None)


def test_what_cannot_be_shown_is_said(scored, tokenizer):
    with pytest.raises(DataError, match="no 'star_scores'"):
        read_scored(scored.remove_columns("star_scores"), tokenizer)
    short = scored.map(lambda r: {"star_scores": r["star_scores"][:-1]})
    with pytest.raises(DataError, match="Row 0: the row has"):
        read_scored(short, tokenizer)
    shifted = scored.map(
        lambda r: {
            "input_ids": [i + 7 for i in r["input_ids"]],
            "labels": [i if i == -100 else i + 7 for i in r["labels"]],
        }
    )
    with pytest.raises(DataError, match="not those of the tokenizer"):
        read_scored(
            shifted.map(
                lambda r: {
                    "input_ids": [i % 390 for i in r["input_ids"]],
                    "labels": [i if i == -100 else i % 390 for i in r["labels"]],
                }
            ),
            tokenizer,
        )
    large = scored.map(
        lambda r: {
            "input_ids": [10**6] * len(r["input_ids"]),
            "labels": [i if i == -100 else 10**6 for i in r["labels"]],
        }
    )
    with pytest.raises(DataError, match="not those of the tokenizer"):
        read_scored(large, tokenizer)
    none = scored.map(lambda r: {"labels": [-100] * len(r["labels"])})
    with pytest.raises(DataError, match="None of the 3 rows has a response"):
        read_scored(none, tokenizer)


def page_data(html):
    return json.loads(re.search(r'id="data">(.*?)</script>', html, re.DOTALL).group(1))


@pytest.mark.parametrize("text", HOSTILE)
def test_text_cannot_leave_its_element(text):
    hostile = response(pieces=(text, text), source=text, context=({"role": text, "content": text},))
    html = render_page(data(hostile, guard=text), name=text)
    html.encode("utf-8")
    assert html.count("<script") == 2  # the data and the program
    assert html.count("</script>") == 2
    assert "<img" not in html
    assert "\u202e" not in html
    assert "\x00" not in html
    found = page_data(html)["responses"][0]
    assert found["pieces"] == [visible(text)] * 2


def test_the_policy_allows_this_script_alone():
    html = render_page(data(response()), name="x")
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', html).group(1)
    assert policy.startswith("default-src &#39;none&#39;; script-src &#39;sha256-")
    assert "unsafe" not in policy
    assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)", html)
    assert not re.search(r"<[^>]* (style|on\w+)=", html)


def test_no_text_means_none():
    html = render_page(
        data(response(pieces=("secret one", "secret two"), source="src")), name="x", text=False
    )
    assert "secret" not in html.split('id="data"')[1].split("</script>")[0]
    assert "question 0" not in html
    assert page_data(html)["responses"][0]["scores"] == [0.9, 0.2]
    assert "src" in html


def test_a_source_column_with_texts_is_not_shown(scored, tokenizer, caplog):
    texts = ["a private text\nof two lines"] * len(scored)
    dataset = scored.remove_columns([c for c in ("source",) if c in scored.column_names])
    found = read_scored(dataset.add_column("source", texts), tokenizer)
    assert {r.source for r in found.responses} == {None}
    assert "private" not in render_page(found, name="x", text=False)
    assert "--source" in caplog.text


def test_a_page_does_not_say_where_the_tokenizer_lies():
    page = render_page(ScoredData((response(),), PROVENANCE, "/home/me/model"), name="x")
    assert "/home/me" not in page
    assert "model" in page


@pytest.mark.parametrize(
    "note",
    ["{}", "[]", "{nonsense", '{"guard": 3}', '"text"', "[" * 5000, "9" * 5000],
    ids=["empty", "list", "cut", "kind", "string", "deep", "long"],
)
def test_a_damaged_note_is_said_to_be_one(scored, tokenizer, note):
    dataset = scored.select(range(len(scored)))
    dataset.info.description = f"star_dss scores: {note}"
    with pytest.raises(DataError, match="description"):
        read_scored(dataset, tokenizer)


@pytest.mark.parametrize(
    "change",
    [
        {"chunk_size": 0},
        {"guard_errors": float("inf")},
        {"disagreement": {"mean": 10**400, "opposite": 0}},
    ],
)
def test_so_is_one_of_impossible_numbers(scored, tokenizer, change):
    dataset = scored.select(range(len(scored)))
    write_note(dataset, "scores", {**provenance_of(scored), **change})
    with pytest.raises(DataError, match="description"):
        render_page(read_scored(dataset, tokenizer), name="x")


def test_a_description_that_is_no_text_is_damaged(scored, tokenizer):
    dataset = scored.select(range(len(scored)))
    dataset.info.description = 5
    with pytest.raises(DataError, match="description"):
        read_scored(dataset, tokenizer)


@pytest.mark.parametrize("identity", [{"guards": 3}, {"guards": [5, {"trajectory": {}}]}])
def test_identities_that_somebody_else_wrote_can_be_shown(identity):
    assert "a-guard" in render_page(data(response(), guard_identity=identity), name="x")


@pytest.mark.parametrize(
    ("scores", "message"),
    [
        ("0.5", "Row 0: the row has 2 tokens and no list of star_scores"),
        ([[0.5], [0.5, 0.5]], "Row 0: the row has star_scores that are list"),
        (["0.5", "1"], "Row 0: the row has star_scores that are str"),
        ([True, False], "Row 0: the row has star_scores that are bool"),
        ([0.5, None], "Row 0: the row has a star_score of nan"),
        ([0, 2], "Row 0: the row has a star_score of 2.0"),
        ([0.5, float("-inf")], "Row 0: the row has a star_score of -inf"),
    ],
)
def test_columns_that_are_no_scores(tokenizer, scores, message):
    rows = Dataset.from_list([{"input_ids": [5, 6], "labels": [5, 6], "star_scores": scores}])
    with pytest.raises(DataError, match=message):
        read_scored(rows, tokenizer)


def test_whole_numbers_are_scores(tokenizer):
    rows = Dataset.from_list([{"input_ids": [5, 6], "labels": [5, 6], "star_scores": [0, 1]}])
    assert read_scored(rows, tokenizer).responses[0].scores == (0.0, 1.0)


def test_rows_without_messages_can_be_shown_alone(scored, tokenizer):
    note = {**provenance_of(scored), "raw_contexts": 1}
    cut = {c: scored[0][c][1:] for c in ("input_ids", "labels", "star_scores")}
    rows = [{**scored[0], **cut, "messages": None}, scored[1]]
    dataset = Dataset.from_list(rows, scored.features)
    write_note(dataset, "scores", note)
    assert read_scored(dataset.select([0]), tokenizer).responses[0].raw_context


def test_a_noted_tokenizer_neither_runs_code_nor_downloads(scored, monkeypatch):
    seen = {}

    def load(name, **options):
        seen.update(options)
        raise OSError("not here")

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", load)
    with pytest.raises(ConfigError, match="--tokenizer"):
        tokenizer_of(scored, None)
    assert seen == {"trust_remote_code": False, "local_files_only": True}


def test_a_demonstration_guard_is_named_as_one(tmp_path):
    demo = data(response(), demonstration_guard=True)
    html = render_page(demo, name="x")
    assert "(demonstration guard)</title>" in html
    assert "Demonstration scores." in html
    assert page_data(html)["demonstration"] is True
    assert "Demonstration scores." not in render_page(data(response()), name="x")
    shown = Inspection(demo, 0)
    console = Console(record=True, width=100, file=io.StringIO())
    console.print(shown)
    assert "protects nobody" in console.export_text()
    assert "protects nobody" in shown._repr_html_()


def test_interpolated_scores_are_named_as_such():
    adaptive = data(response(), guard_identity={"trajectory": {"adaptive": {"epsilon": 0.02}}})
    assert "safe stretches are interpolated" in render_page(adaptive, name="x")
    assert "interpolated" not in render_page(data(response()), name="x")


def test_what_was_tried_and_what_did_not_fit_is_said():
    noted = data(
        response(),
        attempts={"control token": {"responses": 3, "rows": [1, 4]}},
        truncated_contexts=2,
        guard_errors=1,
        disagreement={"mean": 0.25, "p95": 0.5, "opposite": 0.1},
    )
    page = render_page(noted, name="x")
    for remark in (
        "3 responses contain text that could be meant for the guard (control token), first in rows "
        "1, 4.",
        "2 conversations did not fit the guard, which read their ends.",
        "1 responses could not be scored and count as unsafe.",
        "0.250 apart on average; 10.0% of the prefixes are safe to one and unsafe to another.",
    ):
        assert remark in page
    assert "could be meant" not in render_page(data(response()), name="x")


@pytest.mark.parametrize(
    "notes",
    [
        {"attempts": {"x": 3}},
        {"attempts": [1]},
        {"attempts": {"x": {"responses": "<b>", "rows": []}}},
        {"truncated_contexts": "<b>"},
        {"guard_errors": [1]},
        {"disagreement": {"mean": "x"}},
    ],
    ids=str,
)
def test_notes_that_somebody_else_wrote(notes):
    with pytest.raises(DataError, match="not what this package writes"):
        render_page(data(response(), **notes), name="x")


def test_inspection_in_a_terminal_and_a_notebook(scored):
    shown = inspect_row(scored, 1)
    console = Console(record=True, width=100, file=io.StringIO())
    console.print(shown)
    text = console.export_text()
    assert "user: how are you?" in text
    assert "response 2: lowest 0.100" in text
    assert "below 0.5 from token" in text
    html = shown._repr_html_()
    assert "how are you?" in html
    assert "text-decoration:underline" in html
    with pytest.raises(DataError, match="no row 3"):
        inspect_row(scored, 3)


def test_an_error_names_the_row_that_was_asked_for(scored):
    short = scored.map(
        lambda r, i: {"star_scores": r["star_scores"][: -(i == 1) or None]}, with_indices=True
    )
    with pytest.raises(DataError, match="Row 1: "):
        inspect_row(short, 1)


@pytest.mark.parametrize("text", HOSTILE)
def test_inspection_of_hostile_text(text):
    shown = Inspection(data(response(pieces=(text, "[red]not markup[/red]"))), 0)
    html = shown._repr_html_()
    assert not re.search(r"<(?!/?(p|b|bdi|br|span|div)[ >])", html)
    console = Console(width=100, force_terminal=True, record=True, file=io.StringIO())
    console.print(shown)
    out = console.export_text(styles=True)
    assert "[red]not markup" in re.sub("\x1b\\[[0-9;]*m", "", out)
    assert not re.search("[\x00\x07\x9b\u202e\ud800]|\x1b(?!\\[[0-9;]*m)", out)


def test_a_guards_name_begins_no_line_of_an_inspection():
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(Inspection(data(response(), guard="a\nanother line"), 0))
    assert console.export_text().startswith("Row 0, guard a␊another line\n")


@pytest.fixture
def folder(scored, tmp_path):
    scored.save_to_disk(str(tmp_path / "scored"))
    return tmp_path / "scored"


def test_the_report_command(monkeypatch, capsys, folder, tmp_path):
    pytest.importorskip("matplotlib")
    out, png = tmp_path / "new" / "r.html", tmp_path / "png"
    asked = WordGuard.loads
    assert run(monkeypatch, "report", folder, "-o", out, "--png", png, "--blur", "-q") == 0
    assert WordGuard.loads == asked
    assert "4 responses" in capsys.readouterr().out
    assert '<body class="blurred">' in out.read_text()
    assert {p.name for p in png.iterdir()} == {
        "trajectories.png",
        "histogram.png",
        "by_source.png",
    }
    assert all(p.read_bytes().startswith(b"\x89PNG") for p in png.iterdir())
    assert run(monkeypatch, "report", folder, "-o", out, "--no-text", "-q") == 0
    assert "lazy" not in out.read_text()
    assert [p.name for p in out.parent.iterdir()] == ["r.html"]


def test_data_that_was_never_scored(monkeypatch, capsys, tmp_path):
    path = tmp_path / "chat.jsonl"
    path.write_text(json.dumps(messages("hi", "hello")) + "\n")
    assert run(monkeypatch, "report", path, "-o", tmp_path / "r.html", "-q") == 2
    assert "Score it first: star-dss score" in " ".join(capsys.readouterr().err.split())


def test_a_file_without_provenance(monkeypatch, capsys, folder, model_dir, tmp_path):
    load_from_disk(str(folder)).to_json(str(tmp_path / "s.jsonl"))
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
def test_the_report_command_fails_in_words(monkeypatch, capsys, folder, tmp_path, argv, message):
    if "--png" in argv:
        pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    argv = [a.format(tmp=tmp_path) for a in argv]
    assert run(monkeypatch, "report", folder, "-q", *argv) == 2
    assert message in " ".join(capsys.readouterr().err.split())


def test_figures_without_matplotlib_name_the_extra(monkeypatch, capsys, folder, tmp_path):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert run(monkeypatch, "report", folder, "--png", tmp_path / "p", "-q") == 2
    assert "star-dss-plugin[report]" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="matplotlib"):
        figures.write_figures(data(response()), tmp_path)


@pytest.mark.filterwarnings("ignore:Glyph")  # the font has no control pictures
def test_figures_of_hostile_names(tmp_path):
    pytest.importorskip("matplotlib")
    rs = [response(i, source=text, turn=i % 2) for i, text in enumerate([*HOSTILE, "$x_$"])]
    assert len(figures.write_figures(data(*rs, guard="$\\frac$"), tmp_path, rows=[0, 1])) == 3


def test_the_inspect_command(monkeypatch, capsys, folder):
    assert run(monkeypatch, "inspect", folder, "--row", "0") == 0
    assert "is this bad?" in capsys.readouterr().out
    assert run(monkeypatch, "inspect", folder, "--row", "7") == 2
    assert "no row 7" in capsys.readouterr().err


def test_the_command_line_starts_without_heavy_imports():
    code = "import sys, star_dss_plugin.cli.app; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
