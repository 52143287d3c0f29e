"""Refuse what rows in parts (`sequence_parts`) cannot go with; try how gradients are averaged."""

from __future__ import annotations

from typing import Any

import torch
from accelerate.utils import DistributedType
from torch import nn

from star_dss_plugin.errors import ConfigError, StarDSSError
from star_dss_plugin.training.sequence_parts import (
    balances_experts,
    fixed_length,
    parts_per_row,
)

__all__ = ["check_averaging", "check_resuming", "refused_with_parts"]


def refused_with_parts(trainer: Any) -> list[tuple[Any, str, str]]:
    """Return what cannot go with rows in parts: whether it is there, why, and what to change."""
    size, args = parts_per_row(trainer.accelerator), trainer.args
    if size == 1:
        return []
    config = trainer.model.config.get_text_config()
    layers = set(getattr(config, "layer_types", None) or ["full_attention"])
    window = getattr(config, "sliding_window", None) is not None
    window = window and getattr(config, "use_sliding_window", True)
    packing = any(getattr(args, name, False) for name in ("packing", "padding_free"))
    what = f"sp_size is {size}, and each process has a part of every row"
    without = "or switch sequence parallelism off (sp_size=1)"
    return [
        (
            not trainer.trains_parts,
            f"{what}, which was not tried in {type(trainer).__name__}",
            f"Use StarDSSTrainer, or attach to a plain Trainer, {without}",
        ),
        (
            trainer.accelerator.distributed_type != DistributedType.DEEPSPEED,
            f"{what}, but DeepSpeed, which cuts rows, is not on",
            f"Give accelerate a DeepSpeed configuration, {without}",
        ),
        (
            not _averages_gradients(trainer.accelerator),
            f"{what}; DeepSpeed (tried: 0.19.8) then makes gradients {size} times as large as "
            "they are, unless it is ZeRO-3 that scatters them, in full precision",
            "Set zero_stage to 3, reduce_scatter to true and zero_quantized_gradients to false, "
            f"{without}",
        ),
        (
            packing or (getattr(args, "eval_packing", None) or False),
            f"{what}; its attention takes no mask, so that documents that are joined into one row "
            "would see each other",
            f"Set packing and padding_free to false, {without}",
        ),
        (
            layers != {"full_attention"} or window,
            f"{what}; its attention takes no mask, so that layers that see a window of tokens "
            "would see all of them",
            f"Use a model with full attention in every layer, {without}",
        ),
        (
            getattr(config, "output_router_logits", False) and not balances_experts(trainer.model),
            f"{what}; the load-balancing loss of experts is made of whole rows, and this model "
            "computes it where its parts cannot be put together",
            f"Set router_aux_loss_coef=0, {without}",
        ),
        (
            trainer.media_rows() is not None,
            f"{what}; DeepSpeed's loader cuts every tensor of a batch along its tokens, and can "
            "neither cut images nor say which of them stand in which part",
            f"Give rows of text alone, {without}",
        ),
        (
            (fixed_length(trainer.accelerator) or 0) % size,
            f"{what}, and sp_seq_length is {fixed_length(trainer.accelerator)}, which cannot be "
            "cut into equal parts",
            f"Set sp_seq_length to a multiple of {size}, or sp_seq_length_is_variable to true",
        ),
    ]


def check_resuming(trainer: Any) -> None:
    """Refuse to resume where the rows that a run has read cannot be skipped.

    Raises:
        ConfigError: Rows are in parts, and they shall be.
    """
    if parts_per_row(trainer.accelerator) > 1 and not trainer.args.ignore_data_skip:
        raise ConfigError(
            "A run with sequence parallelism (sp_size) is to be resumed, but the loader with which "
            "DeepSpeed cuts rows can neither skip the rows that were read nor find the order of a "
            "later pass. Set ignore_data_skip=True, which begins with the first pass again and "
            "keeps weights, optimizer and schedule."
        )


def _averages_gradients(accelerator: Any) -> bool:
    """Return whether DeepSpeed averages gradients over all processes, as losses are averaged.

    Elsewhere it divides their sum by the number of groups.
    """
    plugin = getattr(accelerator.state, "deepspeed_plugin", None)
    if plugin is None:
        return False
    zero = plugin.deepspeed_config.get("zero_optimization", {})
    scatters = zero.get("reduce_scatter", True) and not zero.get("zero_quantized_gradients", False)
    return plugin.zero_stage == 3 and bool(scatters)


def check_averaging(engine: Any) -> None:
    """Check on a weight of its own that DeepSpeed averages gradients over all processes.

    Another release may divide their sum by the number of groups everywhere, as 0.19.8 does without
    ZeRO-3: weights would move too far, and no loss would show it.

    Args:
        engine: The trained model as DeepSpeed has wrapped it; all processes must call this.

    Raises:
        StarDSSError: It does not.
    """
    import deepspeed

    probe = nn.Linear(1, 1, bias=False)
    zero = {"stage": engine.zero_optimization_stage(), "stage3_param_persistence_threshold": 0}
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": zero | {"reduce_scatter": engine.zero_reduce_scatter()},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    optimizer = torch.optim.SGD(probe.parameters(), lr=1.0)
    tried, *_ = deepspeed.initialize(
        model=probe, optimizer=optimizer, config=config, mpu=engine.mpu
    )
    try:
        tried.backward(tried(torch.ones(1, 1, device=tried.device)).sum())
        found = float(deepspeed.utils.safe_get_full_grad(probe.weight))
    finally:
        tried.destroy()
    if abs(found - 1) > 1e-3:
        raise StarDSSError(
            f"Training was stopped before the weights changed: this release of DeepSpeed "
            f"({deepspeed.__version__}) makes gradients {found:g} times as large as they are with "
            "sequence parallelism (sp_size). Install a release for which that was tried (0.19.8), "
            "or set sp_size=1."
        )
