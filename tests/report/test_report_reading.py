"""Reading scored data for a report: responses, sources, the tokenizer, and data that is refused."""

import numpy as np
import pytest
from datasets import Dataset
from transformers import AutoTokenizer

from star_dss_plugin import ConfigError, DataError, provenance_of
from star_dss_plugin.data.provenance import write_note
from star_dss_plugin.report.page import render_page
from star_dss_plugin.report.reading import read_scored, tokenizer_of


def test_responses_have_the_whole_text_and_the_score_of_every_token(scored_dataset, tokenizer):
    found = read_scored(scored_dataset, tokenizer)
    assert [(r.row, r.turn, r.source) for r in found.responses] == [
        (0, 0, "a"),
        (1, 0, "b"),
        (1, 1, "b"),
        (2, 0, "a"),
    ]
    texts = ["".join(r.pieces) for r in found.responses]
    assert texts == ["no! it is a bad word.", "fine.", "bad, bad", "the lazy dog 🐶 is lazy"]
    for row, of_row in ((i, [r for r in found.responses if r.row == i]) for i in range(3)):
        trained = np.asarray(scored_dataset[row]["labels"]) != -100
        expected = np.asarray(scored_dataset[row]["star_scores"])[trained]
        shown = np.concatenate([np.repeat(r.scores, r.lengths) for r in of_row])
        np.testing.assert_allclose(shown, expected, atol=1e-6)
    assert [m["content"] for m in found.responses[2].context] == [
        "how are you?",
        "fine.",
        "and you?",
    ]
    assert not any(r.raw_context for r in found.responses)
    assert found.guard == "test-words"


def test_rows_without_messages_show_the_context_that_the_guard_read(scored_dataset, tokenizer):
    columns = ["input_ids", "labels", "star_scores"]
    found = read_scored(scored_dataset.select_columns(columns), tokenizer)
    assert not any(r.raw_context or r.source for r in found.responses)
    assert [m["content"] for m in found.responses[2].context] == [
        "how are you?",
        "fine.",
        "and you?",
    ]
    cut = scored_dataset.map(
        lambda row: {c: row[c][1:] for c in columns}, remove_columns=scored_dataset.column_names
    )
    for shown in read_scored(cut, tokenizer).responses:
        assert shown.raw_context
    assert "is this bad?" in read_scored(cut, tokenizer).responses[0].context[0]["content"]


def test_a_row_without_messages_has_a_raw_context_when_read_alone(scored_dataset, tokenizer):
    note = {**provenance_of(scored_dataset), "raw_contexts": 1}
    cut = {c: scored_dataset[0][c][1:] for c in ("input_ids", "labels", "star_scores")}
    rows = [{**scored_dataset[0], **cut, "messages": None}, scored_dataset[1]]
    dataset = Dataset.from_list(rows, scored_dataset.features)
    write_note(dataset, "scores", note)
    assert read_scored(dataset.select([0]), tokenizer).responses[0].raw_context


def test_another_column_can_name_the_sources(scored_dataset, tokenizer):
    assert read_scored(scored_dataset, tokenizer, source="origin").responses[1].source == "2"
    with pytest.raises(ConfigError, match="no column 'orign'"):
        read_scored(scored_dataset, tokenizer, source="orign")


def test_integers_are_scores(tokenizer):
    rows = Dataset.from_list([{"input_ids": [5, 6], "labels": [5, 6], "star_scores": [0, 1]}])
    assert read_scored(rows, tokenizer).responses[0].scores == (0.0, 1.0)


# The tokenizer


def test_the_tokenizer_is_that_of_the_provenance_or_the_given_one(scored_dataset, tmp_path):
    assert tokenizer_of(scored_dataset, None).get_vocab()
    note = provenance_of(scored_dataset)
    write_note(scored_dataset, "scores", {**note, "tokenizer": str(tmp_path / "gone")})
    with pytest.raises(ConfigError, match="say where with --tokenizer"):
        tokenizer_of(scored_dataset, None)
    assert tokenizer_of(scored_dataset, note["tokenizer"])
    write_note(scored_dataset, "scores", {k: v for k, v in note.items() if k != "tokenizer"})
    with pytest.raises(ConfigError, match="does not say which tokenizer"):
        tokenizer_of(scored_dataset, None)


def test_the_tokenizer_of_the_provenance_runs_no_code_and_is_not_downloaded(
    scored_dataset, monkeypatch
):
    seen = {}

    def load(name, **options):
        seen.update(options)
        raise OSError("not here")

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", load)
    with pytest.raises(ConfigError, match="--tokenizer"):
        tokenizer_of(scored_dataset, None)
    assert seen == {"trust_remote_code": False, "local_files_only": True}


# Data that is refused


def test_rows_that_cannot_be_shown_are_refused(scored_dataset, tokenizer):
    with pytest.raises(DataError, match="no 'star_scores'"):
        read_scored(scored_dataset.remove_columns("star_scores"), tokenizer)
    short = scored_dataset.map(lambda r: {"star_scores": r["star_scores"][:-1]})
    with pytest.raises(DataError, match="Row 0: the row has"):
        read_scored(short, tokenizer)
    shifted = scored_dataset.map(
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
    large = scored_dataset.map(
        lambda r: {
            "input_ids": [10**6] * len(r["input_ids"]),
            "labels": [i if i == -100 else 10**6 for i in r["labels"]],
        }
    )
    with pytest.raises(DataError, match="not those of the tokenizer"):
        read_scored(large, tokenizer)
    none = scored_dataset.map(lambda r: {"labels": [-100] * len(r["labels"])})
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
def test_columns_without_valid_scores_are_refused(tokenizer, scores, message):
    rows = Dataset.from_list([{"input_ids": [5, 6], "labels": [5, 6], "star_scores": scores}])
    with pytest.raises(DataError, match=message):
        read_scored(rows, tokenizer)


@pytest.mark.parametrize(
    "note",
    ["{}", "[]", "{nonsense", '{"guard": 3}', '"text"', "[" * 5000, "9" * 5000],
    ids=["empty", "list", "cut", "kind", "string", "deep", "long"],
)
def test_damaged_provenance_is_refused(scored_dataset, tokenizer, note):
    dataset = scored_dataset.select(range(len(scored_dataset)))
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
def test_provenance_with_impossible_numbers_is_refused(scored_dataset, tokenizer, change):
    dataset = scored_dataset.select(range(len(scored_dataset)))
    write_note(dataset, "scores", {**provenance_of(scored_dataset), **change})
    with pytest.raises(DataError, match="description"):
        render_page(read_scored(dataset, tokenizer), name="x")


def test_a_description_that_is_no_text_is_refused(scored_dataset, tokenizer):
    dataset = scored_dataset.select(range(len(scored_dataset)))
    dataset.info.description = 5
    with pytest.raises(DataError, match="description"):
        read_scored(dataset, tokenizer)
