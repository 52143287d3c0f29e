"""Hostile input, some of each kind: it works, or is refused in words (support/fuzz_targets.py)."""

import pytest

pytest.importorskip("hypothesis")

from support.fuzz_places import PLACES
from support.fuzz_targets import TARGETS, check_sizes
from support.fuzzing import holds


@pytest.mark.parametrize("name", TARGETS)
def test_hostile_input_works_or_is_refused(name):
    if name == "yaml":
        pytest.importorskip("trl")
    holds(TARGETS[name])


@pytest.mark.parametrize("name", PLACES)
def test_hostile_places_are_read_or_refused_and_touch_nothing_else(name):
    if name == "servers":
        pytest.importorskip("httpx2")
    holds(PLACES[name])


def test_long_responses_and_conversations():
    check_sizes(0.1, 120)  # benchmarks/fuzz.py: 10 MB, and 2,000 turns
