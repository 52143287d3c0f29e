"""Data that is tokenized in the collator: scored before training as text, laid onto tokens late."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from star_dss_plugin.data.alignment import Alignment
from star_dss_plugin.data.columns import SCORES_COLUMN, TEXT_COLUMN
from star_dss_plugin.errors import DataError, StarDSSError
from star_dss_plugin.logprobs import IGNORE_INDEX
from star_dss_plugin.training.collation import TokenColumnsCollator
from star_dss_plugin.training.known_rows import KnownRows

__all__ = ["LateCollator", "scored_collator", "text_of_row"]

Collator = Callable[[list[Any]], Mapping[str, Any]]


class LateCollator:
    """Let another collator make a batch of raw rows, then add `star_scores` to it.

    Its labels are kept where an assistant speaks, and are -100 elsewhere: some hosts train all of a
    conversation, images included.

    Args:
        inner: The trainer's collator: one sequence for each row, of `input_ids` and `labels`.
        alignment: Lays scores onto its tokens.
        known: The rows that were prepared: any other one is an error.
    """

    def __init__(self, inner: Collator, alignment: Alignment, known: KnownRows) -> None:
        self.inner = inner
        self.alignment = alignment
        self.known = known

    def __call__(self, features: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        if any(TEXT_COLUMN not in row for row in features):
            raise _unscored("A row of a batch")
        texts = [row[TEXT_COLUMN] for row in features]
        bare = [{k: v for k, v in row.items() if k != TEXT_COLUMN} for row in features]
        batch = dict(self.inner(bare))
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


def _unscored(which: str) -> DataError:
    return DataError(
        f"{which} was not scored when STAR-DSS was set up. Give the data to the trainer's "
        "constructor."
    )


def _list(row: Tensor, where: Tensor) -> list[int]:
    found: list[int] = row[where].tolist()
    return found


def scored_collator(
    inner: Collator, known: KnownRows, alignment: Alignment | None
) -> TokenColumnsCollator | LateCollator:
    """Return a trainer's collator with scores: of tokenized rows, or of raw ones."""
    if alignment is None:
        return TokenColumnsCollator(inner, known)
    return LateCollator(inner, alignment, known)


def text_of_row(row: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return what is known of a row's tokens before it is collated.

    Raises:
        DataError: Nothing is: it has not been scored.
    """
    text: Mapping[str, Any] = row.get(TEXT_COLUMN, row)
    if "labels" not in text:
        raise _unscored(f"A row of the training set (it has {', '.join(row)})")
    return text
