"""Define the state that STAR-DSS adds to a trainer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from star_dss_plugin.data.alignment import Alignment
from star_dss_plugin.errors import ConfigError
from star_dss_plugin.loss import Shaping
from star_dss_plugin.options import StarDSSOptions
from star_dss_plugin.training.kept_guard import KeptGuard
from star_dss_plugin.training.metrics import TokenMetrics
from star_dss_plugin.training.reference.model import Reference
from star_dss_plugin.training.rows.known_rows import KnownRows
from star_dss_plugin.training.rows.raw_rows import FillerRows
from star_dss_plugin.training.rows.stream import ScoredStream
from star_dss_plugin.training.rows.summary import DatasetSummary
from star_dss_plugin.training.sharding import Ranks

__all__ = ["StarDSSState", "check_options_unchanged"]


@dataclass
class StarDSSState:
    """Hold the state of a trainer whose STAR-DSS loss is active.

    Attributes:
        options: The run's options.
        shaping: Maps scores to weights.
        reference: π_ref.
        prepare: Takes a data set and its name ("train", "eval", …); returns it scored.
        summaries: Statistics of the scored data, by name of the data set.
        metrics: Running sums for the log.
        extra_metrics: Values that callbacks add to the next training log line, by full name.
        shaped: Number of training losses shaped so far.
        projects: Whether the policy's logits can be computed a few positions at a time.
        ranks: The ranks of the run.
        rows: Digests of the rows that were prepared.
        train_dataset: The data set that `summaries["train"]` describes.
        streams: The streams that are scored as they are read.
        kept_guard: The guard that scores them.
        alignment: Assigns scores to tokens in the data collator; None if rows come tokenized.
        fillers: Rows with media to add to batches without; None in a run of one process.
        given: The options in the trainer's arguments at set-up; empty if these have none.
        outputs_unread: Whether the running evaluation step drops the outputs that it asks for.
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
    kept_guard: KeptGuard | None = None
    alignment: Alignment | None = None
    fillers: FillerRows | None = None
    given: dict[str, Any] = field(default_factory=dict)
    outputs_unread: bool = False

    @property
    def sharded(self) -> bool:
        """Whether each rank holds a shard of the parameters during training."""
        return self.ranks.sharding is not None

    @property
    def needs_distributions(self) -> bool:
        """Whether the KL term is computed over the whole vocabulary."""
        return self.options.kl_estimator == "full" and self.reference.kind != "none"

    def stream_of(self, dataset: Any) -> ScoredStream | None:
        """Return the `ScoredStream` that a data set belongs to; None if there is none."""
        return next((stream for stream in self.streams if stream.dataset is dataset), None)


def check_options_unchanged(args: Any, state: StarDSSState | None) -> None:
    """Check that a trainer's arguments have the STAR-DSS options that they had at set-up.

    Args:
        args: The trainer's arguments. Only those of a `StarDSSConfig` have options.
        state: The trainer's state; None if its STAR-DSS loss is not active.

    Raises:
        ConfigError: An option was changed since, or a loss type of STAR-DSS was set on a trainer
            that was made without its loss. Neither could have an effect any more.
    """
    if not isinstance(args, StarDSSOptions):
        return
    if state is not None:
        changed = [
            f"{name} to {value!r}"
            for name, value in args.star_dss_dict().items()
            if state.given.get(name, value) != value
        ]
    else:
        shaped = getattr(args, "star_dss_active", False)
        changed = [f"loss_type to {args.loss_type!r}"] if shaped else []
    if changed:
        raise ConfigError(
            f"The trainer's arguments were changed since it was made: {', '.join(changed)}. That "
            "has no effect, because data, reference and loss were set up before. Set options "
            "before the trainer is made, and make a new trainer."
        )
