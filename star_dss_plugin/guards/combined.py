"""Combine guards: an ensemble of several, or one with calibrated scores.

The parts score and are cached separately. So calibrating a guard whose scores are cached costs
nothing, and neither does adding it to an ensemble.
"""

from __future__ import annotations

import abc
import math
from collections.abc import Sequence
from typing import Any, Literal

from star_dss_plugin.data.requests import PrefixRequest, Trajectory
from star_dss_plugin.errors import ConfigError
from star_dss_plugin.guards.base import Guard, ask, lowest_trajectory
from star_dss_plugin.validation import unknown_name

__all__ = [
    "NEAREST",
    "CalibratedGuard",
    "CombinedGuard",
    "EnsembleGuard",
    "calibrate",
    "single_guards",
]

NEAREST = 1e-7
"""Scores nearer to 0 or 1 are moved to this distance. Some guards round to 0 and 1, whose infinite
logits no temperature could change.
"""


class CombinedGuard(Guard):
    """Compute scores from those of other guards.

    Attributes:
        parts: The guards whose scores are combined, in order.
    """

    parts: tuple[Guard, ...]

    @abc.abstractmethod
    def combine(self, answers: Sequence[Trajectory]) -> Trajectory:
        """Return the trajectory of one request from the trajectories of the parts."""

    @abc.abstractmethod
    def with_parts(self, parts: Sequence[Guard]) -> CombinedGuard:
        """Return the same combination over other guards."""

    def plan(self, requests: Sequence[PrefixRequest]) -> list[list[int]]:
        """Plan all requests as one batch, so that each part is loaded once."""
        if len(self.parts) == 1:
            return self.parts[0].plan(requests)
        return [list(range(len(requests)))] if requests else []

    def trajectories(self, requests: Sequence[PrefixRequest]) -> list[Trajectory]:
        answers = []
        for part in self.parts:
            answers.append(ask(part, requests))
            if len(self.parts) > 1:
                part.close()  # hold one guard in memory at a time
        return [self.combine(of_one) for of_one in zip(*answers, strict=True)]

    def close(self) -> None:
        for part in self.parts:
            part.close()


class EnsembleGuard(CombinedGuard):
    """Combine the scores of several guards, which are loaded one after the other.

    Args:
        guards: Two or more guards.
        combine: "mean" of the scores (as the paper's authors do), or "min" of them.

    Raises:
        ConfigError: Fewer than two guards, the same guard twice, or an unknown `combine`.
    """

    def __init__(self, guards: Sequence[Guard], combine: Literal["mean", "min"] = "mean") -> None:
        if combine not in ("mean", "min"):
            raise unknown_name("combine", combine, ("mean", "min"))
        if len(guards) < 2:
            raise ConfigError(
                f"An ensemble needs two guards or more, not {len(guards)}. Name one guard alone."
            )
        identities = [guard.identity for guard in guards]
        if any(one in identities[:i] for i, one in enumerate(identities)):
            raise ConfigError(
                f"The ensemble of {', '.join(g.name for g in guards)} has the same guard twice: it "
                "would count twice and add no information. Leave one out."
            )
        self.parts = tuple(guards)
        self._how: Literal["mean", "min"] = combine
        self.name = f"{combine}({', '.join(guard.name for guard in guards)})"
        self.demonstration = any(guard.demonstration for guard in guards)

    @property
    def identity(self) -> dict[str, Any]:
        parts = [part.identity for part in self.parts]
        return {"kind": "ensemble", "combine": self._how, "guards": parts}

    def combine(self, answers: Sequence[Trajectory]) -> Trajectory:
        scores = [answer.scores for answer in answers]
        masks = [answer.asked for answer in answers if answer.asked is not None]
        asked = tuple(map(all, zip(*masks, strict=True))) if masks else None
        if self._how == "min":
            return Trajectory(lowest_trajectory(answers).scores, asked=asked)
        mean = tuple(math.fsum(s) / len(s) for s in zip(*scores, strict=True))
        return Trajectory(mean, asked=asked)

    def with_parts(self, parts: Sequence[Guard]) -> EnsembleGuard:
        return EnsembleGuard(parts, self._how)


class CalibratedGuard(CombinedGuard):
    """Shift and scale a guard's scores: sigmoid((logit p − logit θ) / T).

    Args:
        guard: The guard to calibrate.
        temperature: T > 0; values above 1 move scores towards 0.5.
        threshold: θ, the score of the guard that becomes 0.5; between `NEAREST` and 1 − `NEAREST`.

    Raises:
        ConfigError: Temperature or threshold is out of range.
    """

    def __init__(self, guard: Guard, temperature: float = 1.0, threshold: float = 0.5) -> None:
        if not _is_number(temperature) or not 0 < temperature < math.inf:
            raise ConfigError(f"temperature is {temperature!r}; it must be positive (1 = raw).")
        if not _is_number(threshold) or not NEAREST < threshold < 1 - NEAREST:
            raise ConfigError(
                f"threshold is {threshold!r}; it must lie between 0 and 1, and {NEAREST} from both."
            )
        self.parts = (guard,)
        self.temperature, self.threshold = float(temperature), float(threshold)
        self.name, self.demonstration = guard.name, guard.demonstration

    @property
    def identity(self) -> dict[str, Any]:
        return {
            "kind": "calibrated",
            "temperature": self.temperature,
            "threshold": self.threshold,
            "guards": [self.parts[0].identity],
        }

    def combine(self, answers: Sequence[Trajectory]) -> Trajectory:
        [answer] = answers
        scores = (calibrate(p, self.temperature, self.threshold) for p in answer.scores)
        return Trajectory(tuple(scores), answer.label_mass)

    def with_parts(self, parts: Sequence[Guard]) -> CalibratedGuard:
        [guard] = parts
        return CalibratedGuard(guard, self.temperature, self.threshold)


def calibrate(p: float, temperature: float, threshold: float) -> float:
    """Return sigmoid((logit p − logit θ) / T), with p kept `NEAREST` away from 0 and 1."""
    p = min(max(p, NEAREST), 1 - NEAREST)
    logit = math.log(p / (1 - p)) - math.log(threshold / (1 - threshold))
    # Use the form of the sigmoid that cannot overflow.
    small = math.exp(-abs(logit) / temperature)
    return 1 / (1 + small) if logit >= 0 else small / (1 + small)


def single_guards(guard: Guard) -> list[Guard]:
    """Return the guards inside nested combinations, in order; a plain guard is its own leaf."""
    if isinstance(guard, CombinedGuard):
        return [leaf for part in guard.parts for leaf in single_guards(part)]
    return [guard]


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
