"""Store a fitted probe with its bounds, and decide whether its scores may be used."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from star_dss_plugin.guards.probing.bounds import COVERAGE, Bounds
from star_dss_plugin.guards.probing.linear import Linear

__all__ = ["FittedProbe"]


@dataclass(frozen=True)
class FittedProbe:
    """Hold a fitted probe.

    Attributes:
        blocks: Indices of the guard's blocks whose states it reads.
        linear: Maps features of these states to log-odds.
        bounds: Decide for each prefix whether the probe's score is used.
        facts: How the probe was fitted and how accurate it is, as JSON values.
    """

    blocks: tuple[int, ...]
    linear: Linear
    bounds: Bounds
    facts: Mapping[str, Any]

    @property
    def rejection_reason(self) -> str | None:
        """Return the reason not to use the probe at all; None if it is accurate enough."""
        if not self.facts["coverage"] >= COVERAGE:
            return (
                f"only {self.facts['coverage']:.1%} of the probe's scores for held-out responses "
                f"lie within {self.bounds.tolerance} of the guard's (promised: {COVERAGE:.0%})"
            )
        if not self.facts["probed"]:
            return "the probe is sure of no held-out response"
        return None

    def dump(self) -> str:
        """Return the probe as JSON, which `parse` reads."""
        return json.dumps(
            {
                "blocks": self.blocks,
                "weight": self.linear.weight.tolist(),
                "bias": self.linear.bias,
                "edges": self.bounds.edges.tolist(),
                # JSON has no infinity.
                "halves": [None if math.isinf(h) else h for h in self.bounds.halves.tolist()],
                "tolerance": self.bounds.tolerance,
                "threshold": self.bounds.threshold,
                "facts": dict(self.facts),
            },
            sort_keys=True,
            allow_nan=False,
        )

    @classmethod
    def parse(cls, text: str | bytes) -> FittedProbe:
        """Read a probe from the JSON that `dump` returns.

        Raises:
            ValueError, TypeError, KeyError: The text is something else.
        """
        raw = json.loads(text)
        numbers = {
            name: np.array(raw[name], dtype=np.float64) for name in ("weight", "edges", "halves")
        }
        halves = numbers["halves"]
        halves[np.isnan(halves)] = np.inf
        bounds = Bounds(numbers["edges"], halves, float(raw["tolerance"]), float(raw["threshold"]))
        if len(halves) != len(bounds.edges) + 1:
            raise ValueError("bounds and bins differ in number")
        linear = Linear(numbers["weight"], float(raw["bias"]))
        found = cls(tuple(map(int, raw["blocks"])), linear, bounds, dict(raw["facts"]))
        _ = found.rejection_reason  # raises if the facts are incomplete
        return found
