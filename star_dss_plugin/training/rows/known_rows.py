"""Remember a digest of each prepared row, and reject batches with any other row."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from datasets import Dataset

from star_dss_plugin.data.columns import REF_COLUMN, SCORES_COLUMN
from star_dss_plugin.data.row_digests import contains_digest
from star_dss_plugin.errors import DataError

__all__ = ["KnownRows"]

_COLUMNS = {
    "input_ids": np.int64,
    "labels": np.int64,
    SCORES_COLUMN: np.float32,
    REF_COLUMN: np.float32,
    # The document boundaries of a packed row. Masks and positions follow from these columns.
    "seq_lengths": np.int64,
}


_RECENT_ROWS = 65536
"""Rows of a stream to remember: more than are read between a row's scoring and its batch."""


class _RecentRows:
    """Hold digests of a stream's latest rows, and of the first rows of the latest pass.

    The first rows, because accelerate fills up the last batch of a pass with rows of the first
    batch where processes take turns with the rows of a stream.
    """

    def __init__(self) -> None:
        self._first: set[int] = set()
        self._last: OrderedDict[int, None] = OrderedDict()  # an ordered set

    def __contains__(self, digest: int) -> bool:
        return digest in self._last or digest in self._first

    def __len__(self) -> int:
        return len(self._last) + len(self._first)

    def add(self, digests: Iterable[int], *, first: bool) -> None:
        """Remember the rows of a buffer; `first` says that a pass begins with it."""
        found = list(digests)
        if first:
            self._first = set()
        if len(self._first) < _RECENT_ROWS:
            self._first.update(found)
        for digest in found:
            self._last[digest] = None
            self._last.move_to_end(digest)
        # Rows of the buffer before this one may still wait for their batch.
        while len(self._last) > max(_RECENT_ROWS, 2 * len(found)):
            self._last.popitem(last=False)


class KnownRows:
    """Hold a digest of every prepared row: of its tokens, labels, scores and reference.

    A row that was edited since then, or got another row's scores, has an unknown digest.
    """

    def __init__(self) -> None:
        self._digests: np.ndarray[Any, Any] = np.zeros(0, np.uint64)
        self._trainable = self._digests
        self._recent: dict[str, _RecentRows] = {}

    def add(self, dataset: Dataset, *, trainable: bool = True) -> str:
        """Remember a prepared data set's rows.

        Args:
            dataset: The data set, with `input_ids`, `labels` and `star_scores`.
            trainable: Whether the rows may be trained on. False for an evaluation set that got the
                score 1 everywhere without a guard (`score_eval=False`).

        Returns:
            A digest of the data set in its order, without the reference: the last bits of that
            depend on how rows were padded, which may differ from rank to rank.
        """
        found = _digests(dataset)
        self._digests = np.union1d(self._digests, found)
        if trainable:
            self._trainable = np.union1d(self._trainable, found)
        return _without_reference(dataset)

    def add_buffer(self, dataset: Dataset, stream: str, *, first: bool) -> str:
        """Remember a buffer of a stream until its batches have been made.

        Args:
            dataset: The buffer, with `input_ids`, `labels` and `star_scores`.
            stream: Name of the stream. Each has its own memory, so that a long evaluation does not
                displace rows of the training stream.
            first: Whether a pass begins with this buffer.

        Returns:
            A digest of the buffer, as `add` returns it.
        """
        recent = self._recent.setdefault(stream, _RecentRows())
        recent.add(_digests(dataset).tolist(), first=first)
        return _without_reference(dataset)

    def digest(self, dataset: Dataset) -> str:
        """Check that all rows of a training set are known and trainable; return its digest.

        Returns:
            A digest of the data set, as `add` returns it.

        Raises:
            DataError: A row is unknown, or was not scored for training.
        """
        found = _digests(dataset)
        unknown = np.flatnonzero(~np.isin(found, self._trainable))
        if len(unknown):
            raise _unknown_row_error(f"Row {unknown[0]} of the training set")
        return _without_reference(dataset)

    def as_dataset(self, rows: Sequence[Any]) -> Dataset | None:
        """Return a sequence of known rows (a list, torch's Subset) as a data set.

        Returns:
            The data set, with the columns that a digest covers; None if a row lacks scores.

        Raises:
            DataError: A row is unknown.
        """
        found = [rows[i] for i in range(len(rows))]
        if not all(isinstance(row, Mapping) and SCORES_COLUMN in row for row in found):
            return None
        for row in found:
            self.check(row)
        names = [name for name in _COLUMNS if all(name in row for row in found)]
        return Dataset.from_list([{name: row[name] for name in names} for row in found])

    def check(self, row: Mapping[str, Any]) -> None:
        """Check that a row of a batch was prepared.

        Raises:
            DataError: The row is unknown.
        """
        found = _digest(row)
        if any(found in recent for recent in self._recent.values()):
            return
        if not contains_digest(self._digests, np.uint64(found)):
            raise _unknown_row_error("A row of a batch")


def _digests(dataset: Dataset) -> np.ndarray[Any, Any]:
    columns = [name for name in _COLUMNS if name in dataset.column_names]
    plain = dataset.with_format("numpy").select_columns(columns)
    return np.fromiter((_digest(row) for row in plain), np.uint64, len(plain))


def _without_reference(dataset: Dataset) -> str:
    columns = [name for name in dataset.column_names if name != REF_COLUMN]
    return hashlib.sha256(_digests(dataset.select_columns(columns)).tobytes()).hexdigest()


def _digest(row: Mapping[str, Any]) -> int:
    digest = hashlib.blake2b(digest_size=8)
    for name, dtype in _COLUMNS.items():
        if name in row:
            values = _numbers(row[name], dtype)
            digest.update(f"{name}:{len(values)}:".encode())
            digest.update(values.tobytes())
    return int.from_bytes(digest.digest(), "little")


def _numbers(given: Any, dtype: Any) -> np.ndarray[Any, Any]:
    """Return a column of one row as a one-dimensional array.

    Raises:
        DataError: The column is no flat list of numbers. (numpy would convert strings, and lists
            of one number each, to the same numbers.)
    """
    try:
        values = np.asarray(given)
        if values.ndim == 1 and values.dtype.kind in "biuf":
            return values.astype(dtype, copy=False)
    except ValueError:  # lists of several lengths
        pass
    raise _unknown_row_error("A row of a batch")


def _unknown_row_error(which: str) -> DataError:
    return DataError(
        f"{which} is not one that was scored when STAR-DSS was set up: its tokens, labels, "
        "scores or reference values were changed since, or another data set took its place. Give "
        "the data to the trainer's constructor as it is to be trained, or call attach after the "
        "last change."
    )
