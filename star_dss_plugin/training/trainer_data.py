"""Prepare a trainer's data sets: tokenized rows, streams, and rows that the collator tokenizes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from datasets import Dataset, IterableDataset
from torch import nn
from transformers import PreTrainedTokenizerBase, Trainer

from star_dss_plugin.data.cache import default_cache_dir
from star_dss_plugin.data.columns import REF_COLUMN, SCORES_COLUMN
from star_dss_plugin.data.media_rows import MediaRows, with_text_column
from star_dss_plugin.data.templates.chat import ChatTokenizer
from star_dss_plugin.errors import ConfigError
from star_dss_plugin.loss import Shaping
from star_dss_plugin.options import StarDSSOptions
from star_dss_plugin.scoring.ranks import Share
from star_dss_plugin.training.kept_guard import KeptGuard
from star_dss_plugin.training.mixin import StarDSSMixin
from star_dss_plugin.training.reference.column import add_reference_logps, has_reference_logps
from star_dss_plugin.training.reference.model import Reference
from star_dss_plugin.training.rows.known_rows import KnownRows
from star_dss_plugin.training.rows.prepare import check_kind, needs_guard, prepare_dataset
from star_dss_plugin.training.rows.stream import ScoredStream
from star_dss_plugin.training.rows.summary import DatasetSummary
from star_dss_plugin.training.sharding import Ranks

__all__ = ["prepare_raw", "prepare_rows", "prepare_stream"]


def prepare_rows(
    trainer: StarDSSMixin,
    options: StarDSSOptions,
    tokenizer: PreTrainedTokenizerBase,
    shaping: Shaping,
    reference: Reference,
    ranks: Ranks,
    dataset: Any,
    name: str,
) -> tuple[Dataset, DatasetSummary]:
    """Score and pack a data set; add `ref_logps` if the reference is precomputed.

    Every rank must call this.

    Returns:
        The data set, and the summary of its scores.
    """
    args, policy = trainer.args, trainer.model
    assert policy is not None
    if reference.kind != "precomputed" and isinstance(dataset, Dataset):
        dataset = dataset.remove_columns([c for c in dataset.column_names if c == REF_COLUMN])
    progress = not args.disable_tqdm and ranks.share.rank == 0
    dataset, summary = prepare_dataset(
        dataset,
        _chat(trainer, tokenizer),
        options,
        name=name,
        truncation=_truncation(trainer),
        share=ranks.share,
        num_proc=getattr(args, "dataset_num_proc", None) or 1,
        progress=progress,
    )
    # Scored before it is packed, because packing drops the messages.
    with args.main_process_first(desc=f"STAR-DSS packing of {name}"):
        dataset = trainer.pack(dataset, evaluation=name != "train")
    # If one rank must compute it, all do: they wait for each other.
    if reference.kind == "precomputed" and not all(
        ranks.gather(has_reference_logps(dataset, reference, shaping))
    ):
        if reference.model is None and _has_moved(trainer, policy, reference, ranks):
            raise ConfigError(
                f"The {name} data set came after training had started, and the reference "
                "(the model as it starts, or a named one) is in memory no longer. Pass the data "
                "set to the trainer's constructor as eval_dataset, or set reference='copy' (or "
                "'adapter')."
            )
        dataset = add_reference_logps(
            dataset,
            reference,
            policy,
            shaping,
            pad_token_id=int(tokenizer.pad_token_id or 0),
            cache_dir=Path(options.score_cache_dir or default_cache_dir()),
            autocast=trainer.accelerator.autocast,
            precision=str(trainer.accelerator.mixed_precision),
            ranks=ranks,
            progress=progress,
        )
    return dataset, summary


def _chat(trainer: Trainer, tokenizer: PreTrainedTokenizerBase) -> ChatTokenizer:
    """Return the tokenizer with TRL's chat template, which may not be the tokenizer's own."""
    return ChatTokenizer(tokenizer, getattr(trainer, "chat_template", None))


def _truncation(trainer: Trainer) -> tuple[int | None, str | None]:
    """Return (max_length, truncation_mode) with which TRL truncated rows."""
    args = trainer.args
    return getattr(args, "max_length", None), getattr(args, "truncation_mode", None)


def prepare_stream(
    trainer: StarDSSMixin,
    options: StarDSSOptions,
    tokenizer: PreTrainedTokenizerBase,
    kept_guard: KeptGuard,
    rows: KnownRows,
    ranks: Ranks,
    dataset: IterableDataset,
    name: str,
) -> ScoredStream:
    """Return a stream whose rows are scored, and packed if the trainer packs, as they are read."""
    chat = trainer.chat_of_streams(_chat(trainer, tokenizer))
    truncation = _truncation(trainer)

    def score(buffer: Dataset, share: Share) -> tuple[Dataset, DatasetSummary]:
        buffer = buffer.remove_columns([c for c in buffer.column_names if c == REF_COLUMN])
        scored = SCORES_COLUMN in buffer.column_names
        columns = {*buffer.column_names, "labels", SCORES_COLUMN}
        buffer, summary = prepare_dataset(
            buffer,
            chat,
            options,
            name=name,
            truncation=truncation,
            share=share,
            progress=False,
            guard=kept_guard.get() if needs_guard(options, name) and not scored else None,
            part=True,
        )
        # Some collators make tensors of all columns.
        buffer = buffer.remove_columns([c for c in buffer.column_names if c not in columns])
        packed = trainer.pack(buffer, evaluation=name != "train")
        return packed, replace(summary, streamed=True)

    return ScoredStream(dataset, name, options.stream_buffer, score, rows, ranks)


def prepare_raw(
    trainer: StarDSSMixin,
    options: StarDSSOptions,
    media: MediaRows,
    ranks: Ranks,
    dataset: Any,
    name: str,
) -> tuple[Dataset, Dataset, DatasetSummary]:
    """Score rows that the data collator tokenizes, by their rendered text.

    Returns:
        The raw rows with `star_text`; the scored rows of text; and the summary of the scores.
    """
    check_kind(dataset, name)
    scored, summary = prepare_dataset(
        media.text_rows(dataset, name),
        media.chat,
        options,
        name=name,
        truncation=(None, None),
        share=ranks.share,
        num_proc=getattr(trainer.args, "dataset_num_proc", None) or 1,
        progress=not trainer.args.disable_tqdm and ranks.share.rank == 0,
    )
    return with_text_column(dataset, scored), scored, summary


def _has_moved(
    trainer: StarDSSMixin, policy: nn.Module, reference: Reference, ranks: Ranks
) -> bool:
    """Return whether the trained model may differ from the reference: it was trained or sharded.

    A sharded model's fingerprint cannot be computed, and the model cannot be run on one rank.
    """
    if ranks.sharding is not None and trainer.accelerator._models:
        return True
    return ranks.fingerprint(policy) != reference.fingerprint
