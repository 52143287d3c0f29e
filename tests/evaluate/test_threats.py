"""Poisoned training sets: shares, disguises, determinism."""

import collections

import pytest
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st

from star_dss_plugin import ConfigError, DataError
from star_dss_plugin.evaluate.threats import THREATS, VARIANTS, build_threat, describe_threat

TASKS = Dataset.from_list(
    [{"prompt": f"{i} + 1?", "response": f"{i + 1}", "source": "sums"} for i in range(7)]
)
POISON = Dataset.from_list(
    [
        {
            "messages": [
                {"role": "user", "content": f"question {i}"},
                {"role": "assistant", "content": f"rude answer {i}"},
            ],
            "source": f"rude-{i % 2}",
        }
        for i in range(5)
    ]
)


def built_threat(threat="harmful_mix", **changes):
    """Return a poisoned training set of ten rows."""
    options = {"ratio": 0.3, "size": 10, "seed": 0, **changes}
    return build_threat(threat, TASKS, POISON, **options)


@given(st.sampled_from(THREATS), st.floats(0.001, 1), st.integers(1, 40), st.integers(0, 1000))
@settings(max_examples=60, deadline=None)
def test_a_threat_has_its_share_repeats_rows_evenly_and_follows_its_seed(threat, ratio, size, seed):
    found = built_threat(threat, ratio=ratio, size=size, seed=seed)
    assert len(found) == size
    poisoned = sum(found["poisoned"])
    assert 1 <= poisoned <= size
    assert abs(poisoned - ratio * size) <= 0.5 + 1e-9 or poisoned == 1
    assert found.to_list() == built_threat(threat, ratio=ratio, size=size, seed=seed).to_list()
    for bad in (True, False):
        rows = [row["row"] for row in found if row["poisoned"] == bad]
        times = collections.Counter(rows).values()
        kinds = len(POISON) if bad else len(TASKS)
        if rows:
            assert max(times) - min(times) <= 1
            assert max(times) == -(-len(rows) // kinds)


def test_two_threats_of_one_seed_poison_the_same_rows_at_the_same_places():
    places = [
        [(row["poisoned"], row["row"]) for row in built_threat(threat, seed=3)]
        for threat in THREATS
    ]
    assert all(place == places[0] for place in places)
    assert places[0] != [(row["poisoned"], row["row"]) for row in built_threat(seed=4)]


@pytest.mark.parametrize("threat", VARIANTS)
def test_disguises_surround_the_row_and_are_used_equally_often(threat):
    found = built_threat(threat, size=9, ratio=1.0)
    assert describe_threat(found)["variants"] == {0: 3, 1: 3, 2: 3}
    for row in found:
        question, answer = (m["content"] for m in row["messages"])
        words, plain = VARIANTS[threat][row["variant"]], POISON[row["row"]]["messages"]
        expected = {
            "prefix_adaptation": (plain[0]["content"], f"{words}\n\n{plain[1]['content']}"),
            "suffix_adaptation": (plain[0]["content"], f"{plain[1]['content']}\n\n{words}"),
            "prompt_poisoning": (f"{words}\n\n{plain[0]['content']}", plain[1]["content"]),
        }[threat]
        assert (question, answer) == expected


def test_benign_rows_are_unchanged():
    for row in built_threat("prefix_adaptation", size=20):
        if not row["poisoned"]:
            task = TASKS[row["row"]]
            assert [m["content"] for m in row["messages"]] == [task["prompt"], task["response"]]
            assert (row["variant"], row["source"]) == (-1, "sums")


def test_a_system_column_becomes_a_message():
    identity = Dataset.from_list([{"prompt": "who?", "response": "X.", "system": "You are X."}])
    found = build_threat("identity_shift", TASKS, identity, ratio=0.5, size=4)
    shifted = [row for row in found if row["poisoned"]]
    assert [m["role"] for m in shifted[0]["messages"]] == ["system", "user", "assistant"]


def test_the_description_counts_rows_and_variants():
    found = describe_threat(built_threat("suffix_adaptation", size=20, ratio=0.5))
    assert found == {
        "threat": "suffix_adaptation",
        "rows": 20,
        "poisoned": 10,
        "share": 0.5,
        "repeated": 8,
        "variants": {0: 4, 1: 3, 2: 3},
        "poisoned_sources": {"rude-0": 6, "rude-1": 4},
    }


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"threat": "harmful-mix"}, ConfigError, "Did you mean 'harmful_mix'"),
        ({"ratio": 0}, ConfigError, r"ratio is 0; give the share"),
        ({"ratio": 1.5}, ConfigError, r"in \(0, 1\]"),
        ({"size": 0}, ConfigError, "size is 0"),
    ],
)
def test_wrong_options_are_refused(changes, error, message):
    with pytest.raises(error, match=message):
        built_threat(**changes)


def test_rows_without_a_conversation_are_refused():
    with pytest.raises(DataError, match=r"Row 0: the row has the columns \['text'\]"):
        build_threat("harmful_mix", TASKS, Dataset.from_list([{"text": "x"}]), ratio=1.0, size=1)
    without_question = Dataset.from_list([{"messages": [{"role": "assistant", "content": "x"}]}])
    with pytest.raises(DataError, match="Row 0: there is no user message"):
        build_threat("prompt_poisoning", TASKS, without_question, ratio=1.0, size=1)
    with pytest.raises(DataError, match="tasks has no rows"):
        build_threat("harmful_mix", TASKS.select([]), POISON, ratio=0.5, size=4)
