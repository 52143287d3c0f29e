"""Reading scored data for a report: responses, sources, the tokenizer, and data that is refused."""

import numpy as np
import pytest
from datasets import Dataset
from transformers import AutoTokenizer

from star_dss_plugin import ConfigError, DataError, provenance_of
from star_dss_plugin.data.provenance import write_note
from star_dss_plugin.report.page import render_page
from star_dss_plugin.report.reading import read_scored, tokenizer_of


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


def test_rows_without_messages_can_be_shown_alone(scored, tokenizer):
    note = {**provenance_of(scored), "raw_contexts": 1}
    cut = {c: scored[0][c][1:] for c in ("input_ids", "labels", "star_scores")}
    rows = [{**scored[0], **cut, "messages": None}, scored[1]]
    dataset = Dataset.from_list(rows, scored.features)
    write_note(dataset, "scores", note)
    assert read_scored(dataset.select([0]), tokenizer).responses[0].raw_context


def test_another_source_column(scored, tokenizer):
    assert read_scored(scored, tokenizer, source="origin").responses[1].source == "2"
    with pytest.raises(ConfigError, match="no column 'orign'"):
        read_scored(scored, tokenizer, source="orign")


def test_whole_numbers_are_scores(tokenizer):
    rows = Dataset.from_list([{"input_ids": [5, 6], "labels": [5, 6], "star_scores": [0, 1]}])
    assert read_scored(rows, tokenizer).responses[0].scores == (0.0, 1.0)


# The tokenizer


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


def test_a_noted_tokenizer_neither_runs_code_nor_downloads(scored, monkeypatch):
    seen = {}

    def load(name, **options):
        seen.update(options)
        raise OSError("not here")

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", load)
    with pytest.raises(ConfigError, match="--tokenizer"):
        tokenizer_of(scored, None)
    assert seen == {"trust_remote_code": False, "local_files_only": True}


# Data that is refused


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
