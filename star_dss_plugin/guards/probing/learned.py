"""Keep a fitted probe with its bounds, and say whether its scores may be used."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from star_dss_plugin.guards.probing.bounds import COVERAGE, Bounds
from star_dss_plugin.guards.probing.linear import Linear

__all__ = ["Learned"]


@dataclass(frozen=True)
class Learned:
    """Hold a fitted probe.

    Attributes:
        blocks: Numbers of the guard's blocks that it reads.
        linear: Their states to log-odds.
        bounds: Which scores count.
        facts: How it was made and how good it is, as JSON values.
    """

    blocks: tuple[int, ...]
    linear: Linear
    bounds: Bounds
    facts: Mapping[str, Any]

    @property
    def refused(self) -> str | None:
        """Return why its scores must not be used; None if they may."""
        if not self.facts["coverage"] >= COVERAGE:
            return (
                f"only {self.facts['coverage']:.1%} of the probe's scores for held-out responses "
                f"lie within {self.bounds.tolerance} of the guard's (promised: {COVERAGE:.0%})"
            )
        if not self.facts["probed"]:
            return "the probe is sure of no held-out response"
        return None

    def dump(self) -> str:
        """Return it as JSON, from which `parse` makes an equal one."""
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
    def parse(cls, text: str | bytes) -> Learned:
        """Read what `dump` has written.

        Raises:
            ValueError, TypeError, KeyError: It is something else.
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
        _ = found.refused  # reads what the facts must hold
        return found
