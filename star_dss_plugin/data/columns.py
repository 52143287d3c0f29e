"""Name the columns of STAR-DSS, and add columns so that equal contents give equal files."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from datasets import Dataset, List, Value
from numpy.typing import NDArray

__all__ = [
    "ASKED_COLUMN",
    "MOVED_COLUMNS",
    "REF_COLUMN",
    "SCORES_COLUMN",
    "TEXT_COLUMN",
    "TOKEN_COLUMNS",
    "with_attention_mask",
    "with_column",
    "without_marks",
]

SCORES_COLUMN = "star_scores"
"""The STAR score s_t of every token of `input_ids`: float32 in [0, 1], 1.0 outside responses."""
REF_COLUMN = "ref_logps"
"""log π_ref(y_t) of every token of `input_ids`: float32, 0.0 where it is not needed."""
ASKED_COLUMN = "star_asked"
"""Whether the guard gave the score of each token of `input_ids`: bool, False where a probe did. It
is there with `trajectory="probed"` alone, for reports; training leaves it out.
"""
MOVED_COLUMNS = {name: f"shift_{name}" for name in (SCORES_COLUMN, REF_COLUMN)}
"""In batches that are cut into parts of rows: the same, of the token behind each position."""
TOKEN_COLUMNS = (SCORES_COLUMN, REF_COLUMN, *MOVED_COLUMNS.values())
TEXT_COLUMN = "star_text"
"""A row that a collator tokenizes, as text: its number, tokens, labels and `star_scores`."""


def with_column(dataset: Dataset, name: str, column: Sequence[Any], feature: Any) -> Dataset:
    """Add or replace a column of per-token lists.

    Args:
        dataset: The rows.
        name: The column's name.
        column: One list or array per row.
        feature: Its type.

    Returns:
        A data set whose fingerprint depends on its contents alone, never on time or chance.
    """
    if name in dataset.column_names:
        dataset = dataset.remove_columns(name)
    digest = hashlib.sha256(f"{dataset._fingerprint}:{name}:{feature}".encode())
    arrays = list(map(np.asarray, column))
    for array in arrays:
        digest.update(f"{array.dtype}:{array.shape}".encode() + array.tobytes())
    made = _in_one_piece(arrays)
    return dataset.add_column(
        name,
        column if made is None else made,
        new_fingerprint=digest.hexdigest()[:16],
        feature=feature,
    )


def _in_one_piece(arrays: Sequence[NDArray[Any]]) -> pa.ListArray | None:
    """Return rows of numbers as Arrow has them, at a fraction of what it takes to convert each.

    Returns:
        None if they are not all rows of one kind of numbers.
    """
    filled = [array for array in arrays if array.size]
    kinds = {array.dtype for array in filled}
    if len(kinds) != 1 or kinds.pop().kind not in "biuf" or any(a.ndim != 1 for a in arrays):
        return None
    offsets = np.zeros(len(arrays) + 1, np.int64)
    np.cumsum([len(array) for array in arrays], out=offsets[1:])
    if offsets[-1] > np.iinfo(np.int32).max:  # what Arrow's lists can count
        return None
    return pa.ListArray.from_arrays(offsets.astype(np.int32), np.concatenate(filled))


def without_marks(dataset: Dataset) -> Dataset:
    """Leave out what only reports read: collators may make tensors of every column."""
    return dataset.remove_columns([c for c in dataset.column_names if c == ASKED_COLUMN])


def with_attention_mask(dataset: Dataset) -> Dataset:
    """Add an `attention_mask` of ones: Axolotl takes rows for tokenized only if they have one."""
    if "attention_mask" in dataset.column_names:
        return dataset
    ids = dataset.with_format(None)["input_ids"]
    ones = [np.ones(len(row), dtype=np.int8) for row in ids]
    return with_column(dataset, "attention_mask", ones, List(Value("int8")))
