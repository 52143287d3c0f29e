"""Scoring rows: the column `star_scores` has each token's own score."""

import copy
import logging

import numpy as np
import pytest
import torch
from datasets import Dataset, List, Value
from support.models import CHATML
from support.scoring import (
    SIMPLE,
    TALK,
    HashGuard,
    chat,
    conversations,
    scored,
    scores_of_prefixes,
    tokenized,
)

from star_dss_plugin import load_guard, provenance_of
from star_dss_plugin.data.templates.tokenized import trained_runs

KINDS = {  # kind -> row, contexts of its responses
    "messages": ({"messages": TALK}, [TALK[:1], TALK[:3]]),
    "conversational": ({"prompt": TALK[:1], "completion": TALK[1:2]}, [TALK[:1]]),
    "the whole talk": ({"prompt": TALK[:3], "completion": TALK[3:]}, [TALK[:3]]),
    "plain": ({"prompt": "how are you?", "completion": " fine, and you?"}, [chat("how are you?")]),
    "text": ({"text": "the quick brown fox is bad"}, [[]]),
}


@pytest.mark.parametrize("chunk_size", [1, 3, 5, 1000])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("raw", [True, False], ids=["raw", "tokenized"])
def test_scores_equal_those_of_each_prefix_alone(tokenizer, kind, raw, chunk_size):
    row, contexts = KINDS[kind]
    if not raw:
        row = row | tokenized(tokenizer, row)
    found = scored(Dataset.from_list([row]), tokenizer, HashGuard(), chunk_size=chunk_size)
    row = found[0]
    assert found.features["star_scores"] == List(Value("float32"))
    assert len(row["star_scores"]) == len(row["input_ids"]) == len(row["labels"])
    assert (
        np.asarray(row["star_scores"], dtype=np.float32).tolist()
        == scores_of_prefixes(row, tokenizer, contexts, chunk_size).tolist()
    )
    assert all(
        score == 1.0
        for score, label in zip(row["star_scores"], row["labels"], strict=True)
        if label == -100
    )


def test_messages_are_recovered_from_rows_of_tokens(tokenizer):
    row = tokenized(tokenizer, SIMPLE)
    found = scored(Dataset.from_list([row]), tokenizer, HashGuard())
    expected = scores_of_prefixes(row, tokenizer, [SIMPLE["messages"][:1]], 5)
    assert found["star_scores"][0] == pytest.approx(expected.tolist(), abs=0)
    assert provenance_of(found)["raw_contexts"] == 0


def test_rows_with_tokens_of_no_template_have_decoded_contexts(tokenizer, caplog):
    row = tokenized(tokenizer, SIMPLE)
    row = {name: column[1:] for name, column in row.items()}
    found = scored(Dataset.from_list([row]), tokenizer, HashGuard())
    ((start, _),) = trained_runs(row["labels"])
    decoded = tokenizer.decode(row["input_ids"][:start])
    expected = scores_of_prefixes(row, tokenizer, [chat(decoded)], 5)
    assert found["star_scores"][0] == pytest.approx(expected.tolist(), abs=0)
    assert "For 1 responses the guard reads the decoded tokens before them" in caplog.text
    assert provenance_of(found)["raw_contexts"] == 1


