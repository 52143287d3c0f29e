"""Prepare a trainer's tokenized data set for the loss: score it, and check the scores."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from types import NoneType
from typing import Any

import numpy as np
from datasets import Dataset, List, Value

from star_dss_plugin.data.columns import SCORES_COLUMN, with_column, without_asked_column
from star_dss_plugin.data.provenance import provenances_of
from star_dss_plugin.data.row_digests import add_row_digests, check_row_digests
from star_dss_plugin.data.rows import plain_rows, restrict_labels
from star_dss_plugin.data.templates.chat import ChatTokenizer
from star_dss_plugin.errors import DataError
from star_dss_plugin.guards.base import Guard
from star_dss_plugin.options import StarDSSOptions
from star_dss_plugin.scoring.ranks import SINGLE_PROCESS, Share
from star_dss_plugin.scoring.scorer import score_dataset
from star_dss_plugin.scoring.strictness import stricter_dataset
from star_dss_plugin.training.rows.summary import DatasetSummary, dataset_summary

__all__ = [
    "check_kind",
    "check_scores",
    "needs_guard",
    "prepare_dataset",
]

logger = logging.getLogger(__name__)


def prepare_dataset(
    dataset: Any,
    chat: ChatTokenizer,
    options: StarDSSOptions,
    *,
    name: str,
    truncation: tuple[int | None, str | None],
    share: Share = SINGLE_PROCESS,
    num_proc: int = 1,
    progress: bool,
    guard: Guard | None = None,
    part: bool = False,
) -> tuple[Dataset, DatasetSummary]:
    """Score a tokenized data set, unless it brings scores, and check the scores.

    Args:
        dataset: The data set, with `input_ids` and `labels`.
        chat: The tokenizer and the chat template that made the tokens.
        options: The run's options.
        name: Name of the data set ("train", "eval", …) for messages.
        truncation: (max_length, truncation_mode) with which the trainer cut `input_ids` and
            `labels`. It does not cut columns that it does not know, such as `star_scores`.
        share: This process's share of the scoring.
        num_proc: Number of processes that render and tokenize rows.
        progress: Whether to show a progress bar.
        guard: The options' guard, already loaded, which stays loaded; None: it is loaded and freed.
        part: Whether these rows are one buffer of a stream, which may lack trained tokens.

    Returns:
        The data set with `star_scores`, and its summary.

    Raises:
        StarDSSError: The data set cannot be used.
    """
    check_kind(dataset, name)
    missing = [c for c in ("input_ids", "labels") if c not in dataset.column_names]
    if missing:
        raise DataError(
            f"The {name} data set lacks {' and '.join(missing)} (it has "
            f"{', '.join(dataset.column_names)}). STAR-DSS needs tokenized text with labels: let "
            "the trainer prepare it, or tokenize it with `star-dss score`. Rows with images need "
            "StarDSSTrainer (TRL) or the plugin (Axolotl)."
        )
    if "seq_lengths" in dataset.column_names and SCORES_COLUMN not in dataset.column_names:
        raise DataError(
            f"The {name} data set is packed already, so the prompt of each response cannot be "
            "recovered. Give it unpacked; packing=True packs its rows after they are scored."
        )
    if SCORES_COLUMN in dataset.column_names:
        if options.guard is not None and not _scored_as_configured(dataset, options):
            logger.warning(
                "The %s data set brings its scores, which are not known to be those of the guard "
                "and the chunks that the options name. They are used, and the guard is not asked. "
                "Remove the column %s to have it scored anew.",
                name,
                SCORES_COLUMN,
            )
        if (other := _probed_around(dataset)) - {options.threshold}:
            logger.warning(
                "The %s data set was scored with trajectory='probed' and the threshold %s, and the "
                "threshold of this run is %s: the guard was not asked about scores near it, so a "
                "probe's score may be on the wrong side. Score with trajectory='exact', or let the "
                "trainer score (`star-dss score` takes 0.5).",
                name,
                " and ".join(map(str, sorted(other))),
                options.threshold,
            )
        given = dataset
        # Scored data trains responses only, but a trainer may have made labels of all tokens since.
        dataset = restrict_labels(dataset, chat, needed=not part)
        check_row_digests(dataset, name)
        dataset = _fit_scores(dataset, name, *truncation)
        changed = dataset is not given
    elif not needs_guard(options, name):
        # So that this mode trains the same tokens as the modes that read scores.
        dataset = restrict_labels(dataset, chat, needed=not part)
        plain = dataset.with_format(None)
        ones = [np.ones(len(ids), dtype=np.float32) for ids in plain["input_ids"]]
        dataset = with_column(dataset, SCORES_COLUMN, ones, List(Value("float32")))
        unread = f"{options.loss_type} reads no scores"
        why = unread if name == "train" or options.score_eval else "score_eval is off"
        return dataset, dataset_summary(dataset, options, f"none ({why})")
    else:
        dataset = score_dataset(
            dataset,
            chat,
            options,
            share=share,
            num_proc=num_proc,
            part=part,
            progress=progress,
            guard=guard or options.guard,
        )
        changed = False
    bare = without_asked_column(dataset)
    dataset = stricter_dataset(bare, chat, options)
    if changed or dataset is not bare:
        add_row_digests(dataset)  # so that the result can be given to another trainer
    return dataset, dataset_summary(dataset, options, None)


def check_kind(dataset: Any, name: str) -> None:
    """Check that a data set is a `datasets.Dataset`, which can be scored before training.

    Args:
        dataset: The trainer's data set.
        name: Name of the data set ("train", "eval", …) for messages.

    Raises:
        DataError: It is of another type.
    """
    if not isinstance(dataset, Dataset):
        raise DataError(
            f"The {name} data set is a {type(dataset).__name__}. STAR-DSS scores a "
            "datasets.Dataset before training and a datasets.IterableDataset while it is read, and "
            "no data set of torch. Convert it, or score it with `star-dss score` and load the "
            "result."
        )


def _scored_as_configured(dataset: Dataset, options: StarDSSOptions) -> bool:
    """Return whether a data set's provenance has the guard and the chunks that the options name."""
    noted = provenances_of(dataset)
    guard = options.guard if isinstance(options.guard, str) else None
    told = (options.segmenter, options.chunk_size)
    return bool(noted) and all(
        (one["segmenter"], one["chunk_size"]) == told and guard in (None, one["guard"])
        for one in noted
    )


