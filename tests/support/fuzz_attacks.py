"""All fuzz targets of hostile places, rows and ranks, and a count of their outcomes."""

import traceback
from collections import Counter

from hypothesis import HealthCheck, given, seed, settings

from support.fuzz_places import PLACES
from support.fuzz_ranks import RANKS
from support.fuzz_scored import SCORED

ATTACKS = PLACES | SCORED | RANKS


def count_outcomes(target, cases, number):
    """Try inputs drawn from a seed.

    Args:
        target: A `Target`.
        cases: The number of inputs.
        number: The seed.

    Returns:
        The count of each outcome; and for each fault that broke the property, its last traceback
        line, its count and one input.
    """
    found, faults, examples = Counter(), Counter(), {}

    def check(one):
        try:
            found[target.check(one)] += 1
        except Exception as error:  # every fault that breaks the property is counted
            found["BROKEN"] += 1
            at = traceback.extract_tb(error.__traceback__)[-1]
            line = f"{type(error).__name__} at {at.name}:{at.lineno}: {str(error)[:300]!a}"
            faults[line] += 1
            examples.setdefault(line, one)

    some = settings(
        max_examples=cases, deadline=None, database=None, suppress_health_check=list(HealthCheck)
    )
    some(seed(number)(given(target.inputs)(check)))()
    return found, [(line, count, examples[line]) for line, count in faults.most_common()]
