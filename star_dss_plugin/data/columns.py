"""Name the columns of STAR-DSS, and add columns with reproducible fingerprints."""

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
    "REF_COLUMN",
    "SCORES_COLUMN",
    "SHIFTED_COLUMNS",
    "TEXT_COLUMN",
    "TOKEN_COLUMNS",
    "with_attention_mask",
    "with_column",
    "without_asked_column",
]

SCORES_COLUMN = "star_scores"
"""The STAR score s_t of every token of `input_ids`: float32 in [0, 1], 1.0 outside responses."""
REF_COLUMN = "ref_logps"
"""log π_ref(y_t) of every token of `input_ids`: float32, 0.0 where it is not needed."""
ASKED_COLUMN = "star_asked"
"""Whether the guard gave the score of each token of `input_ids`: bool, False if a probe gave it.
Only `trajectory="probed"` writes this column; reports read it, and training removes it.
"""
SHIFTED_COLUMNS = {name: f"shift_{name}" for name in (SCORES_COLUMN, REF_COLUMN)}
"""In batches of sequence parallelism: the same columns, shifted to the next token's value."""
TOKEN_COLUMNS = (SCORES_COLUMN, REF_COLUMN, *SHIFTED_COLUMNS.values())
TEXT_COLUMN = "star_text"
"""For rows that a collator tokenizes, their text: row number, tokens, labels and `star_scores`."""


def with_column(dataset: Dataset, name: str, column: Sequence[Any], feature: Any) -> Dataset:
    """Add or replace a column of per-token lists.

    Args:
        dataset: The rows.
        name: The column's name.
        column: One list or array per row.
        feature: The column's type.

    Returns:
        A data set whose fingerprint depends only on its contents, not on time or chance.
    """
    if name in dataset.column_names:
        dataset = dataset.remove_columns(name)
    digest = hashlib.sha256(f"{dataset._fingerprint}:{name}:{feature}".encode())
    arrays = list(map(np.asarray, column))
    for array in arrays:
        digest.update(f"{array.dtype}:{array.shape}".encode() + array.tobytes())
    made = _as_list_array(arrays)
    return dataset.add_column(
        name,
        column if made is None else made,
        new_fingerprint=digest.hexdigest()[:16],
        feature=feature,
    )


def _as_list_array(arrays: Sequence[NDArray[Any]]) -> pa.ListArray | None:
    """Return numeric rows as one Arrow array, which is faster than converting each row.

    Returns:
        None if the rows are not one-dimensional arrays of one numeric type.
    """
    filled = [array for array in arrays if array.size]
    kinds = {array.dtype for array in filled}
    if len(kinds) != 1 or kinds.pop().kind not in "biuf" or any(a.ndim != 1 for a in arrays):
        return None
    offsets = np.zeros(len(arrays) + 1, np.int64)
    np.cumsum([len(array) for array in arrays], out=offsets[1:])
    if offsets[-1] > np.iinfo(np.int32).max:  # the limit of Arrow's list offsets
        return None
    return pa.ListArray.from_arrays(offsets.astype(np.int32), np.concatenate(filled))


def without_asked_column(dataset: Dataset) -> Dataset:
    """Remove the column that only reports read, because collators may stack every column."""
    return dataset.remove_columns([c for c in dataset.column_names if c == ASKED_COLUMN])


def with_attention_mask(dataset: Dataset) -> Dataset:
    """Add an `attention_mask` of ones, by which Axolotl recognises tokenized rows."""
    if "attention_mask" in dataset.column_names:
        return dataset
    ids = dataset.with_format(None)["input_ids"]
    ones = [np.ones(len(row), dtype=np.int8) for row in ids]
    return with_column(dataset, "attention_mask", ones, List(Value("int8")))
