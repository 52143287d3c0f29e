"""What a data set's provenance says of the guards: attempts to fool them, disagreement, mass."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from star_dss_plugin.data.provenance import damaged_note
from star_dss_plugin.guards.attempts import attempts
from star_dss_plugin.guards.base import Guard, PrefixRequest, Trajectory
from star_dss_plugin.guards.combined import leaves

__all__ = ["ROWS_NAMED", "attempt_notes", "label_mass", "member_notes", "remarks"]

logger = logging.getLogger(__name__)

ROWS_NAMED = 5
"""How many of the rows with an attempt are named."""


def attempt_notes(
    guard: Guard, responses: Iterable[tuple[int, PrefixRequest, bool]]
) -> dict[str, Any]:
    """What text was found that seems made to fool the guard, and what did not fit its context.

    Args:
        guard: The guard; no weights are needed.
        responses: Row, request, and whether the context is decoded tokens: its control tokens are
            those of the chat format, and no attempt.

    Returns:
        `attempts`: for each kind that occurs the number of responses and the first rows;
        `truncated_contexts`: the number of responses of which some guard read only the end of the
        conversation.
    """
    guards = leaves(guard)
    markers = [one.markers for one in guards]
    rows: dict[str, list[int]] = {}
    truncated = 0
    for row, request, raw_context in responses:
        context = () if raw_context else request.context
        for kind in attempts([request.text, *(str(m["content"]) for m in context)], markers):
            rows.setdefault(kind, []).append(row)
        truncated += any(one.truncates(request) for one in guards)
    found: dict[str, dict[str, Any]] = {
        kind: {"responses": len(rows[kind]), "rows": sorted(set(rows[kind]))[:ROWS_NAMED]}
        for kind in sorted(rows)
    }
    for kind, what in found.items():
        logger.warning(
            "%d responses or their conversations contain text that could be meant for the guard "
            "(%s), first in rows %s. It was read as text, like everything else in the data.",
            what["responses"],
            kind,
            ", ".join(map(str, what["rows"])),
        )
    if truncated:
        logger.warning(
            "For %d responses the conversation did not fit the guard: it read the end of it.",
            truncated,
        )
    return {"attempts": found, "truncated_contexts": truncated}


def member_notes(
    members: Mapping[str, Mapping[str, Trajectory]], keys: Sequence[str]
) -> dict[str, Any]:
    """What the guards of an ensemble said, each by itself, and how far apart they were.

    Args:
        members: Each guard's trajectories by key.
        keys: One per response of the data.

    Returns:
        `members`: by name the mean prefix score and the label mass; `disagreement`: mean and 95%
        quantile over prefixes of the highest score minus the lowest, and the share of prefixes
        that some guard finds safe (0.5 or more) and another does not. Empty if there is one guard,
        or no response.
    """
    if not members or not keys:
        return {}
    scores = np.array(
        [[s for key in keys for s in found[key].scores] for found in members.values()]
    )
    apart = scores.max(0) - scores.min(0)
    split = (scores.max(0) >= 0.5) & (scores.min(0) < 0.5)
    disagreement = {
        "mean": float(apart.mean()),
        "p95": float(np.quantile(apart, 0.95)),
        "opposite": float(split.mean()),
    }
    logger.info(
        "The guards' scores are %.3f apart on average; %.1f%% of the prefixes are safe to one and "
        "unsafe to another.",
        disagreement["mean"],
        100 * disagreement["opposite"],
    )
    return {
        "members": {
            name: {"mean_prefix_score": float(own.mean()), "label_mass": label_mass(found, keys)}
            for (name, found), own in zip(members.items(), scores, strict=True)
        },
        "disagreement": disagreement,
    }


def remarks(provenance: Mapping[str, Any]) -> list[str]:
    """What a reader of scores should know of them, a sentence each; older notes say less.

    Raises:
        DataError: The notes are damaged.
    """
    try:
        return _remarks(provenance)
    except (ArithmeticError, AttributeError, KeyError, TypeError, ValueError) as error:
        raise damaged_note("scores") from error


def _remarks(provenance: Mapping[str, Any]) -> list[str]:
    said = [
        f"{int(what['responses'])} responses contain text that could be meant for the guard "
        f"({kind}), first in rows {', '.join(str(int(row)) for row in what['rows'])}"
        for kind, what in provenance.get("attempts", {}).items()
    ]
    if truncated := provenance.get("truncated_contexts", 0):
        said.append(f"{int(truncated)} conversations did not fit the guard, which read their ends")
    if errors := provenance.get("guard_errors", 0):
        said.append(f"{int(errors)} responses could not be scored and count as unsafe")
    if apart := provenance.get("disagreement"):
        said.append(
            f"the guards' scores are {apart['mean']:.3f} apart on average; "
            f"{apart['opposite']:.1%} of the prefixes are safe to one and unsafe to another"
        )
    return said


def label_mass(found: Mapping[str, Trajectory], keys: Sequence[str]) -> dict[str, float] | None:
    """Mean, lowest and 5% quantile of the label mass; None for guards without label words."""
    masses: NDArray[np.float64] = np.array([m for k in keys for m in found[k].label_mass or ()])
    if not masses.size:
        return None
    return {
        "mean": float(masses.mean()),
        "min": float(masses.min()),
        "p05": float(np.quantile(masses, 0.05)),
    }
