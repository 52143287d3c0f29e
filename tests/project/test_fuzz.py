"""Hostile inputs of each kind work or are refused in words (support/fuzz_targets.py)."""

import pytest

pytest.importorskip("hypothesis")

from support.fuzz_attacks import ATTACKS
from support.fuzz_targets import TARGETS, check_sizes
from support.fuzzing import check_target


@pytest.mark.parametrize("name", TARGETS)
def test_hostile_input_works_or_is_refused(name):
    if name == "yaml":
        pytest.importorskip("trl")
    check_target(TARGETS[name])


@pytest.mark.parametrize("name", ATTACKS)
def test_untrusted_input_is_used_within_its_limits_or_refused(name):
    if name == "servers":
        pytest.importorskip("httpx2")
    check_target(ATTACKS[name])


def test_long_responses_and_conversations():
    check_sizes(0.1, 120)  # benchmarks/fuzz.py: 10 MB, and 2,000 turns
