"""Compute and merge guard statistics for the provenance: attempts, disagreement, label mass."""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from star_dss_plugin.data.provenance import damaged_note
from star_dss_plugin.data.requests import PrefixRequest, Trajectory
from star_dss_plugin.data.row_responses import missing_context_warning
from star_dss_plugin.errors import DataError
from star_dss_plugin.guards.attempts import find_attempts
from star_dss_plugin.guards.base import Guard
from star_dss_plugin.guards.combined import single_guards
from star_dss_plugin.visible import visible_line

__all__ = [
    "COUNTS",
    "ROWS_NAMED",
    "attempt_notes",
    "label_mass",
    "member_notes",
    "merge_provenance",
    "remarks",
]

logger = logging.getLogger(__name__)

ROWS_NAMED = 5
"""How many rows with an attempt to fool the guard are named."""


def attempt_notes(
    guard: Guard,
    responses: Iterable[tuple[int, PrefixRequest, bool]],
    own_marks: re.Pattern[str] | None = None,
) -> dict[str, Any]:
    """Count texts that seem meant to fool the guard, and conversations that exceed its context.

    Args:
        guard: The guard; its weights are not needed.
        responses: For each response its row, its request, and whether its context is decoded
            tokens, which contain control tokens of the chat template that are not attempts.
        own_marks: Matches the trained model's control tokens.

    Returns:
        `attempts`: for each kind that occurs, the number of responses and the first rows;
        `truncated_contexts`: the number of responses for which a guard read only the end of the
        conversation.
    """
    guards = single_guards(guard)
    markers = [one.markers for one in guards]
    rows: dict[str, list[int]] = {}
    truncated = 0
    for row, request, raw_context in responses:
        context = () if raw_context else request.context
        text = own_marks.sub(" ", request.text) if raw_context and own_marks else request.text
        for kind in find_attempts([text, *(str(m["content"]) for m in context)], markers):
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
    """Return the statistics of each guard of an ensemble, and their disagreement.

    Args:
        members: Each guard's trajectories by key.
        keys: The key of each response in the data.

    Returns:
        `members`: by name, the mean prefix score and the label mass. `disagreement`: over prefixes,
        the mean and the 95% quantile of the highest minus the lowest score, and the share of
        prefixes that one guard scores as safe (0.5 or more) and another does not. Empty if there is
        only one guard, or no response.
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
    """Return remarks on scores for the report and the log, one sentence each.

    Provenance of older versions gives fewer remarks.

    Raises:
        DataError: The provenance is damaged.
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
    said += [
        f"{int(count)} rows train nothing, because {visible_line(str(why))}"
        for why, count in provenance.get("untrained_rows", {}).items()
    ]
    unasked = int(provenance.get("no_contexts", 0))
    if unasked and (sentence := missing_context_warning(unasked, int(provenance["responses"]))):
        said.append(sentence)
    if truncated := provenance.get("truncated_contexts", 0):
        said.append(f"{int(truncated)} conversations did not fit the guard, which read their ends")
    if errors := provenance.get("guard_errors", 0):
        said.append(f"{int(errors)} responses could not be scored and count as unsafe")
    for probe in provenance.get("probes", []):
        said.append(_of_probe(probe))
    if apart := provenance.get("disagreement"):
        said.append(
            f"the guards' scores are {apart['mean']:.3f} apart on average; "
            f"{apart['opposite']:.1%} of the prefixes are safe to one and unsafe to another"
        )
    return said


def _of_probe(probe: Mapping[str, Any]) -> str:
    """Return a remark on a guard's probe: how good it is, or why it was not used."""
    name = visible_line(str(probe["guard"]))
    if why := probe["fell_back"]:
        return f"trajectory='probed' was not used for {name}, all scores are exact: {why}"
    return (
        f"most scores of {name} are those of a probe that learned from "
        f"{int(probe['responses'])} responses: {float(probe['coverage']):.1%} of its scores for "
        f"held-out responses lie within {float(probe['tolerance'])} of the guard's, the mean "
        f"difference is {float(probe['mean']):.4f}"
    )


