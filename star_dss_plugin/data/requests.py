"""Define a guard's input and output: messages, requests and trajectories."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from operator import ge
from typing import Any

__all__ = ["Message", "PrefixRequest", "Trajectory"]

Message = Mapping[str, Any]
"""One turn: `role` ("system", "user", "assistant", "tool") and `content` (str)."""


@dataclass(frozen=True)
class PrefixRequest:
    """One response and the prefixes of it that a guard scores.

    Attributes:
        context: The messages before the response, oldest first; may be empty.
        text: The response.
        ends: Lengths of the prefixes in characters of `text`, strictly increasing, at least one,
            each in [0, len(text)].
    """

    context: tuple[Message, ...]
    text: str
    ends: tuple[int, ...]

    def __post_init__(self) -> None:
        ends = self.ends
        if not ends or ends[0] < 0 or ends[-1] > len(self.text):
            raise ValueError(f"prefix ends {ends} do not lie within a text of {len(self.text)}")
        if any(map(ge, ends, ends[1:])):
            raise ValueError(f"prefix ends must increase: {ends}")


@dataclass(frozen=True)
class Trajectory:
    """The STAR scores of one response.

    Attributes:
        scores: P(safe) in [0, 1], one per prefix end of the request.
        label_mass: Total probability of the guard's label words before renormalisation, one per
            prefix; None for guards without label words.
        asked: Whether the guard gave each score itself; False for scores of a probe that learned
            from the guard (`trajectory="probed"`). None: the guard gave all scores.
    """

    scores: tuple[float, ...]
    label_mass: tuple[float, ...] | None = None
    asked: tuple[bool, ...] | None = None
