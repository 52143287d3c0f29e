"""Verdict guards: labels, raw probabilities, scores of prefixes and of conversations."""

import pytest
import torch
from datasets import Dataset
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from support.verdict_guards import (
    QUESTION,
    TEXT,
    answer,
    describe,
    naive_prompt,
    talk,
    tokenizer_of,
)
from transformers import AutoModelForCausalLM

from star_dss_plugin import ConfigError, DataError, GuardError, load_guard, score_dataset
from star_dss_plugin.data.requests import PrefixRequest

# Label words


def test_label_ids(qwen, granite):
    assert qwen.identity["labels"] == [[22291], [73067], [2093]]
    tokenizer = tokenizer_of(qwen)
    assert tokenizer.decode([22291, 73067, 2093]) == " Safe Unsafe Cont"
    assert granite.identity["labels"] == [
        sorted([2023, 1289, 1347, 2576, 3139, 4435]),
        sorted([10922, 7134, 9155, 10100, 19354, 24065]),
    ]


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ({"safe_labels": [" good"], "unsafe_labels": [" good", " bad"]}, "begin with the same"),
        ({"safe_labels": ["<|im_end|>a"], "unsafe_labels": ["<|im_end|>b"]}, "begin with the same"),
        ({"controversial_labels": [" bad"]}, "begin with the same"),
        ({"safe_labels": " good"}, "non-empty list of spellings"),
        ({"safe_labels": []}, "non-empty list of spellings"),
        ({"unsafe_labels": [""]}, "non-empty list of spellings"),
        ({"controversial_labels": ["", " ok"]}, "non-empty list of spellings"),
    ],
)
def test_ambiguous_or_empty_labels_are_refused(model_dir, labels, message):
    with pytest.raises(ConfigError, match=message):
        load_guard(describe(model_dir, **labels))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"turns": "first"}, "turns is 'first'"),
        ({"controversial_weight": 1.5}, "controversial_weight is 1.5"),
        ({"dtype": "int8"}, "guard_dtype is 'int8'"),
        ({"dtype": "float33"}, "guard_dtype is 'float33'"),
        ({"prefil": "x"}, "prefil"),
    ],
)
def test_invalid_options_are_refused(model_dir, options, message):
    with pytest.raises(ConfigError, match=message):
        load_guard(describe(model_dir, **options))


@pytest.mark.parametrize("missing", ["model", "safe_labels", "unsafe_labels"])
def test_a_described_guard_needs_its_keys(model_dir, missing):
    options = describe(model_dir)
    del options[missing]
    with pytest.raises(ConfigError, match=f"lacks {missing}"):
        load_guard(options)


# Scores: raw probabilities of one forward pass per prefix


def slow_scores(guard, context, text, ends, weight=0.0):
    """Return scores from plain transformers, with a float64 softmax over the labels."""
    model = AutoModelForCausalLM.from_pretrained(guard.identity["model"], dtype=torch.float32)
    scores, masses = [], []
    for end in ends:
        messages = [*context, answer(text[:end])]
        ids = torch.tensor([naive_prompt(guard, messages)])
        with torch.no_grad():
            logits = model(ids).logits[0, -1].double()
        groups = [logits[list(group)] for group in guard.identity["labels"]]
        verdict = torch.stack([g.logsumexp(0) for g in groups]).softmax(0)
        scores.append(verdict[0] + (weight * verdict[2] if len(groups) == 3 else 0))
        flat = [i for group in guard.identity["labels"] for i in group]
        masses.append(logits.softmax(0)[flat].sum())
    return torch.stack(scores), torch.stack(masses)


def test_scores_are_those_of_one_pass_per_prefix(guard):
    ends = [0, 1, 2, 8, 9, 11, 16, 17, len(TEXT)]
    (found,) = guard.trajectories([PrefixRequest(tuple(QUESTION), TEXT, tuple(ends))])
    scores, masses = slow_scores(guard, QUESTION, TEXT, ends)
    torch.testing.assert_close(torch.tensor(found.scores).double(), scores, atol=1e-4, rtol=0)
    torch.testing.assert_close(
        torch.tensor(found.label_mass).double(), masses, atol=1e-4, rtol=1e-3
    )
    assert max(scores) - min(scores) > 1e-3  # the test can tell prefixes apart


@pytest.mark.parametrize("weight", [0.0, 0.5, 1.0])
def test_controversial_weight(model_dir, weight):
    guard = load_guard(
        describe(
            model_dir,
            controversial_labels=[" fox", " dog"],
            controversial_weight=weight,
        )
    )
    (found,) = guard.trajectories([PrefixRequest(tuple(QUESTION), TEXT, (5, len(TEXT)))])
    scores, _ = slow_scores(guard, QUESTION, TEXT, (5, len(TEXT)), weight)
    torch.testing.assert_close(torch.tensor(found.scores).double(), scores, atol=1e-4, rtol=0)


def test_score_of_conversations(guard):
    conversations = [[*QUESTION, answer(TEXT)], [*QUESTION, answer("")], [answer("hello")]]
    found = guard.score(conversations)
    for messages, score in zip(conversations, found, strict=True):
        text = messages[-1]["content"]
        context = messages[:-1] or talk("")
        expected, _ = slow_scores(guard, context, text, [len(text)])
        assert score == pytest.approx(float(expected[0]), abs=1e-4)
    assert guard.score([]) == []


@pytest.mark.parametrize("messages", [[], QUESTION, [answer("x"), *QUESTION]])
def test_a_conversation_ends_with_its_answer(tiny, messages):
    with pytest.raises(DataError, match="Conversation 1 does not end with an assistant"):
        tiny.score([[*QUESTION, answer("fine")], messages])


@pytest.mark.parametrize("content", [None, 4, [{"type": "text", "text": "hi"}]], ids=str)
def test_content_is_text(tiny, content):
    """A guard never reads the Python representation of a value."""
    for messages in (
        [*QUESTION, {"role": "assistant", "content": content}],
        [{"role": "user", "content": content}, answer("fine")],
    ):
        with pytest.raises(DataError, match="Conversation 0 has a message whose content is not"):
            tiny.score([messages])


# Loading


def test_a_prompt_that_does_not_fit_is_an_error_that_names_the_row(tiny, tokenizer):
    rows = [{"messages": talk("hi", "ok " * n)} for n in (3, 5, 2, 1200, 4)]
    with pytest.raises(GuardError, match=r"Row 3: A prompt of \d+ tokens does not fit.*1024"):
        score_dataset(Dataset.from_list(rows), tokenizer, guard=tiny, progress=False)


@given(st.lists(st.integers(0, 30), min_size=1, max_size=5, unique=True))
@settings(max_examples=10, deadline=None)
def test_scores_do_not_depend_on_the_other_prefixes(tiny, ends):
    ends = sorted(ends)
    assume(ends[-1] <= len(TEXT))
    (together,) = tiny.trajectories([PrefixRequest(tuple(QUESTION), TEXT, tuple(ends))])
    alone = tiny.score([[*QUESTION, answer(TEXT[:end])] for end in ends])
    assert together.scores == pytest.approx(alone, abs=1e-5)