def label_mass(
    trajectories: Mapping[str, Trajectory], keys: Sequence[str]
) -> dict[str, float] | None:
    """Return mean, minimum and 5% quantile of the label mass; None for guards without labels."""
    masses: NDArray[np.float64] = np.array(
        [m for k in keys for m in trajectories[k].label_mass or ()]
    )
    if not masses.size:
        return None
    return {
        "mean": float(masses.mean()),
        "min": float(masses.min()),
        "p05": float(np.quantile(masses, 0.05)),
    }


COUNTS = (
    "rows",
    "responses",
    "prefixes",
    "trained_tokens",
    "raw_contexts",
    "no_contexts",
    "truncated_contexts",
    "guard_errors",
)
"""Counts of a provenance note, which are summed when parts of a data set are merged."""

_MERGED = (
    "probed_prefixes",
    "mean_prefix_score",
    "label_mass",
    "attempts",
    "untrained_rows",
    "members",
    "disagreement",
)


def merge_provenance(notes: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Merge the provenance of all shards.

    Raises:
        DataError: Shards were scored in different ways, or no shard has a response.
    """
    counted = {*COUNTS, *_MERGED}
    first = {name: value for name, value in notes[0].items() if name not in counted}
    for number, note in enumerate(notes):
        for name in {*first, *note} - counted:
            if note.get(name) != first.get(name):
                raise DataError(
                    f"Shard {number} was scored with {name} {note.get(name)!r}, shard 0 with "
                    f"{first.get(name)!r}. Remove the folder and score all of it again."
                )
    full = [note for note in notes if note["prefixes"]]
    if not full:
        raise DataError(
            f"None of the {sum(note['rows'] for note in notes)} rows has a response, so there is "
            "nothing to train. Check the columns, the chat template and max_length (a prompt that "
            "fills it leaves no response)."
        )
    prefixes = [note["prefixes"] for note in full]
    total = {name: sum(note[name] for note in notes) for name in COUNTS}
    if "probed_prefixes" in notes[0]:
        total["probed_prefixes"] = sum(note["probed_prefixes"] for note in notes)
    found = {**first, **total, **_mean_of(full, prefixes), "attempts": _attempts(notes)}
    found["untrained_rows"] = dict(
        sorted(sum((Counter(note.get("untrained_rows", {})) for note in notes), Counter()).items())
    )
    if "members" in full[0]:
        found["members"] = {
            name: _mean_of([note["members"][name] for note in full], prefixes)
            for name in full[0]["members"]
        }
        found["disagreement"] = {
            name: _weighted([note["disagreement"][name] for note in full], prefixes)
            for name in ("mean", "opposite")
        }
    return found


def _weighted(values: Sequence[float], prefixes: Sequence[int]) -> float:
    """Return the mean over all prefixes from each shard's mean and number of prefixes."""
    return float(np.average(values, weights=prefixes))


def _mean_of(parts: Sequence[Mapping[str, Any]], prefixes: Sequence[int]) -> dict[str, Any]:
    """Merge the mean score and the label mass of one guard over all shards."""
    # A shard without any scored response has no label mass.
    known = [
        (part["label_mass"], n)
        for part, n in zip(parts, prefixes, strict=True)
        if part["label_mass"]
    ]
    return {
        "mean_prefix_score": _weighted([part["mean_prefix_score"] for part in parts], prefixes),
        "label_mass": {
            "mean": _weighted([mass["mean"] for mass, _ in known], [n for _, n in known]),
            "min": min(mass["min"] for mass, _ in known),
        }
        if known
        else None,
    }


def _attempts(notes: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Merge attempts to fool the guard by kind, converting rows to indices in the whole data."""
    found: dict[str, Any] = {}
    start = 0
    for note in notes:
        for kind, what in note["attempts"].items():
            known = found.setdefault(kind, {"responses": 0, "rows": []})
            known["responses"] += what["responses"]
            known["rows"] = (known["rows"] + [start + row for row in what["rows"]])[:ROWS_NAMED]
        start += note["rows"]
    return found
