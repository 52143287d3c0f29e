"""Find the row on which the loss is checked before training."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from accelerate.data_loader import IterableDatasetShard
from datasets import IterableDataset

from star_dss_plugin.data.columns import REF_COLUMN
from star_dss_plugin.logprobs import IGNORE_INDEX
from star_dss_plugin.training.rows.raw_rows import text_of_row

__all__ = ["shortest_row"]

_FEW = 32
"""Trained rows among which the shortest is taken."""


def shortest_row(
    dataset: Any, buffer: int, read: Callable[[Any], Iterator[Any]], beyond: int = 0
) -> Mapping[str, Any] | None:
    """Return the shortest of the first `_FEW` rows with trained tokens: it needs the least memory.

    Rows with reference log-probabilities come first, because `check_loss` compares these with the
    model's.

    Args:
        dataset: The loader's data set; items may be rows or lists of rows (packs).
        buffer: Rows of a stream that are scored together. Beyond the first buffer, which is scored
            already, a stream is read only if that has no row with trained tokens.
        read: Reads a stream, with its errors.
        beyond: Prefer rows of more tokens than this; if there are none, the longest row.

    Returns:
        The row; None if no row has a trained token.
    """
    if isinstance(dataset, IterableDatasetShard):
        dataset = dataset.dataset  # so that all processes read, and score, the same rows
    if isinstance(dataset, IterableDataset | torch.utils.data.IterableDataset):
        packs = (item if isinstance(item, list) else [item] for item in read(dataset))
        rows = itertools.chain.from_iterable(packs)
        found = list(_trained(itertools.islice(rows, buffer), _FEW)) or list(_trained(rows, 1))
    else:
        found = list(_trained((dataset[i] for i in range(len(dataset))), _FEW))

    def order(row: Mapping[str, Any]) -> tuple[bool, bool, int]:
        length = len(text_of_row(row)["input_ids"])
        short = length <= beyond
        return not any(row.get(REF_COLUMN, ())), short, -length if short else length

    return min(found, key=order, default=None)


def _trained(rows: Iterable[Mapping[str, Any]], most: int) -> Iterator[Mapping[str, Any]]:
    """Yield the first rows that have a trained token, at most `most` of them."""
    trained = (
        row
        for row in rows
        if any(label != IGNORE_INDEX for label in text_of_row(row)["labels"][1:])
    )
    return itertools.islice(trained, most)
