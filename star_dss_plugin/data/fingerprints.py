"""Hash contents: of rows, of data sets, of tokenizers."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from star_dss_plugin.data.media import undecoded

__all__ = ["content_key", "sample_of", "words_of"]


def content_key(*parts: Any) -> str:
    """Return the SHA-256 of JSON values, whatever the order of keys in their mappings.

    Raises:
        TypeError, ValueError: A part is not a JSON value (NaN and infinities are not).
    """
    text = json.dumps(parts, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode("ascii")).hexdigest()


_SAMPLE = 64


def sample_of(dataset: Dataset) -> str:
    """Return a hash over column names and some rows from all over a data set."""
    rows = undecoded(dataset)  # images as they are stored: objects differ from process to process
    some = range(0, len(rows), max(1, len(rows) // _SAMPLE))
    return content_key(list(rows.column_names), [repr(rows[i]) for i in some])


def words_of(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return a hash over a tokenizer's vocabulary and chat template."""
    return content_key(tokenizer.get_vocab(), tokenizer.chat_template)