def test_a_verdict_guards_scores_equal_those_of_each_prefix_alone(tokenizer, model_dir):
    guard = load_guard(
        {
            "model": str(model_dir),
            "safe_labels": [" good"],
            "unsafe_labels": [" bad"],
            "self_check": False,
            "min_label_mass": 0.0,
            "device": "cpu",
        }
    )
    (row,) = scored(Dataset.from_list([SIMPLE]), tokenizer, guard, chunk_size=4)
    ((start, end),) = trained_runs(row["labels"])
    body = row["input_ids"][start : end - 1]
    for n in range(start, end):
        text = tokenizer.decode(body[: (n - start) // 4 * 4 + 4] if n < end - 1 else body)
        (alone,) = guard.score([[TALK[0], {"role": "assistant", "content": text}]])
        assert row["star_scores"][n] == pytest.approx(alone, abs=1e-5)


@pytest.mark.parametrize("segmenter", ["words", "sentences", "whole"])
def test_a_chunk_has_the_score_of_the_prefix_at_its_end(tokenizer, segmenter):
    found = scored(
        Dataset.from_list([SIMPLE]), tokenizer, "test-words", segmenter=segmenter, chunk_size=1
    )[0]
    ((start, end),) = trained_runs(found["labels"])
    text = ""
    for n in range(start, end):
        text += tokenizer.decode([found["input_ids"][n]])
        unsafe = {
            "words": "bad" in text,
            "sentences": " the" in text,
            "whole": True,
        }[segmenter]
        assert found["star_scores"][n] == pytest.approx(0.1 if unsafe else 0.9)


def test_the_end_of_turn_has_the_last_score(tokenizer):
    found = scored(Dataset.from_list([SIMPLE]), tokenizer, "test-words")[0]
    assert found["labels"][-2:] == [tokenizer.eos_token_id, -100]
    assert found["star_scores"][-2:] == [pytest.approx(0.1), 1.0]


def test_an_empty_answer_has_a_score(tokenizer):
    found = scored(Dataset.from_list([{"messages": chat("hi", "")}]), tokenizer, HashGuard())[0]
    ((start, end),) = trained_runs(found["labels"])
    assert found["star_scores"][start:end] == [pytest.approx(HashGuard().value(chat("hi"), ""))]


def test_rows_are_cut_to_max_length_before_scoring(tokenizer):
    guard = HashGuard()
    found = scored(conversations(1), tokenizer, guard, max_length=20)[0]
    assert len(found["input_ids"]) == len(found["star_scores"]) == 20
    ((start, end),) = trained_runs(found["labels"])
    assert guard.asked == [tokenizer.decode(found["input_ids"][start:end])]


def test_raw_rows_use_the_given_chat_template(tokenizer):
    template = CHATML.replace("<|im_start|>", "<|im_start|>the ")
    found = scored(Dataset.from_list([SIMPLE]), tokenizer, HashGuard(), chat_template=template)
    assert tokenizer.decode(found[0]["input_ids"]).startswith("<|im_start|>the user\n")
    assert provenance_of(found)["raw_contexts"] == 0
    bare = copy.deepcopy(tokenizer)
    bare.chat_template = None
    again = scored(Dataset.from_list([SIMPLE]), bare, HashGuard(), chat_template=template)
    assert again["star_scores"][:] == found["star_scores"][:]


def test_labels_of_user_messages_are_removed(tokenizer, caplog):
    ids = tokenized(tokenizer, {"messages": TALK})
    row = {"messages": TALK, "input_ids": ids["input_ids"], "labels": ids["input_ids"]}
    found = scored(Dataset.from_list([row, row | ids]), tokenizer, HashGuard())
    assert list(found["labels"]) == [ids["labels"]] * 2
    assert found["star_scores"][0] == found["star_scores"][1]
    assert "In 1 of 2 conversations what the user says was trained too" in caplog.text


# Data sets of all kinds


def test_other_columns_and_order_are_kept(tokenizer):
    data = conversations(6).add_column("id", list("abcdef"))
    found = scored(data.select([4, 1, 3]), tokenizer, HashGuard())
    assert found["id"][:] == ["e", "b", "d"]
    whole = scored(data, tokenizer, HashGuard())
    assert found["star_scores"][:] == [whole["star_scores"][i] for i in (4, 1, 3)]
    assert set(found.column_names) == {"messages", "id", "input_ids", "labels", "star_scores"}
    assert "star_scores" not in data.column_names


@pytest.mark.parametrize("columns", [None, ["input_ids", "labels"]])
@pytest.mark.parametrize("kind", ["torch", "numpy"])
def test_formatted_data_sets_keep_their_format(tokenizer, kind, columns):
    plain = Dataset.from_list([row | tokenized(tokenizer, row) for row in conversations(3)])
    expected = scored(plain, tokenizer, HashGuard())
    found = scored(plain.with_format(kind, columns=columns), tokenizer, HashGuard())
    assert found.format["type"] == kind
    assert found.with_format(None)["star_scores"][:] == expected["star_scores"][:]
    if columns is None:
        value = found[0]["star_scores"]
        assert isinstance(value, torch.Tensor if kind == "torch" else np.ndarray)


def test_int32_tokens_have_the_same_scores(tokenizer):
    row = SIMPLE | tokenized(tokenizer, SIMPLE)
    data = Dataset.from_list([row])
    for name in ("input_ids", "labels"):
        data = data.cast_column(name, List(Value("int32")))
    found = scored(data, tokenizer, HashGuard())
    assert (
        found["star_scores"][0]
        == scored(Dataset.from_list([row]), tokenizer, HashGuard())["star_scores"][0]
    )


def test_rows_without_a_response_are_kept(tokenizer):
    ids = tokenized(tokenizer, SIMPLE)
    nothing = {"input_ids": [5, 6], "labels": [-100, -100]}
    empty = {"input_ids": [], "labels": []}
    found = scored(Dataset.from_list([nothing, ids, empty]), tokenizer, HashGuard())
    assert found["star_scores"][0] == [1.0, 1.0]
    assert found["star_scores"][2] == []
    assert provenance_of(found)["responses"] == 1


def test_progress_counts_prefixes_and_is_silent_for_cached_scores(tokenizer, capsys):
    found = scored(conversations(3), tokenizer, HashGuard(), progress=True)
    prefixes = provenance_of(found)["prefixes"]
    assert f"{prefixes}/{prefixes}" in capsys.readouterr().err
    scored(conversations(3), tokenizer, HashGuard(), progress=True)
    assert "prefix" not in capsys.readouterr().err


def test_ordinary_data_logs_no_warning(tokenizer, caplog):
    with caplog.at_level(logging.WARNING, logger="star_dss_plugin"):
        scored(conversations(2), tokenizer, HashGuard())
    assert caplog.records == []
