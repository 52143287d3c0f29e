"""Detect rows whose tokens, labels or scores changed after scoring, by one digest per scored row.

A digest covers a row's tokens, which of them are trained, and their scores. The digests are a note
in the data set's description, so rows may be selected, shuffled and concatenated; a row whose
scores were edited or exchanged has no matching digest.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from datasets import Dataset
from numpy.typing import NDArray

from star_dss_plugin.data.columns import SCORES_COLUMN
from star_dss_plugin.data.provenance import damaged_note, read_notes, remove_note, write_note
from star_dss_plugin.errors import DataError
from star_dss_plugin.logprobs import IGNORE_INDEX

__all__ = [
    "add_row_digests",
    "check_row_digests",
    "contains_digest",
    "packed_row_digests",
    "remove_row_digests",
    "write_merged_digests",
    "write_row_digests",
]

_NOTE = "rows"


def write_row_digests(dataset: Dataset, columns: Sequence[str] = (SCORES_COLUMN,)) -> None:
    """Write the note with the digests of a data set's rows.

    Args:
        dataset: Rows with `input_ids`, `labels` and scores.
        columns: The columns of scores; any of them may be renamed to `star_scores` and trained.
    """
    found = [digest for name in columns for _, digest in _digests(dataset, name)]
    write_note(dataset, _NOTE, _packed(np.asarray(found, np.uint64)))


def add_row_digests(dataset: Dataset) -> None:
    """Add the digests of rows that this package changed itself, if the data set has a note."""
    if noted := read_notes(dataset, _NOTE):
        found = [digest for _, digest in _digests(dataset, SCORES_COLUMN)]
        known = np.concatenate([_known(noted), np.asarray(found, np.uint64)])
        write_note(dataset, _NOTE, _packed(known))


def remove_row_digests(dataset: Dataset) -> None:
    """Remove the digests, because rows were merged or scores are changed on purpose."""
    remove_note(dataset, _NOTE)


def packed_row_digests(dataset: Dataset) -> str | None:
    """Return a data set's digests as one text, for files without a description; None if none."""
    found: list[Any] = read_notes(dataset, _NOTE)
    return _packed(_known(found)) if found else None


def write_merged_digests(dataset: Dataset, packed: Iterable[Any]) -> None:
    """Write the digests of several parts, unless a part has none.

    Args:
        dataset: The rows of all parts.
        packed: The result of `packed_row_digests` for each part.

    Raises:
        DataError: A note is damaged.
    """
    parts = list(packed)
    if parts and None not in parts:
        write_note(dataset, _NOTE, _packed(_known(parts)))


def check_row_digests(dataset: Dataset, name: str) -> None:
    """Check that rows are as they were scored, if the data set has digests.

    Rows with `seq_lengths` (packed ones) have other digests and are not checked here.

    Args:
        dataset: Any data set.
        name: The data set's name in the message: "train", "eval", …

    Raises:
        DataError: A row's tokens, labels or scores were changed, or a note is damaged.
    """
    needed = {"input_ids", "labels", SCORES_COLUMN}
    if not needed <= set(dataset.column_names) or "seq_lengths" in dataset.column_names:
        return
    if not (noted := read_notes(dataset, _NOTE)):
        return
    known = _known(noted)
    for i, digest in _digests(dataset, SCORES_COLUMN):
        if not contains_digest(known, digest):
            raise DataError(
                "the row is not as it was scored: its tokens, labels or scores were changed, or "
                "the scores are another row's. Score the data again. If you changed them on "
                "purpose, or joined the data with rows that bring scores of their own, clear "
                "dataset.info.description, which notes how the rows were scored."
            ).at(file=f"The {name} data set", rows=(i,))


def contains_digest(sorted_digests: NDArray[np.uint64], digest: np.uint64) -> bool:
    """Return whether a digest is among sorted ones."""
    place = int(np.searchsorted(sorted_digests, digest))
    return place < len(sorted_digests) and bool(sorted_digests[place] == digest)


def _digests(dataset: Dataset, column: str) -> Iterator[tuple[int, np.uint64]]:
    """Yield the index and digest of each row that has one score per token."""
    plain = dataset.with_format("arrow").select_columns(["input_ids", "labels", column])
    i = 0
    for table in plain.iter(batch_size=1000):
        columns = [table.column(name).to_pylist() for name in ("input_ids", "labels", column)]
        for ids, labels, scores in zip(*columns, strict=True):
            if _as_long(ids, labels, scores):
                yield i, _digest(ids, labels, scores)
            i += 1


def _as_long(*lists: Any) -> bool:
    """Return whether these are lists of equal length; other values raise elsewhere."""
    return all(isinstance(one, list) for one in lists) and len(set(map(len, lists))) == 1


def _digest(ids: Any, labels: Any, scores: Any) -> np.uint64:
    try:
        tokens, values = np.asarray(ids, np.int64), np.asarray(scores, np.float32)
        targets = np.asarray(labels, np.int64)
    except (TypeError, ValueError, OverflowError):  # scored rows are never like this
        return np.uint64(0)
    trained = targets != IGNORE_INDEX
    if not np.array_equal(targets[trained], tokens[trained]):
        return np.uint64(0)
    digest = hashlib.blake2b(str(len(tokens)).encode(), digest_size=8)
    for array in (tokens, trained, values):
        digest.update(array.tobytes())
    return np.uint64(int.from_bytes(digest.digest(), "little"))


def _packed(digests: NDArray[np.uint64]) -> str:
    """Return sorted digests in base64, about 11 characters each."""
    return base64.b64encode(np.unique(digests).astype("<u8").tobytes()).decode("ascii")


def _known(noted: Sequence[Any]) -> NDArray[np.uint64]:
    """Return the sorted digests in notes.

    Raises:
        DataError: A note is damaged.
    """
    parts = []
    for one in noted:
        try:
            found = base64.b64decode(one, validate=True)
            parts.append(np.frombuffer(found, "<u8"))
        except (TypeError, ValueError, binascii.Error) as error:
            raise damaged_note(_NOTE) from error
    return np.unique(np.concatenate(parts)).astype(np.uint64)
