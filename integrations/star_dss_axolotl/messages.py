"""The messages of Axolotl's rows: it keeps tokens only, and a guard should read a conversation."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from datasets import Dataset, List, Value

from star_dss_plugin.data.inverse import TemplateInverse
from star_dss_plugin.logprobs import IGNORE_INDEX

__all__ = ["MESSAGES", "with_messages"]

MESSAGES = "messages"
_ALWAYS = ("role", "content")
_TEXTS = (
    *("role", "content", "reasoning_content", "thinking", "reasoning", "tool_calls"),
    *("tool_call_id", "name"),
)


def with_messages(dataset: Dataset, inverses: Sequence[TemplateInverse]) -> Dataset:
    """Return rows with the column `messages`: each row's conversation, or null.

    A row has one if a template gives the row's own tokens for it.

    Args:
        dataset: With `input_ids` and `labels`.
        inverses: Of the templates that may have made the rows.
    """
    if MESSAGES in dataset.column_names:
        return dataset
    column = []
    for row in dataset.with_format(None).select_columns(["input_ids", "labels"]):
        found = None
        # A row that is trained as a whole is a text, whatever it looks like.
        if IGNORE_INDEX in row["labels"]:
            tried = (inverse.of_tokens(row["input_ids"]) for inverse in inverses)
            found = next((messages for messages in tried if messages is not None), None)
        column.append(None if found is None else list(map(_as_texts, found)))
    # Templates may ask whether a message has a field: there are those that some message needs.
    used = {field for messages in column for message in messages or () for field in message}
    feature = List({name: Value("string") for name in _TEXTS if name in used or name in _ALWAYS})
    filled = [
        None if messages is None else [dict.fromkeys(feature.feature) | one for one in messages]
        for messages in column
    ]
    return dataset.add_column(MESSAGES, filled, feature=feature)


def _as_texts(message: dict[str, Any]) -> dict[str, Any]:
    """Return a message as a column of messages holds it: calls of functions as JSON."""
    calls = {"tool_calls": json.dumps(message["tool_calls"])} if "tool_calls" in message else {}
    return message | calls
