"""Hash the contents of requests, rows, data sets and tokenizers."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from star_dss_plugin.data.media import without_decoding
from star_dss_plugin.data.requests import PrefixRequest

__all__ = [
    "content_key",
    "dataset_hash",
    "request_key",
    "row_keys",
    "sampled_rows_hash",
    "tokenizer_hash",
]


def content_key(*parts: Any) -> str:
    """Return the SHA-256 of JSON values; the order of keys in mappings does not matter.

    Raises:
        TypeError, ValueError: A part is not a JSON value (NaN and infinities are not).
    """
    text = json.dumps(parts, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode("ascii")).hexdigest()


def request_key(request: PrefixRequest) -> str:
    """Return a hash of a guard request: context, text and prefix ends."""
    context = [[m["role"], m["content"]] for m in request.context]
    return content_key(context, request.text, request.ends)


def row_keys(dataset: Dataset) -> list[str]:
    """Return a hash of each row's contents, independent of its position."""
    names = list(dataset.column_names)
    return [
        hashlib.sha256(repr([(name, row[name]) for name in names]).encode()).hexdigest()
        for row in dataset.with_format(None)
    ]


_SAMPLED_ROWS = 64
_ROWS_AT_ONCE = 64


def sampled_rows_hash(dataset: Dataset) -> str:
    """Return a hash of the column names and about 64 evenly spaced rows of a data set."""
    rows = without_decoding(dataset)  # the repr of a decoded image differs between processes
    some = range(0, len(rows), max(1, len(rows) // _SAMPLED_ROWS))
    return content_key(list(rows.column_names), [repr(rows[i]) for i in some])


def dataset_hash(dataset: Dataset) -> str:
    """Return a hash of the column names and all rows of a data set, in their order."""
    digest = hashlib.sha256(repr(list(dataset.column_names)).encode())
    for rows in without_decoding(dataset).iter(_ROWS_AT_ONCE):
        digest.update(repr(list(rows.values())).encode("utf-8", "surrogatepass"))
    return digest.hexdigest()


def tokenizer_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return a hash of a tokenizer's vocabulary and chat template."""
    return content_key(tokenizer.get_vocab(), tokenizer.chat_template)
