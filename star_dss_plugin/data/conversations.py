"""The messages of a row, and which of them were said before a response."""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedTokenizerBase

from star_dss_plugin.data.requests import Message
from star_dss_plugin.errors import DataError
from star_dss_plugin.validation import shortened

__all__ = ["row_messages", "source_messages", "template_arguments"]

# What a row may not set: all that the tokenizer's method takes beside a template's own variables.
_OURS = frozenset(inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters) - {
    "self",
    "tools",
    "documents",
    "kwargs",
}


def source_messages(row: Mapping[str, Any]) -> list[dict[str, Any]] | None:
    """The conversation of a row as it is given, whatever columns it is in; None if there is none.

    A plain-text `prompt` counts as one user message, a plain-text `completion` as the answer.

    Raises:
        DataError: One of them is not a message with a role and a content.
    """
    if isinstance(row.get("messages"), list):
        return _checked("messages", row["messages"])
    prompt, completion = row.get("prompt"), row.get("completion")
    if prompt is None or completion is None:
        return None
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    if isinstance(completion, str):
        completion = [{"role": "assistant", "content": completion}]
    return [*_checked("prompt", prompt), *_checked("completion", completion)]


def _checked(column: str, messages: Any) -> list[dict[str, Any]]:
    """The messages of a column, each of which has a role, and text or typed parts for content."""
    if not isinstance(messages, list):
        raise DataError(
            f"{column!r} is a {type(messages).__name__}; it must be a text or a list of messages "
            "with 'role' and 'content'."
        )
    for k, message in enumerate(messages):
        where = f"{column}[{k}]"
        if not isinstance(message, Mapping):
            raise DataError(
                f"{where} is a {type(message).__name__}; it must be a message with 'role' and "
                "'content'."
            )
        if not isinstance(message.get("role"), str):
            raise DataError(
                f"{where}.role is {_short(message.get('role'))}; it must be a text, such as 'user' "
                "or 'assistant'."
            )
        content = message.get("content")
        if content is not None and not isinstance(content, str | list):
            raise DataError(
                f"{where}.content is {_short(content)}; it must be a text, or a list of parts."
            )
        for j, part in enumerate(content if isinstance(content, list) else ()):
            text = part.get("text") if isinstance(part, Mapping) else part
            if not isinstance(part, Mapping) or not isinstance(text, str | None):
                raise DataError(
                    f"{where}.content[{j}] is {_short(part)}; a part must be a mapping with 'type' "
                    "and a 'text'."
                )
    return [dict(message) for message in messages]


def _short(value: Any) -> str:
    """A value as an error shows it: its kind, and its beginning."""
    return f"{type(value).__name__} {shortened(value)}"


def row_messages(row: Mapping[str, Any]) -> list[Message] | None:
    """`source_messages` with each content as one string (typed parts joined, absent ones empty)."""
    source = source_messages(row)
    return None if source is None else [_text_message(m) for m in source]


def _text_message(message: Mapping[str, Any]) -> Message:
    content = message.get("content")
    if isinstance(content, list):
        content = "".join(part.get("text") or "" for part in content)
    return {"role": message["role"], "content": content or ""}


def template_arguments(row: Mapping[str, Any]) -> dict[str, Any]:
    """What a row gives to its chat template beside its messages.

    Raises:
        DataError: It would give the template itself, or another argument of `apply_chat_template`:
            data must not choose how it is rendered. Or `tools` or the arguments cannot be read.
    """
    tools = row.get("tools")
    if isinstance(tools, str):
        try:
            tools = json.loads(tools)
        except (ValueError, RecursionError) as error:
            raise DataError(f"tools is a text that is not JSON: {error}.") from error
    given = row.get("chat_template_kwargs") or {}
    if not isinstance(given, Mapping):
        raise DataError(
            f"chat_template_kwargs is {_short(given)}; it must be a mapping from names to values."
        )
    # A column of mappings has every row's names, with null where a row has them not.
    given = {name: value for name, value in given.items() if name not in _OURS or value is not None}
    if "chat_template" in given:
        raise DataError(
            "chat_template_kwargs brings a chat_template, which is a program: it may come with the "
            "tokenizer, not with the data. Remove it from the row and set the tokenizer's."
        )
    if ours := sorted(_OURS & given.keys()):
        raise DataError(
            f"chat_template_kwargs brings {', '.join(ours)}, which is no variable of a template "
            "but says how rows are tokenized. Remove it from the row."
        )
    return {"tools": tools, **given}
