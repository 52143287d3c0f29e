"""Score fewer prefixes: coarse chunk ends first, more only where scores change or are not safe.

Most responses are safe from their first token to their last, so most of their scores carry no new
information. The disadvantage: a drop between two safe chunk ends can be missed. Off by default.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from star_dss_plugin.data.requests import PrefixRequest, Trajectory
from star_dss_plugin.errors import GuardError
from star_dss_plugin.guards.base import Guard, StreamingGuard, check_trajectories
from star_dss_plugin.guards.combined import CombinedGuard
from star_dss_plugin.validation import probability

__all__ = ["STRIDE", "AdaptiveGuard", "make_adaptive"]

_Floats = NDArray[np.float64]
_Bools = NDArray[np.bool_]

STRIDE = 8
"""Stride of the first round: every 8th prefix is scored, plus the first and the last."""


def make_adaptive(guard: Guard, epsilon: float) -> Guard:
    """Wrap a verdict guard so that fewer prefixes are scored.

    A streaming guard reads a response in one pass and is returned as it is.
    """
    if isinstance(guard, CombinedGuard):
        return guard.with_parts([make_adaptive(part, epsilon) for part in guard.parts])
    return guard if isinstance(guard, StreamingGuard) else AdaptiveGuard(guard, epsilon)


class AdaptiveGuard(Guard):
    """Score some prefixes of a response with a guard, and interpolate the rest.

    An interval between two scored prefixes is split where the two scores differ by more than ε or
    one of them is below 1 − ε. Scores in all other intervals are interpolated linearly over
    characters, and so lie within ε of 1.

    Args:
        guard: The guard that scores.
        epsilon: ε in [0, 1].

    Raises:
        ConfigError: ε is not a number in [0, 1].

    Attributes:
        asked: Number of prefixes that the guard has scored so far.
        wanted: Number of prefixes that callers requested so far.
    """

    def __init__(self, guard: Guard, epsilon: float = 0.02) -> None:
        probability("trajectory_epsilon", epsilon)
        self._guard, self.epsilon = guard, epsilon
        self.name, self.demonstration = guard.name, guard.demonstration
        self.min_label_mass, self.markers = guard.min_label_mass, guard.markers
        self.asked = self.wanted = 0

    @property
    def identity(self) -> dict[str, Any]:
        how = {"stride": STRIDE, "epsilon": self.epsilon}
        return {**self._guard.identity, "trajectory": {"adaptive": how}}

    def plan(self, requests: Sequence[PrefixRequest]) -> list[list[int]]:
        return self._guard.plan(requests)

    def trajectories(self, requests: Sequence[PrefixRequest]) -> list[Trajectory]:
        known = [np.zeros(len(r.ends), dtype=bool) for r in requests]
        scores = [np.zeros(len(r.ends)) for r in requests]
        masses = [np.zeros(len(r.ends)) for r in requests]
        has_mass = True
        todo = {
            i: [*range(0, len(r.ends) - 1, STRIDE), len(r.ends) - 1] for i, r in enumerate(requests)
        }
        while todo:
            for i, found in zip(todo, self._ask(requests, todo), strict=True):
                known[i][todo[i]] = True
                scores[i][todo[i]] = found.scores
                has_mass = has_mass and found.label_mass is not None
                masses[i][todo[i]] = found.label_mass or 0.0
            todo = {i: more for i in todo if (more := self._next_prefixes(scores[i], known[i]))}
        self.wanted += sum(len(r.ends) for r in requests)
        return [
            Trajectory(_interpolated(r, s, k), _interpolated(r, m, k) if has_mass else None)
            for r, s, m, k in zip(requests, scores, masses, known, strict=True)
        ]

    def truncates(self, request: PrefixRequest) -> bool:
        return self._guard.truncates(request)

    def close(self) -> None:
        self._guard.close()

    def _ask(
        self, requests: Sequence[PrefixRequest], todo: dict[int, list[int]]
    ) -> list[Trajectory]:
        asked = [
            PrefixRequest(
                requests[i].context, requests[i].text, tuple(requests[i].ends[k] for k in wanted)
            )
            for i, wanted in todo.items()
        ]
        self.asked += sum(len(request.ends) for request in asked)
        try:
            found = self._guard.trajectories(asked)
        except GuardError as error:
            if error.request is not None:
                error.request = list(todo)[error.request]
            raise
        # Checked before interpolation, which would hide a missing or wrong score.
        check_trajectories(self.name, asked, found)
        return found

    def _next_prefixes(self, scores: _Floats, known: _Bools) -> list[int]:
        """Return the indices of the prefixes to score next."""
        safe = 1 - self.epsilon
        more: list[int] = []
        for first, last in pairwise(np.flatnonzero(known).tolist()):
            one, other = scores[first], scores[last]
            if one < safe and other < safe:
                more += range(first + 1, last)  # bisection would add all of them, in more rounds
            elif last - first > 1 and (min(one, other) < safe or abs(one - other) > self.epsilon):
                more.append((first + last) // 2)
        return more


def _interpolated(request: PrefixRequest, values: _Floats, known: _Bools) -> tuple[float, ...]:
    ends = np.asarray(request.ends, dtype=np.float64)
    return tuple(np.interp(ends, ends[known], values[known]).tolist())
