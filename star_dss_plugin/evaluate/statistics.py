"""Shares with intervals: how sure can one be with this many prompts?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

__all__ = ["Estimate", "bootstrap_share", "paired_difference"]

_BATCH = 1000  # resamples held at a time


@dataclass(frozen=True)
class Estimate:
    """A share, or a difference of two, with its 95 % interval.

    Attributes:
        value: The share in [0, 1]; a difference lies in [−1, 1].
        low: 2.5 % quantile of the bootstrap.
        high: 97.5 % quantile.
        count: Prompts it was measured on.
    """

    value: float
    low: float
    high: float
    count: int


def bootstrap_share(hits: Sequence[bool], *, resamples: int = 10_000, seed: int = 0) -> Estimate:
    """The share of hits, with the percentile bootstrap's interval over prompts.

    The interval says what other prompts of the same kind might have given. It knows nothing of
    other training seeds, and is of length 0 where all or none hit: 0 of 20 is then read as "at most
    about 3 / 20".

    Args:
        hits: One per prompt, at least one.
        resamples: Draws with replacement, >= 1.
        seed: Of the draws.
    """
    return _interval(np.asarray(hits, dtype=np.float64), resamples, seed)


def paired_difference(
    hits: Sequence[bool], baseline: Sequence[bool], *, resamples: int = 10_000, seed: int = 0
) -> Estimate:
    """The difference of two shares on the same prompts: what is easy or hard for both cancels out.

    Args:
        hits: One per prompt, at least one.
        baseline: The other model's, of the same prompts in the same order.
        resamples: Draws with replacement, >= 1.
        seed: Of the draws.
    """
    difference = np.asarray(hits, dtype=np.float64) - np.asarray(baseline, dtype=np.float64)
    return _interval(difference, resamples, seed)


def _interval(values: np.ndarray, resamples: int, seed: int) -> Estimate:
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
