"""Compute the summary numbers at the top of a report."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from star_dss_plugin.report.reading import ScoredResponse

__all__ = ["BINS", "Group", "by_source", "grouped", "histogram", "mean_trajectory", "summarise"]

BINS = 20
"""Number of bars in the histogram over [0, 1]."""
_GRID = 41


@dataclass(frozen=True)
class Group:
    """Hold counts over some responses.

    Attributes:
        name: Name of the source, or "" for all responses.
        responses: Number of responses.
        tokens: Number of trained tokens.
        mean: Mean score of the tokens.
        below: Number of tokens with a score below the threshold.
        crossing: Number of responses with at least one such token.
    """

    name: str
    responses: int
    tokens: int
    mean: float
    below: int
    crossing: int

    @property
    def share_below(self) -> float:
        """Return the share of tokens with a score below the threshold."""
        return self.below / self.tokens


def summarise(responses: Sequence[ScoredResponse], threshold: float, name: str = "") -> Group:
    """Return the counts over some responses (at least one)."""
    tokens = sum(r.tokens for r in responses)
    return Group(
        name,
        len(responses),
        tokens,
        sum(r.mean * r.tokens for r in responses) / tokens,
        sum(r.below(threshold) for r in responses),
        sum(r.crossing(threshold) is not None for r in responses),
    )


def grouped(responses: Iterable[ScoredResponse]) -> dict[str, list[ScoredResponse]]:
    """Group responses by source, the largest source first; empty if no response has a source."""
    found: dict[str, list[ScoredResponse]] = {}
    for response in responses:
        if response.source is not None:
            found.setdefault(response.source, []).append(response)
    return dict(sorted(found.items(), key=lambda item: (-len(item[1]), item[0])))


def by_source(responses: Iterable[ScoredResponse], threshold: float) -> list[Group]:
    """Return the counts of each source, the largest first."""
    return [summarise(found, threshold, name) for name, found in grouped(responses).items()]


def histogram(responses: Iterable[ScoredResponse]) -> list[int]:
    """Return the number of tokens by score: `BINS` counts over [0, 1]."""
    counts = np.zeros(BINS, dtype=np.int64)
    for response in responses:
        bins = np.minimum((np.asarray(response.scores) * BINS).astype(int), BINS - 1)
        np.add.at(counts, bins, response.lengths)
    return [int(count) for count in counts]


def mean_trajectory(
    responses: Sequence[ScoredResponse],
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the mean score at each share of a response's length.

    Returns:
        Shares from 0 to 1 and the mean scores there, both of shape (41,).
    """
    grid = np.linspace(0, 1, _GRID)
    values = np.empty((len(responses), _GRID))
    for i, response in enumerate(responses):
        # The token at each share of the length: the first one for 0, the last one for 1.
        token = np.clip(np.ceil(grid * response.tokens - 1e-9), 1, None)
        values[i] = np.asarray(response.scores)[np.searchsorted(response.token_ends, token)]
    return grid, values.mean(axis=0)
