"""Sum up a scored data set for the start-up line and the run's record."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from datasets import Dataset

from star_dss_plugin.data.columns import SCORES_COLUMN
from star_dss_plugin.data.provenance import provenances_of
from star_dss_plugin.data.templates.tokenized import trained_runs
from star_dss_plugin.guards.base import display_name
from star_dss_plugin.logprobs import IGNORE_INDEX
from star_dss_plugin.options import StarDSSOptions
from star_dss_plugin.scoring.guard_statistics import COUNTS

__all__ = ["DatasetSummary", "dataset_summary"]


@dataclass(frozen=True)
class DatasetSummary:
    """Hold statistics of a scored data set, for the start-up line and the run's record.

    Attributes:
        rows: Number of rows.
        responses: Number of runs of trained tokens.
        trained_tokens: Number of trained tokens.
        below_threshold: Number of trained tokens with a score below τ.
        mean_score: Mean score of the trained tokens; 1 if there are none.
        guard: Name of the guard that scored it, as messages show it.
        provenance: The data set's provenance note; None if it has none.
        streamed: Whether these are the rows read so far from a stream.
    """

    rows: int
    responses: int
    trained_tokens: int
    below_threshold: int
    mean_score: float
    guard: str
    provenance: dict[str, Any] | None
    streamed: bool = False

    def merged_with(self, other: DatasetSummary) -> DatasetSummary:
        """Return the summary of these rows and of further rows of the same data set."""
        tokens = self.trained_tokens + other.trained_tokens
        total = sum(one.mean_score * one.trained_tokens for one in (self, other))
        # Some rows may have brought scores by another guard.
        guards = dict.fromkeys((*self.guard.split(" and "), *other.guard.split(" and ")))
        return replace(
            self,
            guard=" and ".join(guards),
            rows=self.rows + other.rows,
            responses=self.responses + other.responses,
            trained_tokens=tokens,
            below_threshold=self.below_threshold + other.below_threshold,
            mean_score=total / tokens if tokens else 1.0,
            provenance=_merged_note(self.provenance, other.provenance),
        )


_NAMES = (
    "guard",
    "demonstration_guard",
    "guard_identity",
    "segmenter",
    "chunk_size",
    "tokenizer",
    "versions",
)


def _merged_note(
    first: dict[str, Any] | None, other: dict[str, Any] | None
) -> dict[str, Any] | None:
    """Merge the provenance notes of two parts of a data set: names of the first, counts summed."""
    if first is None or other is None:
        return first
    counts = {name: first[name] + other[name] for name in COUNTS if name in first and name in other}
    return {name: first[name] for name in _NAMES if name in first} | counts


def dataset_summary(dataset: Dataset, options: StarDSSOptions, guard: str | None) -> DatasetSummary:
    """Return statistics of a scored data set.

    Args:
        dataset: The data set, with `labels` and `star_scores`.
        options: The run's options.
        guard: Name of its guard; None: the names in its provenance notes.
    """
    known = provenances_of(dataset)
    provenance = known[0] if known else None
    if guard is None:
        names = dict.fromkeys(one["guard"] for one in known)
        guard = display_name(
            " and ".join(names) or "unknown (star_scores column given)",
            any(one["demonstration_guard"] for one in known),
        )
    responses = tokens = below = 0
    total = 0.0
    plain = dataset.with_format(None).select_columns(["labels", SCORES_COLUMN])
    for row in plain:
        trained = np.asarray(row["labels"]) != IGNORE_INDEX
        scores = np.asarray(row[SCORES_COLUMN])[trained]
        responses += len(trained_runs(row["labels"]))
        tokens += len(scores)
        below += int((scores < options.threshold).sum())
        total += float(scores.sum())
    # A buffer of a stream may have no trained token.
    mean = total / tokens if tokens else 1.0
    return DatasetSummary(len(dataset), responses, tokens, below, mean, guard, provenance)
