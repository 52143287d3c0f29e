"""Responses of all rows in one pass: processes, masks, roles, and rows without a response."""

import logging

import pytest
from datasets import Dataset

from star_dss_plugin import DataError
from star_dss_plugin.data.responses import find_responses
from star_dss_plugin.data.row_responses import RowOptions, read_responses
from star_dss_plugin.data.templates.chat import ChatTokenizer
from star_dss_plugin.data.tokenization import tokenize_row
from star_dss_plugin.segmenters import tokens

OPTIONS = RowOptions(tokens, 3)


def talk(question, answer):
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def rows(count):
    return [{"messages": talk(f"how are you? {i}", f"i am fine, {i} words")} for i in range(count)]


@pytest.mark.parametrize("hosted", [False, True])
def test_several_processes_find_the_same_responses(tokenizer, hosted):
    chat = ChatTokenizer(tokenizer)
    given = rows(150)
    if hosted:
        given = [row | tokenize_row(row, chat) for row in given]
    data = Dataset.from_list(given)
    alone, found, _ = read_responses(data, chat, OPTIONS)
    several, again, _ = read_responses(data, chat, OPTIONS, num_proc=3)
    assert found == again
    assert alone[:] == several[:]


def test_an_error_in_another_process_names_its_row(tokenizer):
    given = rows(150)
    given[130]["messages"][0]["role"] = "human"
    with pytest.raises(DataError, match="Row 130"):
        read_responses(Dataset.from_list(given), ChatTokenizer(tokenizer), OPTIONS, num_proc=2)


def test_one_pass_equals_tokenizing_and_then_finding(tokenizer):
    """Compared with two steps: tokenize each row, then find its responses in its tokens."""
    chat = ChatTokenizer(tokenizer)
    given = [
        *rows(5),
        {"messages": [*talk("hi", ""), *talk("ok", "  spaces \n")]},
        {"messages": talk("is it <|im_end|>?", "no<|im_end|>\n<|im_start|>user\nbad")},
    ]
    for length in (None, 20, 31):
        options = RowOptions(tokens, 3, length)
        _, found, untrained = read_responses(Dataset.from_list(given), chat, options, needed=False)
        assert sum(untrained.values()) == sum(not responses for responses in found)
        assert all("max_length cuts off" in why for why in untrained)
        for row, responses in zip(given, found, strict=True):
            made = tokenize_row(row, chat, max_length=length)
            assert find_responses({**row, **made}, chat, tokens, 3) == responses


@pytest.mark.parametrize("labels", [True, False])
def test_a_completion_mask_selects_the_trained_tokens(tokenizer, labels):
    """With and without labels, which a trainer adds even if it ignores the mask."""
    ids = tokenizer("how are you? i am fine")["input_ids"]
    row = {"input_ids": ids, "completion_mask": [0] * 3 + [1] * (len(ids) - 3)}
    if labels:
        row["labels"] = ids
    data, _, _ = read_responses(Dataset.from_list([row]), ChatTokenizer(tokenizer), OPTIONS)
    assert data[0]["labels"] == [-100] * 3 + ids[3:]


def test_a_mask_of_another_length_is_refused(tokenizer):
    data = Dataset.from_list([{"input_ids": [5, 6, 7], "completion_mask": [0, 1]}])
    with pytest.raises(DataError, match="not as long as input_ids"):
        read_responses(data, ChatTokenizer(tokenizer), OPTIONS)


def test_rows_without_trained_tokens_are_counted_by_reason(tokenizer, caplog):
    given = [
        {"messages": talk("how are you? " * 30, "fine")},
        {"messages": talk("hi", "ok")},
        {"messages": talk("hi", "ok")[:1]},
    ]
    with caplog.at_level(logging.WARNING):
        options = RowOptions(tokens, 3, 40)
        read_responses(Dataset.from_list(given), ChatTokenizer(tokenizer), options)
    assert "1 of 3 rows train nothing, because max_length cuts off all that is trained" in (
        caplog.text
    )
    assert "no assistant says anything in them (rows 2)" in caplog.text


def test_texts_that_are_rendered_chats_are_warned_about(tokenizer, caplog):
    text = tokenizer.apply_chat_template(talk("hi", "ok"), tokenize=False)
    with caplog.at_level(logging.WARNING):
        read_responses(Dataset.from_list([{"text": text}]), ChatTokenizer(tokenizer), OPTIONS)
    assert "1 texts are chats that are rendered already (rows 0)" in caplog.text
    assert "not with the tokenizer's chat template" not in caplog.text  # it is with this one


@pytest.mark.parametrize("role", ["human", "gpt", "Assistant", "user<|im_end|>"])
def test_unknown_roles_are_refused_and_named(tokenizer, role):
    row = {"messages": [{"role": role, "content": "hi"}, *talk("hi", "ok")]}
    with pytest.raises(DataError, match=r"messages\[0\].role is .*the roles here are"):
        read_responses(Dataset.from_list([row]), ChatTokenizer(tokenizer), OPTIONS)


def test_from_and_value_are_read_as_role_and_content(tokenizer):
    chat = ChatTokenizer(tokenizer)
    given = [{"from": m["role"], "value": m["content"]} for m in talk("hi", "ok")]
    data, found, _ = read_responses(Dataset.from_list([{"conversations": given}]), chat, OPTIONS)
    plain, same, _ = read_responses(
        Dataset.from_list([{"messages": talk("hi", "ok")}]), chat, OPTIONS
    )
    assert found == same
    assert data[0]["labels"] == plain[0]["labels"]
