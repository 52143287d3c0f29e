"""Batches that carry per-token columns through any collator, aligned or not at all."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
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
    shuffled, masked or packed), there is no right place, and that is an error: a score on the wrong
    token would be worse than none.

    Args:
        inner: The trainer's collator.
    """

    def __init__(self, inner: Callable[[list[dict[str, Any]]], Mapping[str, Any]]) -> None:
        self.inner = inner

    def __call__(self, features: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        columns = [name for name in _PADDING if any(name in f for f in features)]
        lacking = [name for name in columns if any(name not in f for f in features)]
        if lacking:
            raise DataError(
                f"Some rows of a batch have no {lacking[0]!r}: scored and unscored data are mixed. "
                "Score all of it."
            )
        bare = [{k: v for k, v in f.items() if k not in _PADDING} for f in features]
        batch = dict(self.inner([dict(f) for f in bare]))
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
        for i, feature in enumerate(features):
            where = _find(input_ids[i], labels[i], feature)
            if where is None:
                raise _moved("a row's tokens or labels are not the ones it was given")
            for name in columns:
                values = torch.as_tensor(feature[name], dtype=torch.float32)
                if len(values) != where.stop - where.start:
                    raise DataError(
                        f"A row has {where.stop - where.start} tokens and {len(values)} {name}. "
                        "There must be one per token: score after the last step that changes the "
                        "tokens."
                    )
                added[name][i, where] = values
        return batch | added


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
