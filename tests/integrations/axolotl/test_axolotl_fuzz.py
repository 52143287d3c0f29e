"""Hostile inputs from Axolotl: the block of options, and rendered conversations."""

import pytest

pytest.importorskip("axolotl")

from support.fuzz_targets import AXOLOTL_TARGETS
from support.fuzzing import holds


@pytest.mark.parametrize("name", AXOLOTL_TARGETS)
def test_hostile_input_works_or_is_refused(name):
    holds(AXOLOTL_TARGETS[name])
