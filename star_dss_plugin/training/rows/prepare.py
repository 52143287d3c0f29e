"""A trainer's tokenized data set, made ready for the loss: scored, measured, checked."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from types import NoneType
from typing import Any

import numpy as np
from datasets import Dataset, List, Value

from star_dss_plugin.data.bound_rows import bind_anew, check_bound
from star_dss_plugin.data.columns import SCORES_COLUMN, with_column, without_marks
from star_dss_plugin.data.provenance import provenances_of
from star_dss_plugin.data.responses import runs
from star_dss_plugin.data.rows import only_responses, plain_rows
from star_dss_plugin.data.templates.chat import ChatTokenizer
from star_dss_plugin.errors import DataError
from star_dss_plugin.guards.base import Guard, announced
from star_dss_plugin.logprobs import IGNORE_INDEX
from star_dss_plugin.options import StarDSSOptions
from star_dss_plugin.scoring.ranks import ALONE, Share
from star_dss_plugin.scoring.scorer import score_dataset
from star_dss_plugin.scoring.strictness import stricter_dataset

__all__ = [
    "DatasetSummary",
    "asks_guard",
    "check_kind",
    "check_scores",
    "prepare_dataset",
    "summary_of",
]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class DatasetSummary:
    """What the start-up line says of one data set.

    Attributes:
        rows: Number of rows.
        responses: Number of runs of trained tokens.
        trained_tokens: Number of trained tokens.
        below_threshold: Trained tokens with a score below τ.
        mean_score: Mean score of the trained tokens.
        guard: Who scored it.
        provenance: How, if that is known.
        streamed: Whether these are rows that a stream gave, and there may be more.
    """

    rows: int
    responses: int
    trained_tokens: int
    below_threshold: int
    mean_score: float
    guard: str
    provenance: dict[str, Any] | None
    streamed: bool = False

    def plus(self, more: DatasetSummary) -> DatasetSummary:
        """Return the summary of these rows and of more of the same data set."""
        tokens = self.trained_tokens + more.trained_tokens
        total = sum(one.mean_score * one.trained_tokens for one in (self, more))
        # Some rows may have brought scores that are not of the guard that scored the others.
        guards = dict.fromkeys((*self.guard.split(" and "), *more.guard.split(" and ")))
        return replace(
            self,
            guard=" and ".join(guards),
            rows=self.rows + more.rows,
            responses=self.responses + more.responses,
            trained_tokens=tokens,
            below_threshold=self.below_threshold + more.below_threshold,
            mean_score=total / tokens if tokens else 1.0,
            provenance=_joined(self.provenance, more.provenance),
        )


_COUNTS = (
    "rows",
    "responses",
    "prefixes",
    "trained_tokens",
    "raw_contexts",
    "no_contexts",
    "truncated_contexts",
    "guard_errors",
)
_NAMES = (
    "guard",
    "demonstration_guard",
    "guard_identity",
    "segmenter",
    "chunk_size",
    "tokenizer",
    "versions",
)


def _joined(one: dict[str, Any] | None, more: dict[str, Any] | None) -> dict[str, Any] | None:
    """Return what the notes on two parts of the data say of both: who scored it, and counts."""
    if one is None or more is None:
        return one
    counts = {name: one[name] + more[name] for name in _COUNTS if name in one and name in more}
    return {name: one[name] for name in _NAMES if name in one} | counts


def prepare_dataset(
    dataset: Any,
    chat: ChatTokenizer,
    options: StarDSSOptions,
    *,
    name: str,
    truncation: tuple[int | None, str | None],
    share: Share = ALONE,
    num_proc: int = 1,
    progress: bool,
    guard: Guard | None = None,
    part: bool = False,
) -> tuple[Dataset, DatasetSummary]:
    """Score a tokenized data set, unless it is scored already, and check the scores.

    Args:
        dataset: With `input_ids` and `labels`.
        chat: The tokenizer and the template that made the tokens.
        options: The run's options.
        name: "train", "eval", …: for messages.
        truncation: (max_length, truncation_mode) that the trainer applied to `input_ids` and
            `labels`, and not to columns it does not know.
        share: This process's part of the scoring.
        num_proc: Processes that render and tokenize rows.
        progress: Whether to show a progress bar.
        guard: The guard that the options name, if it is loaded; it stays so.
        part: Whether there are more rows elsewhere, so that none of these need be trained.

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
            f"The {name} data set is packed already, so nobody can tell which context a response "
            "had. Give it unpacked, with packing=True if its rows are to be joined."
        )
    if SCORES_COLUMN in dataset.column_names:
        if options.guard is not None and not _scored_as_told(dataset, options):
            logger.warning(
                "The %s data set brings its scores, which are not known to be those of the guard "
                "and the chunks that the options name. They are used, and the guard is not asked. "
                "Remove the column %s to have it scored anew.",
                name,
                SCORES_COLUMN,
            )
        given = dataset
        # Whoever scored it trained responses only; labels made since then may train all tokens.
        dataset = only_responses(dataset, chat, needed=not part)
        check_bound(dataset, name)
        dataset = _fit_scores(dataset, name, *truncation)
        changed = dataset is not given
    elif not asks_guard(options, name):
        # The same tokens are trained as in the modes that read scores.
        dataset = only_responses(dataset, chat, needed=not part)
        plain = dataset.with_format(None)
        ones = [np.ones(len(ids), dtype=np.float32) for ids in plain["input_ids"]]
        dataset = with_column(dataset, SCORES_COLUMN, ones, List(Value("float32")))
        unread = f"{options.loss_type} reads no scores"
        why = unread if name == "train" or options.score_eval else "score_eval is off"
        return dataset, summary_of(dataset, options, f"none ({why})")
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
    bare = without_marks(dataset)
    dataset = stricter_dataset(bare, chat, options)
    if changed or dataset is not bare:
        bind_anew(dataset)  # so that the result can be given to another trainer
    return dataset, summary_of(dataset, options, None)


