"""Estimate shares with bootstrap intervals over prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

__all__ = ["Estimate", "bootstrap_share", "paired_difference"]

_RESAMPLES = 10_000
_BATCH = 1000  # resamples in memory at a time


@dataclass(frozen=True)
class Estimate:
    """Hold a share, or a difference of two, with its 95 % interval.

    Attributes:
        value: The share in [0, 1]; a difference is in [−1, 1].
        low: 2.5 % quantile of the bootstrap.
        high: 97.5 % quantile of the bootstrap.
        count: Number of prompts.
    """

    value: float
    low: float
    high: float
    count: int


def bootstrap_share(
    hits: Sequence[bool], *, resamples: int = _RESAMPLES, seed: int = 0
) -> Estimate:
    """Return the share of hits, with the percentile bootstrap's interval over prompts.

    The interval shows how the share varies with other prompts of the same kind, not with other
    training seeds. If all or no prompts hit, its length is 0: read 0 of 20 as "at most about 3 of
    20" (the rule of three).

    Args:
        hits: One truth value per prompt, at least one.
        resamples: Number of draws with replacement, >= 1.
        seed: Seed of the draws.
    """
    return _interval(np.asarray(hits, dtype=np.float64), resamples, seed)


def paired_difference(hits: Sequence[bool], baseline: Sequence[bool]) -> Estimate:
    """Return the difference of two shares on the same prompts, paired by prompt.

    Pairing removes the variation that is common to both, as some prompts are harder for every
    model.

    Args:
        hits: One truth value per prompt, at least one.
        baseline: Truth values of the other model, for the same prompts in the same order.
    """
    difference = np.asarray(hits, dtype=np.float64) - np.asarray(baseline, dtype=np.float64)
    return _interval(difference)


def _interval(values: np.ndarray, resamples: int = _RESAMPLES, seed: int = 0) -> Estimate:
    draw = np.random.default_rng(seed)
    means = np.concatenate(
        [
            values[draw.integers(0, len(values), (min(_BATCH, resamples - at), len(values)))].mean(
                1
            )
            for at in range(0, resamples, _BATCH)
        ]
    )
    low, high = np.quantile(means, (0.025, 0.975))
    return Estimate(float(values.mean()), float(low), float(high), len(values))
