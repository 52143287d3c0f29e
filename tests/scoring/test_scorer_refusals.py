"""Scoring refuses invalid guard answers, data without responses, and unsupported options."""

import pytest
from datasets import Dataset
from support.guards import WordGuard
from support.scoring import SIMPLE, TALK, HashGuard, chat, conversations, scored

from star_dss_plugin import (
    ConfigError,
    DataError,
    GuardError,
    provenance_of,
)
from star_dss_plugin.data.requests import Trajectory
from star_dss_plugin.guards.base import Guard


@pytest.mark.parametrize(
    "ends", [[30, 34, 39], [3, 1, 5], [-1, 2, 3]], ids=["of the prompt", "unordered", "negative"]
)
def test_token_ends_outside_or_out_of_order_are_refused(tokenizer, monkeypatch, ends):
    """Otherwise tokens would get the scores of other prefixes."""
    tokens = [(end, 0.9 - i / 10) for i, end in enumerate(ends)]
    monkeypatch.setattr(WordGuard, "token_scores", lambda self, responses: [tokens])
    with pytest.raises(GuardError, match="must count from the beginning of the response"):
        scored(Dataset.from_list([SIMPLE]), tokenizer, "test-words")


@pytest.mark.parametrize("count", [0, 2])
def test_a_wrong_number_of_token_scores_is_refused(tokenizer, monkeypatch, count):
    monkeypatch.setattr(WordGuard, "token_scores", lambda *_: [[(0, 0.5)]] * count)
    with pytest.raises(GuardError, match=f"of {count} responses for 1; token_scores must"):
        scored(Dataset.from_list([SIMPLE]), tokenizer, "test-words")


# Guards with invalid answers


class AnsweringGuard(Guard):
    """Answer with a given function."""

    name = "test-answers"
    identity = {"kind": "answers"}

    def __init__(self, answer) -> None:
        self.answer = answer

    def trajectories(self, requests):
        return self.answer(requests)


def trajectories_of(scores, mass=None):
    """Return a function that makes a trajectory for each request from its number of ends."""
    return lambda requests: [
        Trajectory(scores(len(r.ends)), None if mass is None else mass(len(r.ends)))
        for r in requests
    ]


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (trajectories_of(lambda n: (float("nan"),) * n), "one probability in"),
        (trajectories_of(lambda n: (0.5,) * (n - 1) + (float("nan"),)), "one probability in"),
        (trajectories_of(lambda n: (float("inf"),) * n), "one probability in"),
        (trajectories_of(lambda n: (-1e-6,) * n), "one probability in"),
        (trajectories_of(lambda n: (1.000001,) * n), "one probability in"),
        (trajectories_of(lambda n: (0.5,) * (n - 1)), "one probability in"),
        (trajectories_of(lambda n: (0.5,) * (n + 1)), "one probability in"),
        (trajectories_of(lambda n: ()), "one probability in"),
        (trajectories_of(lambda n: (0.5,) * n, lambda n: (0.5,) * (n + 1)), "label_mass"),
        (trajectories_of(lambda n: (0.5,) * n, lambda n: (float("nan"),) * n), "label_mass"),
        (trajectories_of(lambda n: (0.5,) * n, lambda n: (2.0,) * n), "label_mass"),
        (lambda requests: [], "0 trajectories for 1 responses"),
        (lambda requests: [Trajectory((0.5,))] * 2, "2 trajectories for 1 responses"),
    ],
)
def test_invalid_trajectories_are_refused_and_not_cached(tokenizer, answer, message):
    data = conversations(2)
    with pytest.raises(GuardError, match=message):
        scored(data, tokenizer, AnsweringGuard(answer))
    valid = scored(data, tokenizer, AnsweringGuard(trajectories_of(lambda n: (0.25,) * n)))
    assert {s for scores in valid["star_scores"] for s in scores} == {0.25, 1.0}


@pytest.mark.parametrize("edge", [0.0, 1.0])
def test_zero_and_one_are_valid_scores(tokenizer, edge):
    found = scored(
        conversations(1), tokenizer, AnsweringGuard(trajectories_of(lambda n: (edge,) * n))
    )
    assert {s for scores in found["star_scores"] for s in scores} == {edge, 1.0}


