"""All hostile places and rows together, and a count of what comes of many of them."""

import traceback
from collections import Counter

from hypothesis import HealthCheck, given, seed, settings

from support.fuzz_places import PLACES
from support.fuzz_ranks import RANKS
from support.fuzz_scored import SCORED

ATTACKS = PLACES | SCORED | RANKS


def count_outcomes(target, cases, number):
    """Try so many inputs drawn from a seed.

    Returns:
        How often each outcome was there, and for each fault that broke the property the last line
        of its traceback, how often, and one input.
    """
    found, faults, examples = Counter(), Counter(), {}

    def check(one):
        try:
            found[target.check(one)] += 1
        except Exception as error:  # whatever breaks the property is counted
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
