"""Reject settings that streams do not support, and adapt the data loader's settings to streams."""

from __future__ import annotations

import logging
from typing import Any

from star_dss_plugin.errors import ConfigError, DataError
from star_dss_plugin.options import StarDSSOptions

__all__ = ["check_stream", "read_in_this_process"]

logger = logging.getLogger(__name__)


def check_stream(name: str, options: StarDSSOptions, *, raw: bool = False) -> None:
    """Reject options for which all rows must be available before training.

    Args:
        name: Name of the stream ("train", "eval", …) for messages.
        options: The run's options.
        raw: Whether the data collator tokenizes the rows.

    Raises:
        StarDSSError: An option that a stream does not support.
    """
    if raw:
        raise DataError(
            f"The {name} data set is a stream of rows that the data collator tokenizes (rows with "
            "images), and these are scored before training. Load it with streaming=False."
        )
    if options.trajectory == "probed":
        raise ConfigError(
            f"trajectory is 'probed' and the {name} data set is a stream: a probe learns from a "
            "sample of all the data, which cannot be drawn from a stream. Use trajectory='exact' "
            "or 'adaptive', or score the data beforehand with star-dss score."
        )
    if options.reference == "precomputed" and options.shaping().needs_reference:
        raise ConfigError(
            f"reference is 'precomputed' and the {name} data set is a stream, for whose rows "
            "nothing can be computed before training. Set reference='auto' (the base model under "
            "an adapter, or a frozen copy of the trained parameters), or name the model as it "
            "starts."
        )


def read_in_this_process(trainer: Any) -> None:
    """Make each training process read streams itself: no loader workers, no dispatched batches.

    The data loader's workers have no guard, and with `dispatch_batches` one process would read and
    pad the batches of all others. A change of `dataloader_num_workers` is logged.
    """
    args = trainer.args
    if args.dataloader_num_workers:
        logger.warning(
            "dataloader_num_workers is %d and taken for 0: the rows of a stream are scored in the "
            "process that trains.",
            args.dataloader_num_workers,
        )
    args.dataloader_num_workers = 0
    args.dataloader_prefetch_factor = None
    args.dataloader_persistent_workers = False
    args.accelerator_config.dispatch_batches = False
    trainer.accelerator.dataloader_config.dispatch_batches = False
