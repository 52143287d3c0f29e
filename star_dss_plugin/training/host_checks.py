"""Reject trainer settings that STAR-DSS does not support, and switch fused losses off."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from accelerate.utils import DistributedType
from transformers import Trainer

from star_dss_plugin.errors import ConfigError
from star_dss_plugin.training.sequence_parallel_checks import unsupported_with_sequence_parallel

if TYPE_CHECKING:
    from star_dss_plugin.training.mixin import StarDSSMixin

__all__ = ["check_arguments", "check_trainer", "expose_logits", "switch_fused_loss_off"]

logger = logging.getLogger(__name__)


def check_arguments(args: Any) -> None:
    """Reject unsupported training arguments that can be found without a trainer.

    Raises:
        ConfigError: The first unsupported setting, why it cannot work and what to change.
    """
    _refuse(
        [
            (
                args.label_smoothing_factor,
                f"label_smoothing_factor is {args.label_smoothing_factor}: smoothing spreads "
                "weight over tokens that no guard has scored",
                "Set label_smoothing_factor=0",
            ),
        ]
    )


def check_trainer(trainer: StarDSSMixin) -> None:
    """Reject settings under which the shaped loss would be wrong or not in effect.

    Includes `check_arguments`.

    Raises:
        ConfigError: The first unsupported setting, why it cannot work and what to change.
    """
    args: Any = trainer.args
    check_arguments(args)
    accelerator = trainer.accelerator
    parallelism = getattr(accelerator, "parallelism_config", None)
    adapters = getattr(trainer.model, "peft_config", {}).values()
    _refuse(
        [
            (
                trainer.compute_loss_func is not None,
                "compute_loss_func is set, and STAR-DSS would replace that loss",
                "Remove one of the two",
            ),
            (
                trainer.model_init is not None,
                "model_init is given, so every call of train would start from another model than "
                "the one that the reference is made of",
                "Pass model instead",
            ),
            (
                getattr(args, "packing", False) and not trainer.packs_scored_rows,
                "the trainer has packed its rows already, and the messages of each, which the "
                "guard must read, are gone",
                "Use StarDSSTrainer, which scores before it packs, or set packing=False",
            ),
            (
                args.n_gpu > 1,
                "several GPUs are visible to one process, for which the Trainer uses "
                "nn.DataParallel",
                "Launch with `accelerate launch`, or make one GPU visible with "
                "CUDA_VISIBLE_DEVICES",
            ),
            (
                bool(adapters) and trainer.get_tp_size() > 1,
                "the model is split by tensor parallelism and trains an adapter: each process "
                "computes a part of the adapter's gradients, and peft (tried: 0.21) does not sum "
                "them, with or without STAR-DSS",
                "Train all weights, or shard the model with FSDP or DeepSpeed instead of tensor "
                "parallelism",
            ),
            (
                getattr(parallelism, "cp_enabled", False),
                "context parallelism (cp_size) splits a response over several devices, which "
                "was not tried: torch's ring attention does not run on a CPU",
                "Set cp_size=1, or split rows with DeepSpeed's sequence parallelism (sp_size)",
            ),
            *unsupported_with_sequence_parallel(trainer),
            (
                accelerator.distributed_type == DistributedType.MEGATRON_LM,
                "Megatron-LM runs the model and its loss itself, without this trainer",
                "Use FSDP, DeepSpeed, plain data parallelism (DDP), or one process",
            ),
            (
                any(getattr(config, "is_prompt_learning", False) for config in adapters),
                "the model uses a prompt-learning adapter, whose virtual tokens have no scores",
                "Use a LoRA adapter or full finetuning",
            ),
            (
                any(getattr(config, "peft_type", None) == "ADALORA" for config in adapters),
                "the model uses AdaLoRA, which adds a term of its own to the loss that is replaced",
                "Use LoRA, DoRA or full finetuning",
            ),
        ]
    )


def _refuse(settings: list[tuple[Any, str, str]]) -> None:
    for condition, why, change in settings:
        if condition:
            raise ConfigError(f"STAR-DSS cannot be used here: {why}. {change}.")


def switch_fused_loss_off(args: Any) -> None:
    """Exclude Liger's fused loss from what `use_liger_kernel` patches; its other kernels stay.

    The fused loss returns one number without per-token values. transformers applies Liger when
    training starts, after this.
    """
    if not getattr(args, "use_liger_kernel", False):
        return
    config = args.liger_kernel_config or {}
    if config.get("fused_linear_cross_entropy") is False:
        return
    args.liger_kernel_config = {**config, "fused_linear_cross_entropy": False}
    logger.warning(
        "STAR-DSS has switched off Liger's fused_linear_cross_entropy, which gives no per-token "
        "log-probabilities; instead the head is applied to a few hundred trained tokens at a time, "
        "so the logits of all tokens are never held at once. Liger's other kernels stay on."
    )


def expose_logits(trainer: Trainer) -> None:
    """Undo the `chunked_nll` of TRL 1.7 to 1.14, which patches `forward` to return no logits.

    To be removed with the support for TRL < 1.15; from 1.15 on TRL's fused LM head returns
    per-token log-probabilities.
    """
    args: Any = trainer.args
    if getattr(args, "loss_type", None) != "chunked_nll":
        return
    assert trainer.model is not None
    for module in trainer.model.modules():
        patched = module.__dict__.get("forward")
        if getattr(patched, "__name__", None) == "_chunked_ce_forward":
            del module.__dict__["forward"]
            args.loss_type = "nll"