def test_an_error_of_the_guard_names_the_row(tokenizer):
    def refuse(requests):
        if "7" in requests[0].text:
            raise GuardError("too long")
        return trajectories_of(lambda n: (0.5,) * n)(requests)

    with pytest.raises(GuardError, match="^Row 7: too long"):
        scored(conversations(), tokenizer, AnsweringGuard(refuse))


@pytest.mark.parametrize(
    ("mass", "minimum", "trusted"),
    [
        (0.6, 0.5, True),
        (0.4, 0.5, False),
        (0.4, 0.0, True),
        (1e-9, 0.5, False),
    ],
)
def test_a_label_mass_below_the_minimum_is_refused(tokenizer, mass, minimum, trusted):
    guard = AnsweringGuard(trajectories_of(lambda n: (0.9,) * n, lambda n: (mass,) * n))
    guard.min_label_mass = minimum
    data = conversations(3)
    for _ in range(2):  # computed, and from the cache
        if trusted:
            found = provenance_of(scored(data, tokenizer, guard))["label_mass"]
            assert found == pytest.approx({"mean": mass, "min": mass, "p05": mass})
        else:
            with pytest.raises(GuardError, match="test-answers.*probability of only.*the data"):
                scored(data, tokenizer, guard)


# Data that cannot be scored


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"input_ids": [5, 6], "labels": [-100, -100]}] * 2, "None of the 2 rows has a trained"),
        ([{"messages": chat("hi")}], "None of the 1 rows .*: no assistant says anything in them"),
        ([{"input_ids": [5, 6]}], "'input_ids' but no 'labels'"),
        ([SIMPLE | {"star_scores": [1.0]}], "already has a 'star_scores' column"),
        ([{"question": "hi"}], r"^Row 0: .*columns \['question'\]"),
        (
            [{"input_ids": [5], "labels": [5]}, {"input_ids": [5, 6], "labels": [-100, 5]}],
            "^Row 1: .*not the input's own tokens",
        ),
        (
            [{"input_ids": [5], "labels": [5]}, {"input_ids": [5, 6], "labels": [5]}],
            "^Row 1: input_ids has 2 tokens and labels has 1",
        ),
        (
            [{"messages": TALK, "input_ids": [5, 6], "labels": [5, 6]}],
            "^Row 0: .*not those of its chat template",
        ),
    ],
)
def test_data_that_cannot_be_scored_is_refused(tokenizer, rows, message):
    guard = HashGuard()
    with pytest.raises(DataError, match=message):
        scored(Dataset.from_list(rows), tokenizer, guard)
    assert guard.asked == []


@pytest.mark.parametrize("columns", [{"messages": []}, {"input_ids": [], "labels": []}], ids=str)
def test_an_empty_data_set_is_refused(tokenizer, columns):
    with pytest.raises(DataError, match="None of the 0 rows"):
        scored(Dataset.from_dict(columns), tokenizer, HashGuard())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"guard": None}, "No guard was given"),
        ({"guard": "test-wrods"}, "Unknown guard 'test-wrods'. Did you mean 'test-words'"),
        ({"segmenter": "word"}, "Unknown segmenter 'word'. Did you mean 'words'"),
        ({"chunk_size": 0}, "chunk_size is 0"),
        ({"chunk_size": -5}, "chunk_size is -5"),
        ({"chunk_size": 2.5}, "chunk_size is 2.5"),
        ({"chunk_size": True}, "chunk_size is True"),
        ({"trajectory": "adaptiv"}, "Unknown trajectory 'adaptiv'. Did you mean 'adaptive'"),
        ({"trajectory_epsilon": 2}, "trajectory_epsilon is 2"),
        ({"score_batch_tokens": 0}, "score_batch_tokens is 0"),
        ({"on_guard_error": "safe"}, "Unknown on_guard_error 'safe'"),
        ({"guard": {"preset": "test-words", "wrod": "x"}}, "wrod"),
        ({"guard": {}}, "lacks model, safe_labels, unsafe_labels"),
    ],
)
def test_wrong_options_are_refused(tokenizer, options, message):
    with pytest.raises(ConfigError, match=message):
        scored(conversations(1), tokenizer, **{"guard": "test-words", **options})