def _probed_around(dataset: Dataset) -> set[float]:
    """Return the thresholds near which a guard was asked although a probe gave other scores."""
    found = (one.get("probes") for one in provenances_of(dataset))
    probes = [probe for many in found if isinstance(many, list) for probe in many]
    known = (probe.get("threshold") for probe in probes if isinstance(probe, dict))
    return {threshold for threshold in known if isinstance(threshold, float)}


def needs_guard(options: StarDSSOptions, name: str) -> bool:
    """Return whether a guard scores a data set ("train", "eval", …) that brings no scores."""
    if name != "train" and not options.score_eval:
        return False
    return options.shaping().needs_scores


def _fit_scores(dataset: Dataset, name: str, max_length: int | None, mode: str | None) -> Dataset:
    """Truncate the column `star_scores` as the trainer truncated the tokens, and check each row."""
    column, changed = [], False
    for i, row in enumerate(plain_rows(dataset, ["input_ids", SCORES_COLUMN])):
        length, scores = len(row["input_ids"]), row[SCORES_COLUMN]
        if isinstance(scores, list) and length == max_length and len(scores) > length:
            scores = scores[:length] if mode == "keep_start" else scores[-length:]
            changed = True
        try:
            check_scores(scores, length)
        except DataError as error:
            error.at(file=f"The {name} data set", rows=(i,))
            raise
        column.append(np.asarray(scores, dtype=np.float32))
    return (
        with_column(dataset, SCORES_COLUMN, column, List(Value("float32"))) if changed else dataset
    )


def check_scores(scores: Any, length: int) -> None:
    """Check that one row's `star_scores` are one probability per token.

    Args:
        scores: The row's value of the column.
        length: The row's number of tokens.

    Raises:
        DataError: It is no list of `length` numbers in [0, 1].
    """
    listed = isinstance(scores, Sequence) and not isinstance(scores, str | bytes)
    if not listed or len(scores) != length:
        given = len(scores) if listed else "no list of"
        raise DataError(
            f"the row has {length} tokens and {given} star_scores. There must be one per token of "
            "input_ids: score the data again with this tokenizer and max_length, or remove the "
            "column and set a guard."
        )
    if other := set(map(type, scores)) - {float, int, NoneType}:
        names = " and ".join(sorted(kind.__name__ for kind in other))
        raise DataError(
            f"the row has star_scores that are {names}. They must be numbers in [0, 1]."
        )
    values = np.asarray([np.nan if score is None else score for score in scores], np.float64)
    if not ((values >= 0) & (values <= 1)).all():
        bad = values[~((values >= 0) & (values <= 1))][0]
        raise DataError(f"the row has a star_score of {bad}. Scores are probabilities in [0, 1].")
