"""Hostile inputs from Axolotl: the block of options, and rendered conversations."""

import pytest

pytest.importorskip("axolotl")

from support.fuzz_targets import AXOLOTL_TARGETS
from support.fuzzing import check_target


@pytest.mark.parametrize("name", AXOLOTL_TARGETS)
def test_hostile_input_works_or_is_refused(name):
    check_target(AXOLOTL_TARGETS[name])