def check_kind(dataset: Any, name: str) -> None:
    """Check that a data set can be scored before training.

    Args:
        dataset: What the trainer was given.
        name: "train", "eval", …: for messages.

    Raises:
        DataError: It is not one of the library `datasets` whose rows are there.
    """
    if not isinstance(dataset, Dataset):
        raise DataError(
            f"The {name} data set is a {type(dataset).__name__}. STAR-DSS scores rows of a "
            "datasets.Dataset, or of a datasets.IterableDataset as they come: not of a torch one. "
            "Convert it, or score it with `star-dss score` and load the result."
        )


def _scored_as_told(dataset: Dataset, options: StarDSSOptions) -> bool:
    """Whether the scores of a data set are noted to be what its options would give."""
    noted = provenances_of(dataset)
    guard = options.guard if isinstance(options.guard, str) else None
    told = (options.segmenter, options.chunk_size)
    return bool(noted) and all(
        (one["segmenter"], one["chunk_size"]) == told and guard in (None, one["guard"])
        for one in noted
    )


def asks_guard(options: StarDSSOptions, name: str) -> bool:
    """Whether a data set ("train", "eval", …) without scores gets some."""
    if name != "train" and not options.score_eval:
        return False
    return options.shaping().needs_scores


def _fit_scores(dataset: Dataset, name: str, max_length: int | None, mode: str | None) -> Dataset:
    """Cut a `star_scores` column as the trainer cut the tokens, and check it row by row."""
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
    """Check one row's `star_scores`.

    Args:
        scores: What the row has.
        length: Its number of tokens.

    Raises:
        DataError: They are not `length` probabilities.
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


def summary_of(dataset: Dataset, options: StarDSSOptions, guard: str | None) -> DatasetSummary:
    """Sum a scored data set up; `guard` names its guard where no provenance does."""
    known = provenances_of(dataset)
    provenance = known[0] if known else None
    if guard is None:
        names = dict.fromkeys(one["guard"] for one in known)
        guard = announced(
            " and ".join(names) or "unknown (star_scores column given)",
            any(one["demonstration_guard"] for one in known),
        )
    responses = tokens = below = 0
    total = 0.0
    plain = dataset.with_format(None).select_columns(["labels", SCORES_COLUMN])
    for row in plain:
        trained = np.asarray(row["labels"]) != IGNORE_INDEX
        scores = np.asarray(row[SCORES_COLUMN])[trained]
        responses += len(runs(row["labels"]))
        tokens += len(scores)
        below += int((scores < options.threshold).sum())
        total += float(scores.sum())
    # Without a trained token, which a part of the data may be, nothing is unsafe.
    mean = total / tokens if tokens else 1.0
    return DatasetSummary(len(dataset), responses, tokens, below, mean, guard, provenance)
