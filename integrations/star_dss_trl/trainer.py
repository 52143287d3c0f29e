"""`StarDSSTrainer`: TRL's `SFTTrainer` with the STAR-DSS loss."""

from __future__ import annotations

from typing import Any

from trl import SFTTrainer

from star_dss_plugin.attachment import set_up
from star_dss_plugin.errors import ConfigError
from star_dss_plugin.training import StarDSSMixin
from star_dss_trl.config import HOST_LOSS_TYPES, StarDSSConfig

__all__ = ["StarDSSTrainer", "refuse_early"]


class StarDSSTrainer(StarDSSMixin, SFTTrainer):  # type: ignore[misc]
    """Trainer for supervised finetuning with the STAR-DSS loss.

    Takes the arguments of [`~trl.SFTTrainer`]. TRL prepares the data sets; then every response is
    scored, once, and the guard is freed. A data set with a `star_scores` column is used as it is.

    Args:
        model: As for `SFTTrainer`.
        args: A [`StarDSSConfig`].
        **kwargs: As for `SFTTrainer`.

    Raises:
        StarDSSError: What was given, why it cannot work and what to change.
    """

    _tag_names = ["trl", "sft", "star-dss"]  # noqa: RUF012 (as TRL declares it)

    def __init__(self, model: Any, args: StarDSSConfig | None = None, **kwargs: Any) -> None:
        if not isinstance(args, StarDSSConfig):
            raise ConfigError(
                f"StarDSSTrainer got args of type {type(args).__name__}. It needs a StarDSSConfig, "
                "which takes everything SFTConfig takes, and the guard: "
                "args=StarDSSConfig(..., guard='qwen3guard-gen-0.6b')."
            )
        if not args.star_dss_active:
            super().__init__(model, args=args, **kwargs)
            return
        refuse_early(args)
        loss_type = args.loss_type
        # SFTTrainer knows its own loss types only. Its plain loss is computed from a forward pass
        # that yields what ours needs: logits (TRL < 1.15) or fused log-probabilities.
        args.loss_type = HOST_LOSS_TYPES[0]
        try:
            super().__init__(model, args=args, **kwargs)
        finally:
            args.loss_type = loss_type
        set_up(self, args)


def refuse_early(args: StarDSSConfig) -> None:
    """Settings that would make SFTTrainer itself fail with an error that does not name us."""
    if args.packing or args.eval_packing or args.padding_free:
        raise ConfigError(
            "STAR-DSS cannot be used with packing or padding_free yet: joining rows leaves their "
            "scores behind. Set packing=False, eval_packing=False and padding_free=False."
        )
    if args.use_liger_kernel:
        raise ConfigError(
            "STAR-DSS cannot be used with use_liger_kernel: it fuses the loss into the model and "
            "gives no per-token log-probabilities to weigh. Set use_liger_kernel=False."
        )
