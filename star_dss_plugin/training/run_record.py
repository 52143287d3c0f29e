"""What a run did, in one table when it ends: the first and the last line of its log."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table
from rich.text import Text

from star_dss_plugin.training.prepare import DatasetSummary
from star_dss_plugin.visible import visible

__all__ = ["summary_table"]

_PREFIX = "star_dss/"


def summary_table(
    log_history: Sequence[Mapping[str, Any]], train: DatasetSummary, loss_type: str
) -> Table | None:
    """The loss and every `star_dss/` metric, at the first and at the last logged step.

    Args:
        log_history: What the trainer logged (`trainer.state.log_history`).
        train: What was trained on.
        loss_type: How it was weighted.

    Returns:
        The table; None if no training step with these metrics was logged.
    """
    lines = [
        line
        for line in log_history
        if "loss" in line and any(name.startswith(_PREFIX) for name in line)
    ]
    if not lines:
        return None
    first, last = lines[0], lines[-1]
    names = dict.fromkeys(name for line in lines for name in line if name.startswith(_PREFIX))
    table = Table(
        title=Text(
            f"STAR-DSS: loss_type={loss_type}, guard={visible(train.guard)}, "
            f"{train.responses} responses, {train.below_threshold} of "
            f"{train.trained_tokens} tokens below the threshold"
        ),
        title_justify="left",
    )
    table.add_column("metric")
    for line in (first, last):
        table.add_column(f"step {line.get('step', '?')}", justify="right")
    for name in ("loss", *names):
        values = (line.get(name) for line in (first, last))
        table.add_row(name, *("-" if v is None else f"{v:.4g}" for v in values))
    return table
