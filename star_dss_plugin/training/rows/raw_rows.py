"""Data that is tokenized in the collator: scored before training as text, laid onto tokens late."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor

from star_dss_plugin.data.alignment import Alignment
from star_dss_plugin.data.columns import SCORES_COLUMN, TEXT_COLUMN
from star_dss_plugin.errors import DataError, StarDSSError
from star_dss_plugin.logprobs import IGNORE_INDEX
from star_dss_plugin.training.rows.collation import TokenColumnsCollator
from star_dss_plugin.training.rows.known_rows import KnownRows

__all__ = ["FillerRows", "RawRowsCollator", "scored_collator", "text_of_row"]

Collator = Callable[[list[Any]], Mapping[str, Any]]


class FillerRows:
    """Keep a row with each kind of media, for batches that have none of it.

    A batch without images does not pass through the part of the model that reads images. Where
    several processes compute a step together, those that do pass through it would wait for this
    one: each gathers weights, or sums gradients, with all others.
    """

    def __init__(self) -> None:
        self._rows: list[tuple[str, dict[str, Any]]] = []

    def add(self, dataset: Dataset) -> None:
        """Keep the shortest row of each kind of a data set with `star_text`."""
        best: dict[str, tuple[int, int]] = {}
        for i, row in enumerate(dataset.with_format(None).select_columns([TEXT_COLUMN])):
            length = (len(row[TEXT_COLUMN]["input_ids"]), i)
            for kind in row[TEXT_COLUMN]["media"]:
                best[kind] = min(length, best.get(kind, length))
        self._rows += [(kind, dataset[i]) for kind, (_, i) in sorted(best.items())]

    def for_batch(self, features: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
        """Return rows with the media that a batch lacks and rows of its columns have."""
        there = {kind for row in features for kind in row[TEXT_COLUMN]["media"]}
        found: list[Mapping[str, Any]] = []
        for kind, row in self._rows:
            if kind not in there and features[0].keys() <= row.keys():
                found.append({name: row[name] for name in features[0]})
                there.update(row[TEXT_COLUMN]["media"])
        return found


class RawRowsCollator:
    """Let another collator make a batch of raw rows, then add `star_scores` to it.

    Its labels are kept where an assistant speaks, and are -100 elsewhere: some hosts train all of a
    conversation, images included.

    Args:
        inner: The trainer's collator: one sequence for each row, of `input_ids` and `labels`.
        alignment: Lays scores onto its tokens.
        known: The rows that were prepared: any other one is an error.
        fillers: Rows with media; they are added to batches without and train nothing. None: no
            other process waits for this one.
    """

    def __init__(
        self,
        inner: Collator,
        alignment: Alignment,
        known: KnownRows,
        fillers: FillerRows | None = None,
    ) -> None:
        self.inner = inner
        self.alignment = alignment
        self.known = known
        self.fillers = fillers

    def __call__(self, features: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        if any(TEXT_COLUMN not in row for row in features):
            raise _unscored("A row of a batch")
        texts = [row[TEXT_COLUMN] for row in features]
        if self.fillers is not None:
            features = [*features, *self.fillers.for_batch(features)]
        bare = [{k: v for k, v in row.items() if k != TEXT_COLUMN} for row in features]
        batch = self._collated(bare, [row[TEXT_COLUMN]["row"] for row in features])
        missing = [name for name in ("input_ids", "labels") if name not in batch]
        if missing or len(batch["input_ids"]) != len(features):
            raise DataError(
                "The data collator does not make one sequence of tokens with labels of each row "
                f"(it made {sorted(batch)}). STAR-DSS needs one that does not join rows here: set "
                "packing=False (Axolotl: sample_packing: false)."
            )
        input_ids = batch["input_ids"]
        given = batch["labels"]
        real = batch.get("attention_mask", torch.ones_like(input_ids)) != 0
        labels = torch.full_like(given, IGNORE_INDEX)
        scores = torch.ones(input_ids.shape, dtype=torch.float32)
        for i, text in enumerate(texts):
            self.known.check(text)
            where = real[i].nonzero()[:, 0]
            try:
                found = self.alignment.lay(text, _list(input_ids[i], where), _list(given[i], where))
            except StarDSSError as error:
                error.at(rows=(text["row"],))
                raise
            labels[i, where] = torch.tensor(found[0], dtype=labels.dtype)
            scores[i, where] = torch.tensor(found[1])
        return batch | {"labels": labels, SCORES_COLUMN: scores}

    def _collated(self, rows: list[dict[str, Any]], numbers: Sequence[int]) -> dict[str, Any]:
        """Return the inner collator's batch.

        Raises:
            DataError: The processor refuses a row (it compares the media with their places in the
                text, and opens them), with the row's number if it does so of the row alone.
        """
        try:
            return dict(self.inner([dict(row) for row in rows]))
        except Exception as error:  # each package that opens media has errors of its own
            for row, number in zip(rows, numbers, strict=True):
                try:
                    self.inner([dict(row)])
                except Exception as own:
                    raise _refused(own).at(rows=(number,)) from own
            raise _refused(error).at(rows=numbers) from error


def _refused(error: Exception) -> DataError:
    said = str(error).rstrip().rstrip(".")
    return DataError(
        f"The data collator cannot make tokens of the row: {type(error).__name__}: {said}. If a "
        "file cannot be opened, check its path and format. If it speaks of truncation or of a "
        "number of tokens, max_length cuts an image: raise it, or leave it out (None)."
    )


def _unscored(which: str) -> DataError:
    return DataError(
        f"{which} was not scored when STAR-DSS was set up. Give the data to the trainer's "
        "constructor."
    )


def _list(row: Tensor, where: Tensor) -> list[int]:
    found: list[int] = row[where].tolist()
    return found


def scored_collator(
    inner: Collator,
    known: KnownRows,
    alignment: Alignment | None,
    fillers: FillerRows | None = None,
) -> TokenColumnsCollator | RawRowsCollator:
    """Return a trainer's collator with scores: of tokenized rows, or of raw ones."""
    if alignment is None:
        return TokenColumnsCollator(inner, known)
    return RawRowsCollator(inner, alignment, known, fillers)


def text_of_row(row: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return what is known of a row's tokens before it is collated.

    Raises:
        DataError: Nothing is: it has not been scored.
    """
    text: Mapping[str, Any] = row.get(TEXT_COLUMN, row)
    if "labels" not in text:
        raise _unscored(f"A row of the training set (it has {', '.join(row)})")
    return text
