"""Wrap a data collator so that `star_scores` and `ref_logps` stay aligned with their tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from star_dss_plugin.data.columns import REF_COLUMN, SCORES_COLUMN
from star_dss_plugin.errors import DataError
from star_dss_plugin.logprobs import IGNORE_INDEX
from star_dss_plugin.training.rows.known_rows import KnownRows

__all__ = ["TokenColumnsCollator", "document_starts"]

_PADDING = {SCORES_COLUMN: 1.0, REF_COLUMN: 0.0}


class TokenColumnsCollator:
    """Add `star_scores` and `ref_logps`, (batch, seq) float32, to the batch of another collator.

    Each row's tokens are looked up in the batch, and the columns are put at the same positions. If
    the inner collator changed the tokens (cut, shuffled or masked them), this raises an error
    instead of putting a score on the wrong token.

    A feature is one of these:

    - a row;
    - a packed row of several documents, with `seq_lengths` (TRL's packing);
    - a list of rows that the inner collator packs into one sequence (Axolotl's packing).

    The inner collator may also join all rows of a batch (`padding_free`) if its `position_ids`
    restart at each row. The first token of each packed document is not trained: its prediction
    reads the document before, for which neither a score nor a reference was computed.

    Args:
        inner: The trainer's collator.
        known: Digests of the prepared rows; any other row is an error. None: every row is accepted.
    """

    def __init__(
        self, inner: Callable[[list[Any]], Mapping[str, Any]], known: KnownRows | None = None
    ) -> None:
        self.inner = inner
        self.known = known

    def __call__(
        self, features: Sequence[Mapping[str, Any] | list[Mapping[str, Any]]]
    ) -> dict[str, Any]:
        if self.known is not None:
            for feature in features:
                for row in feature if isinstance(feature, list) else [feature]:
                    self.known.check(row)
        joined = [isinstance(f, list) for f in features]
        sequences = [
            [_separate(row) for row in f]
            if isinstance(f, list)
            else [_separate(f) if "seq_lengths" in f else dict(f)]
            for f in features
        ]
        rows = [row for sequence in sequences for row in sequence]
        columns = [name for name in _PADDING if any(name in row for row in rows)]
        lacking = [name for name in columns if any(name not in row for row in rows)]
        if lacking:
            raise DataError(
                f"Some rows of a batch have no {lacking[0]!r}: scored and unscored data are mixed. "
                "Score all of it."
            )
        bare: list[Any] = [[_bare(row) for row in sequence] for sequence in sequences]
        batch = dict(self.inner([b if j else b[0] for b, j in zip(bare, joined, strict=True)]))
        if SCORES_COLUMN not in columns:
            return batch
        missing = [name for name in ("input_ids", "labels") if name not in batch]
        if missing:
            raise _moved_tokens_error(f"its batch has no {' and no '.join(missing)}")
        if len(rows) > 1 and _flattened(batch, rows):
            sequences = [[_separate(row) for row in rows]]
        input_ids, labels = batch["input_ids"], batch["labels"]
        added = {
            name: torch.full(input_ids.shape, _PADDING[name], dtype=torch.float32)
            for name in columns
        }
        if input_ids.shape[0] != len(sequences):
            raise _moved_tokens_error(
                f"it made {input_ids.shape[0]} sequences of {len(features)} rows"
            )
        for i, sequence in enumerate(sequences):
            for row in sequence:
                _check_lengths(row, columns)
            feature = {
                n: _join(row[n] for row in sequence) for n in ("input_ids", "labels", *columns)
            }
            where = _find(input_ids[i], labels[i], feature)
            if where is None and len(sequence) == 1:  # a collator that packs rows, given only one
                where = _find(input_ids[i], labels[i], _separate(sequence[0]))
            if where is None:
                raise _moved_tokens_error("a row's tokens or labels are not the ones it was given")
            for name in columns:
                added[name][i, where] = torch.as_tensor(feature[name], dtype=torch.float32)
        return batch | added


def document_starts(row: Mapping[str, Any]) -> list[int]:
    """Return the start index of each document of a row, from `seq_lengths` if the row has it."""
    return _starts(row.get("seq_lengths") or [len(row["input_ids"])])


def _starts(lengths: Iterable[int]) -> list[int]:
    *starts, total = accumulate(lengths, initial=0)
    return [start for start in starts if start < total]


def _separate(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return a row in which the first token of each document is not trained."""
    labels = torch.as_tensor(row["labels"]).clone()
    labels[document_starts(row)] = IGNORE_INDEX
    return {**row, "labels": labels.tolist()}


def _flattened(batch: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> bool:
    """Return whether a collator joined all rows into one, with positions that restart at each."""
    positions = batch.get("position_ids")
    if positions is None or len(batch["input_ids"]) != 1 or "attention_mask" in batch:
        return False
    starts = _starts(len(row["input_ids"]) for row in rows)
    return bool((positions[0, starts] == 0).all())


def _bare(row: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in row.items() if name not in _PADDING}


def _join(values: Iterable[Any]) -> Tensor:
    return torch.cat([torch.as_tensor(value) for value in values])


def _check_lengths(row: Mapping[str, Any], columns: Sequence[str]) -> None:
    for name in columns:
        if len(row[name]) != len(row["input_ids"]):
            raise DataError(
                f"A row has {len(row['input_ids'])} tokens and {len(row[name])} {name}. There must "
                "be one per token: score after the last step that changes the tokens."
            )


def _find(padded_ids: Tensor, padded_labels: Tensor, feature: Mapping[str, Any]) -> slice | None:
    """Return the slice of a padded sequence that holds a row, at its start or at its end.

    Labels are compared, too, because padding may look like text (often it is the end-of-text
    token). If both ends match, no token of the row is trained and either is right.

    Returns:
        The slice; None if neither end matches.
    """
    ids = torch.as_tensor(feature["input_ids"], dtype=padded_ids.dtype)
    labels = torch.as_tensor(feature["labels"], dtype=padded_labels.dtype)
    for start in (0, len(padded_ids) - len(ids)):
        where = slice(start, start + len(ids))
        expected = torch.full_like(padded_labels, IGNORE_INDEX)
        if start < 0 or len(labels) != len(ids) or not torch.equal(padded_ids[where], ids):
            continue
        expected[where] = labels
        if torch.equal(padded_labels, expected):
            return where
    return None


def _moved_tokens_error(what: str) -> DataError:
    return DataError(
        f"The data collator does not keep the scored tokens in place: {what}. STAR-DSS needs a "
        "collator that only pads or joins rows (DataCollatorForSeq2Seq, TRL's default, "
        "DataCollatorWithFlattening); one that makes its own labels or cuts rows cannot be used."
    )
