"""Carry what a trainer with an active STAR-DSS loss needs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from star_dss_plugin.data.alignment import Alignment
from star_dss_plugin.loss import Shaping
from star_dss_plugin.options import StarDSSOptions
from star_dss_plugin.training.kept_guard import KeptGuard
from star_dss_plugin.training.metrics import TokenMetrics
from star_dss_plugin.training.reference.model import Reference
from star_dss_plugin.training.rows.known_rows import KnownRows
from star_dss_plugin.training.rows.prepare import DatasetSummary
from star_dss_plugin.training.rows.raw_rows import FillerRows
from star_dss_plugin.training.rows.stream import ScoredStream
from star_dss_plugin.training.sharding import Ranks

__all__ = ["StarDSSState"]


@dataclass
class StarDSSState:
    """What a trainer with an active STAR-DSS loss carries.

    Attributes:
        options: The run's options.
        shaping: Scores to weights.
        reference: π_ref.
        prepare: Scores a data set, given its name.
        summaries: What was scored, by data set ("train", "eval", …).
        metrics: Running sums for the log.
        extra_metrics: By full name: what callbacks add to the next training log line.
        shaped: How many training losses were shaped so far.
        projects: Whether the policy's logits can be made a few positions at a time.
        ranks: The processes of the run.
        rows: The rows that were prepared.
        train_dataset: What `summaries["train"]` describes.
        streams: Streams that are scored as they are read.
        kept: The guard that scores them.
        alignment: Lays scores onto tokens in the collator; None: rows are tokenized before.
        fillers: Rows with media for batches without; None: no other process waits for this one.
        outputs_unread: Whether an evaluation step asks for outputs that it does not read.
    """

    options: StarDSSOptions
    shaping: Shaping
    reference: Reference
    prepare: Callable[[Any, str], Any]
    summaries: dict[str, DatasetSummary] = field(default_factory=dict)
    metrics: TokenMetrics = field(default_factory=TokenMetrics)
    extra_metrics: dict[str, float] = field(default_factory=dict)
    shaped: int = 0
    projects: bool = False
    ranks: Ranks = field(default_factory=Ranks)
    rows: KnownRows = field(default_factory=KnownRows)
    train_dataset: Any = None
    streams: list[ScoredStream] = field(default_factory=list)
    kept: KeptGuard | None = None
    alignment: Alignment | None = None
    fillers: FillerRows | None = None
    outputs_unread: bool = False

    @property
    def sharded(self) -> bool:
        """Whether a rank holds a part of each parameter, and gathers it from the others."""
        return self.ranks.sharding is not None

    @property
    def needs_distributions(self) -> bool:
        """Whether the KL term is computed over the whole vocabulary."""
        return self.options.kl_estimator == "full" and self.reference.kind != "none"

    def stream_of(self, dataset: Any) -> ScoredStream | None:
        """Return the stream whose rows a data set gives; None if it is none of them."""
        return next((stream for stream in self.streams if stream.dataset is dataset), None)
