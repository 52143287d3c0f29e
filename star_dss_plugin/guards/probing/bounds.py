"""Bound how far a probe's scores are from the guard's, by split-conformal prediction.

Prefixes of held-out responses are grouped into bins by the probe's log-odds. In each bin the bound
is a quantile of the differences between probe and guard (Mondrian conformal prediction, Vovk):
narrow where the probe is confident and right, wide where it is not. A probe's score is used only if
its bin's bound is at most the tolerance and the interval of this half-width around the score does
not contain the threshold. Otherwise the guard itself scores the prefix.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

__all__ = ["COVERAGE", "Bounds", "HeldOut", "check_bounds", "probabilities"]

COVERAGE = 0.95
"""Promised share of the used probe scores that lie within the tolerance of the guard's."""
LEVEL = 0.975
"""Quantile in each bin: above `COVERAGE`, so that sampling noise seldom breaks the promise."""
_BINS, _FEWEST = 20, 80
"""Largest number of bins, and fewest prefixes per bin: with 80 of equal weight, the quantile leaves
out the largest difference."""

_Floats = NDArray[np.float64]


def probabilities(logits: _Floats) -> _Floats:
    """Return P(safe) = sigmoid(log-odds), float64."""
    found: _Floats = torch.from_numpy(np.ascontiguousarray(logits)).sigmoid().numpy()
    return found


@dataclass(frozen=True)
class HeldOut:
    """Hold the scores of a response, or of some of its prefixes, by guard and held-out probe.

    Attributes:
        logits: (prefixes,), log-odds by a probe that was fitted without this response.
        scores: (prefixes,), the guard's P(safe).
        weight: How many prefixes of the data each of these prefixes represents.
    """

    logits: _Floats
    scores: _Floats
    weight: float


@dataclass(frozen=True)
class Bounds:
    """Decide which of a probe's scores may replace the guard's.

    Attributes:
        edges: (bins − 1,), log-odds between the bins, increasing.
        halves: (bins,), bound on |probe − guard| in each bin, the half-width of its intervals;
            infinite where too little is known.
        tolerance: Largest bound of a score that is used.
        threshold: τ; the interval of a score that is used does not contain it.
    """

    edges: _Floats
    halves: _Floats
    tolerance: float
    threshold: float

    @classmethod
    def from_held_out(
        cls, held_out: Sequence[HeldOut], tolerance: float, threshold: float
    ) -> Bounds:
        """Compute bounds from held-out responses."""
        logits = np.concatenate([one.logits for one in held_out])
        off = np.abs(probabilities(logits) - np.concatenate([one.scores for one in held_out]))
        weights = np.concatenate([np.full(len(one.logits), one.weight) for one in held_out])
        bins = max(1, min(_BINS, len(logits) // _FEWEST))
        edges = np.unique(np.quantile(logits, np.arange(1, bins) / bins))
        place = np.searchsorted(edges, logits, side="right")
        halves = [_bound(off[place == b], weights[place == b]) for b in range(len(edges) + 1)]
        return cls(edges, np.array(halves), tolerance, threshold)

    def needs_guard(self, logits: _Floats) -> NDArray[np.bool_]:
        """Return for each of the log-odds whether the guard itself must score the prefix."""
        half = self.halves[np.searchsorted(self.edges, logits, side="right")]
        p = probabilities(logits)
        straddles = (p - half < self.threshold) & (self.threshold <= p + half)
        asked: NDArray[np.bool_] = (half > self.tolerance) | straddles
        return asked


def _bound(off: _Floats, weights: _Floats) -> float:
    """Return the conformal quantile of weighted differences; infinite if there are too few.

    A new prefix, of the largest weight and with any difference, counts as one more.
    """
    if not len(off):
        return float("inf")
    order = np.argsort(off, kind="stable")
    share = weights[order].cumsum() / (weights.sum() + weights.max())
    reached = np.flatnonzero(share >= LEVEL)
    return float(off[order][reached[0]]) if len(reached) else float("inf")


def check_bounds(
    held_out: Sequence[HeldOut], tolerance: float, threshold: float
) -> dict[str, float]:
    """Test bounds by two-fold cross-validation: those of one half are applied to the other half.

    Returns:
        `probed`, the share of prefixes whose probe score is used; and of these prefixes `coverage`,
        the share within the tolerance of the guard's score, and the `mean` and `largest` difference
        from it. Prefixes count by their weight. Without such a prefix, `coverage` is 1.
    """
    halves = held_out[::2], held_out[1::2]
    off, weights, total = [], [], 0.0
    for known, tested in (halves, halves[::-1]):
        bounds = Bounds.from_held_out(known, tolerance, threshold)
        for one in tested:
            kept = ~bounds.needs_guard(one.logits)
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
