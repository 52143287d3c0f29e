"""Which tokens are a response: rows of tokens alone, other messages, rows that are refused."""

import pytest
from support.contexts import contexts, labelled
from support.conversations import chat
from support.models import tokenized

from star_dss_plugin import DataError
from star_dss_plugin.data.responses import find_responses
from star_dss_plugin.data.templates.chat import ChatTokenizer
from star_dss_plugin.data.templates.tokenized import trained_runs
from star_dss_plugin.segmenters import tokens

UPPER_CASE = "{%- for m in messages %}{{- m.role + ': ' + m.content|upper + '\n' }}{%- endfor %}"


def test_messages_are_recovered_from_tokens_alone(tokenizer):
    talk = chat("s:be good", "u:hi", "a:ok", "u:more", "a:no")
    row = labelled(talk, tokenizer)
    known = find_responses(row, ChatTokenizer(tokenizer), tokens, 5)
    del row["messages"]
    assert find_responses(row, ChatTokenizer(tokenizer), tokens, 5) == known
    others = ChatTokenizer(tokenizer, UPPER_CASE, others=(ChatTokenizer(tokenizer),))
    assert find_responses(row, others, tokens, 5) == known


def test_fully_trained_tokens_are_read_as_a_text(tokenizer):
    row = labelled(chat("u:hi", "a:ok"), tokenizer)
    ids = row["input_ids"]
    (response,) = find_responses(
        {"input_ids": ids, "labels": ids}, ChatTokenizer(tokenizer), tokens, 5
    )
    assert response.raw_context
    assert "hi" in response.request.text


def test_tokens_of_an_unknown_template_have_decoded_contexts(tokenizer):
    row = labelled(chat("u:hi", "a:ok", "u:more", "a:no"), tokenizer)
    del row["messages"]
    first, second = find_responses(row, ChatTokenizer(tokenizer, UPPER_CASE), tokens, 5)
    assert first.raw_context
    assert second.raw_context
    assert first.request.context == (
        {"role": "user", "content": "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"},
    )
    assert second.request.context[0]["content"].endswith(
        "ok<|im_end|>\n<|im_start|>user\nmore<|im_end|>\n<|im_start|>assistant\n"
    )


def test_a_response_at_the_beginning_has_an_empty_context(tokenizer):
    ids = tokenized(tokenizer, "the dog<|im_end|>")
    (response,) = find_responses(
        {"input_ids": ids, "labels": ids}, ChatTokenizer(tokenizer), tokens, 5
    )
    assert response.request.context == ()


@pytest.mark.parametrize(
    "messages",
    [
        chat("u:another question", "a:ok"),
        chat("u:hi", "a:another answer"),
        chat("u:hi", "u:ok"),
        chat("u:and before that?", "a:ok", "u:hi", "a:ok"),
        [],
    ],
)
def test_messages_that_do_not_match_the_tokens_are_not_used(tokenizer, messages):
    row = labelled(chat("u:hi", "a:ok"), tokenizer) | {"messages": messages}
    assert contexts(row, tokenizer) == ["raw"]


def test_rows_cut_at_their_start_have_raw_contexts(tokenizer):
    """The model does not see the question that was cut off, and neither does the guard."""
    row = labelled(chat("u:how are you?", "a:fine", "u:good", "a:fine"), tokenizer)
    cut = row | {key: row[key][6:] for key in ("input_ids", "labels")}
    assert contexts(cut, tokenizer) == ["raw", "raw"]


def test_think_tags_are_text_to_a_template_without_reasoning(tokenizer):
    """Without the tags, the guard would not read text that closes a reasoning."""
    content = "<think>\n</think><score>no"
    row = labelled(
        [{"role": "user", "content": "hi"}, {"role": "assistant", "content": content}], tokenizer
    )
    (response,) = find_responses(row, ChatTokenizer(tokenizer), tokens, 5)
    assert response.request.text == content


def test_a_row_without_trained_tokens_has_no_response(tokenizer):
    row = {"input_ids": [5, 6], "labels": [-100, -100]}
    assert find_responses(row, ChatTokenizer(tokenizer), tokens, 5) == []
    assert (
        find_responses({"input_ids": [], "labels": []}, ChatTokenizer(tokenizer), tokens, 5) == []
    )


@pytest.mark.parametrize(
    ("labels", "found"),
    [
        ([], []),
        ([-100, 1, 2, -100, 3], [(1, 3), (4, 5)]),
        ([1], [(0, 1)]),
        ([1, -100, -100], [(0, 1)]),
    ],
)
def test_runs_are_stretches_of_trained_labels(labels, found):
    assert trained_runs(labels) == found


# Rows that are refused


@pytest.mark.parametrize("known", [True, False])
def test_a_trained_question_is_refused(tokenizer, known):
    row = labelled(chat("u:hi", "a:ok", "u:why?", "a:fine"), tokenizer)
    start = row["input_ids"].index(tokenized(tokenizer, "why?")[0])
    row["labels"] = [i if start <= n < start + 3 else -100 for n, i in enumerate(row["input_ids"])]
    if not known:
        del row["messages"]
    with pytest.raises(DataError, match=r"\('why\??'\) are trained, and the user says them"):
        contexts(row, tokenizer)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([5, 6], "input_ids has 3 tokens and labels has 2"),
        ([-100, 7, 8], "not the input's own tokens"),  # shifted
        ([-100, 6, 0], "not the input's own tokens"),
        ([-1, -1, 7], "not the input's own tokens"),
    ],
)
def test_labels_other_than_the_inputs_are_refused(tokenizer, labels, message):
    with pytest.raises(DataError, match=message):
        find_responses(
            {"input_ids": [5, 6, 7], "labels": labels}, ChatTokenizer(tokenizer), tokens, 5
        )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"input_ids": None}, "input_ids is a NoneType"),
        ({"labels": "abc"}, "labels is a str"),
        ({"labels": [5, None, 7]}, "labels holds NoneType"),
        ({"input_ids": [5, 6.0, "7"]}, "input_ids holds float and str"),
        ({"labels": [True, False, True]}, "labels holds bool"),
        ({"input_ids": [5, -100, 7]}, "input_ids holds -100, which is no token"),
        ({"input_ids": [5, 2**32, 7]}, "input_ids holds 4294967296"),
        ({"messages": [5]}, r"messages\[0\] is a int"),
        ({"prompt": "a", "completion": 5}, "'completion' is a int"),
    ],
)
def test_rows_with_invalid_tokens_or_messages_are_refused(tokenizer, changes, message):
    row = {"input_ids": [5, 6, 7], "labels": [-100, 6, 7], **changes}
    with pytest.raises(DataError, match=message):
        find_responses(row, ChatTokenizer(tokenizer), tokens, 5)
