"""Collate rows that the data collator tokenizes (rows with images), with their scores.

These rows are scored as text before training (column `star_text`). The scores are aligned with the
collator's tokens when a batch is made.
"""

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
    """Keep one row for each kind of media, to be added to batches without this kind.

    A batch without images does not run the vision encoder. In a run of several processes those
    with an image would wait there for this one, to gather weights or to all-reduce gradients.
    """

    def __init__(self) -> None:
        self._rows: list[tuple[str, dict[str, Any]]] = []

    def add(self, dataset: Dataset) -> None:
        """Keep the shortest row for each kind of media in a data set with `star_text`."""
        best: dict[str, tuple[int, int]] = {}
        for i, row in enumerate(dataset.with_format(None).select_columns([TEXT_COLUMN])):
            length = (len(row[TEXT_COLUMN]["input_ids"]), i)
            for kind in row[TEXT_COLUMN]["media"]:
                best[kind] = min(length, best.get(kind, length))
        self._rows += [(kind, dataset[i]) for kind, (_, i) in sorted(best.items())]

    def for_batch(self, features: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
        """Return kept rows with the kinds of media that a batch lacks, cut to its columns."""
        there = {kind for row in features for kind in row[TEXT_COLUMN]["media"]}
        found: list[Mapping[str, Any]] = []
        for kind, row in self._rows:
            if kind not in there and features[0].keys() <= row.keys():
                found.append({name: row[name] for name in features[0]})
                there.update(row[TEXT_COLUMN]["media"])
        return found


class RawRowsCollator:
    """Add `star_scores` to the batch that another collator makes of raw rows.

    Labels outside of assistant turns are set to -100: some hosts train the whole conversation,
    image tokens included.

    Args:
        inner: The trainer's collator. It makes one sequence of `input_ids` and `labels` per row.
        alignment: Assigns scores to the collator's tokens.
        known: Digests of the prepared rows; any other row is an error.
        fillers: Rows with media, added untrained to batches without; None in a run of one process.
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
            raise _unscored_error("A row of a batch")
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
                found = self.alignment.transfer(
                    text, _list(input_ids[i], where), _list(given[i], where)
                )
            except StarDSSError as error:
                error.at(rows=(text["row"],))
                raise
            labels[i, where] = torch.tensor(found[0], dtype=labels.dtype)
            scores[i, where] = torch.tensor(found[1])
        return batch | {"labels": labels, SCORES_COLUMN: scores}

    def _collated(self, rows: list[dict[str, Any]], numbers: Sequence[int]) -> dict[str, Any]:
        """Return the inner collator's batch.

        Raises:
            DataError: The processor rejects a row: a file cannot be opened, or the media do not
                match their placeholders in the text. The error names the row if the processor
                rejects it by itself, else all rows of the batch.
        """
        try:
            return dict(self.inner([dict(row) for row in rows]))
        except Exception as error:  # each package that opens media has errors of its own
            for row, number in zip(rows, numbers, strict=True):
                try:
                    self.inner([dict(row)])
                except Exception as own:
                    raise _processor_error(own).at(rows=(number,)) from own
            raise _processor_error(error).at(rows=numbers) from error


def _processor_error(error: Exception) -> DataError:
    said = str(error).rstrip().rstrip(".")
    return DataError(
        f"The data collator cannot make tokens of the row: {type(error).__name__}: {said}. If a "
        "file cannot be opened, check its path and format. If it speaks of truncation or of a "
        "number of tokens, max_length cuts an image: raise it, or leave it out (None)."
    )


def _unscored_error(which: str) -> DataError:
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
    """Wrap a trainer's collator so that it adds scores; with an alignment, to raw rows."""
    if alignment is None:
        return TokenColumnsCollator(inner, known)
    return RawRowsCollator(inner, alignment, known, fillers)


def text_of_row(row: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a row's tokens, labels and scores: of a raw row those of its text (`star_text`).

    Raises:
        DataError: The row was not scored.
    """
    text: Mapping[str, Any] = row.get(TEXT_COLUMN, row)
    if "labels" not in text:
        raise _unscored_error(f"A row of the training set (it has {', '.join(row)})")
    return text
