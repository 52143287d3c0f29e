"""Batches that carry per-token columns through any collator, aligned or not at all."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from star_dss_plugin.errors import DataError
from star_dss_plugin.logprobs import IGNORE_INDEX

__all__ = ["REF_COLUMN", "SCORES_COLUMN", "TokenColumnsCollator"]

SCORES_COLUMN = "star_scores"
REF_COLUMN = "ref_logps"
_PADDING = {SCORES_COLUMN: 1.0, REF_COLUMN: 0.0}


class TokenColumnsCollator:
    """Lets another collator make the batch, then adds `star_scores` and `ref_logps` to it.

    The columns are laid where the other collator put each row's tokens. If it changed them (cut,
    shuffled or masked), there is no right place, and that is an error: a score on the wrong token
    would be worse than none.

    A feature is a row, or a list of rows that the other collator joins into one sequence (sample
    packing). The first token of a joined row is then not trained: it would be predicted from the
    row before it, for which neither a score nor a reference was computed.

    Args:
        inner: The trainer's collator.
    """

    def __init__(self, inner: Callable[[list[Any]], Mapping[str, Any]]) -> None:
        self.inner = inner

    def __call__(
        self, features: Sequence[Mapping[str, Any] | list[Mapping[str, Any]]]
    ) -> dict[str, Any]:
        sequences = [_separate(f) if isinstance(f, list) else [dict(f)] for f in features]
        rows = [row for sequence in sequences for row in sequence]
        columns = [name for name in _PADDING if any(name in row for row in rows)]
        lacking = [name for name in columns if any(name not in row for row in rows)]
        if lacking:
            raise DataError(
                f"Some rows of a batch have no {lacking[0]!r}: scored and unscored data are mixed. "
                "Score all of it."
            )
        bare: list[Any] = [[_bare(row) for row in sequence] for sequence in sequences]
        joined = [isinstance(f, list) for f in features]
        batch = dict(self.inner([b if j else b[0] for b, j in zip(bare, joined, strict=True)]))
        if SCORES_COLUMN not in columns:
            return batch
        missing = [name for name in ("input_ids", "labels") if name not in batch]
        if missing:
            raise _moved(f"its batch has no {' and no '.join(missing)}")
        input_ids, labels = batch["input_ids"], batch["labels"]
        added = {
            name: torch.full(input_ids.shape, _PADDING[name], dtype=torch.float32)
            for name in columns
        }
        if input_ids.shape[0] != len(features):
            raise _moved(f"it made {input_ids.shape[0]} sequences of {len(features)} rows")
        for i, sequence in enumerate(sequences):
            for row in sequence:
                _check_lengths(row, columns)
            feature = {
                n: _join(row[n] for row in sequence) for n in ("input_ids", "labels", *columns)
            }
            where = _find(input_ids[i], labels[i], feature)
            if where is None:
                raise _moved("a row's tokens or labels are not the ones it was given")
            for name in columns:
                added[name][i, where] = torch.as_tensor(feature[name], dtype=torch.float32)
        return batch | added


def _separate(rows: list[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Rows of one packed sequence, none of which is predicted from the one before it."""
    return [{**row, "labels": [IGNORE_INDEX, *list(row["labels"])[1:]]} for row in rows]


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
    """Where a row's tokens lie in its padded sequence: at its start or at its end.

    Tokens alone do not tell where padding looks like text (often it is the end-of-text token);
    labels do, for padding has none. Where both ends fit, nothing is trained.
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


def _moved(what: str) -> DataError:
    return DataError(
        f"The data collator does not keep the scored tokens in place: {what}. STAR-DSS needs a "
        "collator that only pads (DataCollatorForSeq2Seq, or TRL's default without packing and "
        "padding_free); one that makes its own labels or cuts rows cannot be used."
    )
