"""Bound how far a probe's scores are from the guard's, by split-conformal prediction.

Prefixes of held-out responses are sorted into bins by what the probe says of them. In each bin the
bound is the quantile of the differences there (Vovk's Mondrian form): narrow where the probe says
"surely safe" and is right, wide where it hesitates. A prefix is asked if its bin's bound exceeds
the tolerance, or the interval holds the threshold.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

__all__ = ["COVERAGE", "Bounds", "Held", "checked", "probabilities"]

COVERAGE = 0.95
"""The promise: this share of the probe's scores lies within the tolerance."""
LEVEL = 0.975
"""The quantile in each bin: higher than the promise, so that chance alone seldom breaks it."""
_BINS, _FEWEST = 20, 80
"""Bins at most, and prefixes in a bin at least: of so many that weigh alike one may be far off."""

_Floats = NDArray[np.float64]


def probabilities(logits: _Floats) -> _Floats:
    """Return P(safe) of log-odds."""
    found: _Floats = torch.from_numpy(np.ascontiguousarray(logits)).sigmoid().numpy()
    return found


@dataclass(frozen=True)
class Held:
    """Hold one held-out response, or some of its prefixes.

    Attributes:
        logits: (prefixes,): the probe's log-odds, by a probe that has not seen it.
        scores: (prefixes,): the guard's P(safe).
        weight: How many prefixes of the data each of them stands for.
    """

    logits: _Floats
    scores: _Floats
    weight: float


@dataclass(frozen=True)
class Bounds:
    """Say which of a probe's scores are as good as the guard's.

    Attributes:
        edges: (bins − 1,): log-odds at which bins end, increasing.
        halves: (bins,): the bound of the difference in each; infinite where nothing is known.
        tolerance: Largest bound of a score that is not asked.
        threshold: τ: no interval of such a score holds it.
    """

    edges: _Floats
    halves: _Floats
    tolerance: float
    threshold: float

    @classmethod
    def of(cls, held: Sequence[Held], tolerance: float, threshold: float) -> Bounds:
        """Find the bounds of held-out responses."""
        logits = np.concatenate([one.logits for one in held])
        off = np.abs(probabilities(logits) - np.concatenate([one.scores for one in held]))
        weights = np.concatenate([np.full(len(one.logits), one.weight) for one in held])
        bins = max(1, min(_BINS, len(logits) // _FEWEST))
        edges = np.unique(np.quantile(logits, np.arange(1, bins) / bins))
        place = np.searchsorted(edges, logits, side="right")
        halves = [
            _bound(off[place == b], weights[place == b], tolerance) for b in range(len(edges) + 1)
        ]
        return cls(edges, np.array(halves), tolerance, threshold)

    def asks(self, logits: _Floats) -> NDArray[np.bool_]:
        """Return for each log-odds whether the guard has to be asked."""
        half = self.halves[np.searchsorted(self.edges, logits, side="right")]
        p = probabilities(logits)
        straddles = (p - half < self.threshold) & (self.threshold <= p + half)
        asked: NDArray[np.bool_] = (half > self.tolerance) | straddles
        return asked


def _bound(off: _Floats, weights: _Floats, tolerance: float) -> float:
    """Return the conformal quantile of weighted differences: one more could be any."""
    if not len(off):
        return float("inf")
    order = np.argsort(off, kind="stable")
    share = weights[order].cumsum() / (weights.sum() + weights.max())
    reached = np.flatnonzero(share >= LEVEL)
    return float(off[order][reached[0]]) if len(reached) else float("inf")


def checked(held: Sequence[Held], tolerance: float, threshold: float) -> dict[str, float]:
    """Check bounds on responses that they were not found on: each half checks the other's.

    Returns:
        Weighted by what prefixes stand for: `coverage`, the share of the probe's scores within
        the tolerance; `probed`, the share of prefixes that are not asked; `mean` and `largest`
        difference of the probe's scores from the guard's. Without a probed prefix `coverage` is 1.
    """
    halves = held[::2], held[1::2]
    off, weights, total = [], [], 0.0
    for known, tested in (halves, halves[::-1]):
        bounds = Bounds.of(known, tolerance, threshold)
        for one in tested:
            kept = ~bounds.asks(one.logits)
            difference = np.abs(probabilities(one.logits) - one.scores)[kept]
            off.append(difference)
            weights.append(np.full(len(difference), one.weight))
            total += one.weight * len(kept)
    found, counts = np.concatenate(off), np.concatenate(weights)
    if not len(found):
        return {"coverage": 1.0, "probed": 0.0, "mean": 0.0, "largest": 0.0}
    return {
        "coverage": float(np.average(found <= tolerance, weights=counts)),
        "probed": float(counts.sum() / total),
        "mean": float(np.average(found, weights=counts)),
        "largest": float(found.max()),
    }
