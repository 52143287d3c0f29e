"""The provenance of scores: how they were made, kept with the data set."""

import pytest
from datasets import Dataset, load_from_disk
from support.scoring import HashGuard, chat, conversations, scored, tokenized

from star_dss_plugin import (
    provenance_of,
)
from star_dss_plugin.scoring.guard_statistics import merge_provenance, remarks


def test_equal_scores_have_equal_provenance(tokenizer, tmp_path):
    found = provenance_of(scored(conversations(3), tokenizer, HashGuard(), chunk_size=2))
    assert found == {
        "guard": "test-hash",
        "demonstration_guard": False,
        "guard_identity": {"kind": "hash", "salt": ""},
        "segmenter": "tokens",
        "chunk_size": 2,
        "rows": 3,
        "responses": 6,
        "prefixes": found["prefixes"],
        "trained_tokens": found["trained_tokens"],
        "raw_contexts": 0,
        "no_contexts": 0,
        "mean_prefix_score": found["mean_prefix_score"],
        "label_mass": None,
        "attempts": {},
        "truncated_contexts": 0,
        "untrained_rows": {},
        "guard_errors": 0,
        "tokenizer": tokenizer.name_or_path,
        "versions": found["versions"],
    }
    assert found["trained_tokens"] > found["prefixes"] > 6
    assert sorted(found["versions"]) == ["star-dss-plugin", "torch", "transformers"]
    again = scored(
        conversations(3),
        tokenizer,
        HashGuard(),
        chunk_size=2,
        score_cache_dir=tmp_path / "elsewhere",
    )
    assert provenance_of(again) == found


def test_provenance_is_kept_by_operations_on_the_data_set(tokenizer, tmp_path):
    found = scored(conversations(4), tokenizer, HashGuard())
    expected = provenance_of(found)
    found.save_to_disk(tmp_path / "saved")
    for kept in (
        load_from_disk(tmp_path / "saved"),
        found.map(lambda row: {"more": 1}),
        found.select([2, 0]),
        found.filter(lambda row: True),
        found.shuffle(seed=1),
        found.train_test_split(0.5)["test"],
        found.remove_columns("messages"),
        found.with_format("torch"),
    ):
        assert provenance_of(kept) == expected


def test_the_data_sets_own_description_is_kept(tokenizer):
    data = conversations(1)
    data.info.description = "Made of foxes.\nTwo lines."
    found = scored(data, tokenizer, HashGuard())
    assert found.info.description.startswith("Made of foxes.\nTwo lines.\n")
    assert provenance_of(found)["rows"] == 1
    assert data.info.description == "Made of foxes.\nTwo lines."
    assert provenance_of(data) is None


def test_scoring_again_replaces_the_provenance(tokenizer):
    first = scored(conversations(1), tokenizer, HashGuard())
    again = scored(first.remove_columns("star_scores"), tokenizer, HashGuard("salt"), chunk_size=2)
    assert provenance_of(again)["guard_identity"]["salt"] == "salt"
    assert provenance_of(again)["chunk_size"] == 2
    assert provenance_of(first)["guard_identity"]["salt"] == ""
    assert again["star_scores"][0] != first["star_scores"][0]


TEXTS = [{"text": "user: a bad word? assistant: no"}, {"text": "user: hi assistant: hello"}]


@pytest.mark.parametrize(("conversations_before", "warned"), [(0, True), (9, True), (10, False)])
def test_many_responses_without_a_context_are_warned_about(
    tokenizer, caplog, conversations_before, warned
):
    rows = [
        tokenized(tokenizer, row)
        for row in (*conversations(conversations_before).to_list(), *TEXTS)
    ]
    found = scored(Dataset.from_list(rows), tokenizer, HashGuard())
    note = provenance_of(found)
    assert note["no_contexts"] == 2
    warning = f"2 of {note['responses']} responses have nothing said before them"
    assert (warning in caplog.text) == warned
    assert [line.startswith(warning) for line in remarks(note)] == [True] * warned


@pytest.mark.parametrize("alone", [False, True])
def test_a_conversation_that_the_assistant_begins_lacks_no_context(tokenizer, caplog, alone):
    """With its messages, and of its tokens alone."""
    row = {"messages": chat("", "hello, i am here", "how are you?", "fine")[1:]}
    rows = [tokenized(tokenizer, row) if alone else row]
    note = provenance_of(scored(Dataset.from_list(rows), tokenizer, HashGuard()))
    assert (note["no_contexts"], note["raw_contexts"], note["responses"]) == (0, 0, 2)
    assert "nothing said before them" not in caplog.text


def test_remarks_on_merged_parts_count_all_responses(tokenizer):
    parts = [
        provenance_of(scored(Dataset.from_list(rows), tokenizer, HashGuard()))
        for rows in (TEXTS, TEXTS[:1])
    ]
    assert remarks(merge_provenance(parts))[0].startswith(
        "3 of 3 responses have nothing said before them"
    )
