"""Reject settings that sequence parallelism does not support; check how gradients are averaged."""

from __future__ import annotations

from typing import Any

import torch
from accelerate.utils import DistributedType
from torch import nn

from star_dss_plugin.errors import ConfigError, StarDSSError
from star_dss_plugin.training.sequence_parallel import (
    can_balance_over_group,
    fixed_length,
    sequence_parallel_size,
)

__all__ = ["check_averaging", "check_resuming", "unsupported_with_sequence_parallel"]


def unsupported_with_sequence_parallel(trainer: Any) -> list[tuple[Any, str, str]]:
    """Return the settings that sequence parallelism does not support as (is set, reason, remedy).

    Empty without sequence parallelism.
    """
    size, args = sequence_parallel_size(trainer.accelerator), trainer.args
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
            not trainer.supports_sequence_parallel,
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
            "they should be, except with ZeRO-3 that reduce-scatters them in full precision",
            "Set zero_stage to 3, reduce_scatter to true and zero_quantized_gradients to false, "
            f"{without}",
        ),
        (
            packing or (getattr(args, "eval_packing", None) or False),
            f"{what}; its attention takes no mask, so documents that are packed into one row "
            "would see each other",
            f"Set packing and padding_free to false, {without}",
        ),
        (
            layers != {"full_attention"} or window,
            f"{what}; its attention takes no mask, so layers that attend to a window of tokens "
            "would attend to all of them",
            f"Use a model with full attention in every layer, {without}",
        ),
        (
            getattr(config, "output_router_logits", False)
            and not can_balance_over_group(trainer.model),
            f"{what}; the load-balancing loss of experts is computed over whole rows, and in this "
            "model it cannot be: its module has no load_balancing_loss_func to replace",
            f"Set router_aux_loss_coef=0, {without}",
        ),
        (
            trainer.media_rows() is not None,
            f"{what}; DeepSpeed's loader cuts every tensor of a batch along its tokens, and can "
            "neither cut images nor assign each image to a part",
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
    """Reject resuming where transformers would have to skip the batches that were read before.

    Raises:
        ConfigError: Sequence parallelism is on, and `ignore_data_skip` is off.
    """
    if sequence_parallel_size(trainer.accelerator) > 1 and not trainer.args.ignore_data_skip:
        raise ConfigError(
            "A run with sequence parallelism (sp_size) is to be resumed, but the loader with which "
            "DeepSpeed cuts rows can neither skip the rows that were read nor find the order of a "
            "later pass. Set ignore_data_skip=True, which begins with the first pass again and "
            "keeps weights, optimizer and schedule."
        )


def _averages_gradients(accelerator: Any) -> bool:
    """Return whether DeepSpeed's settings are those with which it averages over all processes.

    With other settings DeepSpeed 0.19.8 divides the sum of gradients by the number of
    sequence-parallel groups.
    """
    plugin = getattr(accelerator.state, "deepspeed_plugin", None)
    if plugin is None:
        return False
    zero = plugin.deepspeed_config.get("zero_optimization", {})
    scatters = zero.get("reduce_scatter", True) and not zero.get("zero_quantized_gradients", False)
    return plugin.zero_stage == 3 and bool(scatters)


def check_averaging(engine: Any) -> None:
    """Check with a model of one weight that DeepSpeed averages gradients over all processes.

    Another release may divide their sum by the number of sequence-parallel groups also with ZeRO-3,
    as 0.19.8 does without it. Gradients would be too large, and no loss would show it.

    Args:
        engine: The trained model as DeepSpeed has wrapped it; all processes must call this.

    Raises:
        StarDSSError: The gradient is another multiple of the average.
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
            f"({deepspeed.__version__}) makes gradients {found:g} times as large as they should be "
            "with sequence parallelism (sp_size). Install a release that was tried (0.19.8), or "
            "set sp_size=1."
        )
