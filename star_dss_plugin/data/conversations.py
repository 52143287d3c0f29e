"""Read the messages and template arguments of a row."""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedTokenizerBase

from star_dss_plugin.data.requests import Message
from star_dss_plugin.errors import DataError
from star_dss_plugin.validation import shortened

__all__ = [
    "MEDIA",
    "conversation_of",
    "row_messages",
    "source_messages",
    "template_arguments",
    "text_message",
    "text_of",
]

# Arguments of the tokenizer's method that are not template variables: a row must not set them.
_RESERVED = frozenset(inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters) - {
    "self",
    "tools",
    "documents",
    "kwargs",
}


CONVERSATIONS = "conversations"
"""ShareGPT's name for the column of messages, which TRL accepts too."""

_ROLES = {
    *("system", "developer", "user", "assistant"),
    # The roles of tools and environments in chat templates.
    *("tool", "function", "ipython", "observation", "environment", "tool_response", "context"),
    *("document", "documents", "control"),
}

# Roles that need a content. An assistant may only think or call a tool, and a tool return nothing.
_NEED_CONTENT = ("system", "developer", "user")


def conversation_of(row: Mapping[str, Any]) -> Any:
    """Return the value of a row's `messages` or `conversations`; None if it has neither."""
    messages = row.get("messages")
    return row.get(CONVERSATIONS) if messages is None else messages


def source_messages(row: Mapping[str, Any]) -> list[dict[str, Any]] | None:
    """Return a row's conversation from its message, prompt or completion columns; None if none.

    Messages with `from` and `value` (ShareGPT's) get `role` and `content`, as in TRL. A plain-text
    `prompt` becomes one user message, and a plain-text `completion` the assistant's.

    Raises:
        DataError: A message has no valid role or content.
    """
    messages = conversation_of(row)
    if messages is not None:
        return _checked("messages" if row.get("messages") is not None else CONVERSATIONS, messages)
    prompt, completion = row.get("prompt"), row.get("completion")
    if prompt is None or completion is None:
        return None
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    if isinstance(completion, str):
        completion = [{"role": "assistant", "content": completion}]
    return [*_checked("prompt", prompt), *_checked("completion", completion)]


def _checked(column: str, messages: Any) -> list[dict[str, Any]]:
    """Return a column's messages after checking that each has a role, and text or typed parts."""
    if not isinstance(messages, list):
        raise DataError(
            f"{column!r} is a {type(messages).__name__}; it must be a text or a list of messages "
            "with 'role' and 'content'."
        )
    messages = [_with_role_and_content(message) for message in messages]
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
        if message["role"] not in _ROLES:
            roles = list(dict.fromkeys(str(m.get("role")) for m in messages[k:]))
            raise DataError(
                f"{where}.role is {_short(message['role'])}, which no chat template is known to "
                f"tell from a user's: the roles here are {', '.join(map(repr, roles))}. Rename "
                "them to 'system', 'user', 'assistant' or 'tool'."
            )
        content = message.get("content")
        if content is None and message["role"] in _NEED_CONTENT:
            raise DataError(
                f"{where} ({message['role']}) has no content, which a chat template may write as "
                "'None'. Give its text, or remove the message."
            )
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
    return [_with_parsed_calls(message, f"{column}[{k}]") for k, message in enumerate(messages)]


def _with_parsed_calls(message: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Return a message with `tool_calls` parsed if they are JSON text."""
    calls = message.get("tool_calls")
    if not isinstance(calls, str):
        return dict(message)
    try:
        return {**message, "tool_calls": json.loads(calls)}
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}.tool_calls is a text that is not JSON: {error}.") from error


def _with_role_and_content(message: Any) -> Any:
    """Return a message with `role` and `content` in place of `from` and `value`."""
    if isinstance(message, Mapping) and message.get("role") is None and "from" in message:
        rest = {k: v for k, v in message.items() if k not in ("from", "value", "role", "content")}
        return {"role": message["from"], "content": message.get("value"), **rest}
    return message


def _short(value: Any) -> str:
    """Return a value's type and its shortened text, for errors."""
    return f"{type(value).__name__} {shortened(value)}"


def row_messages(row: Mapping[str, Any]) -> list[Message] | None:
    """Return `source_messages` with each content as one string: see `text_of`."""
    source = source_messages(row)
    return None if source is None else [text_message(m) for m in source]


def text_message(message: Mapping[str, Any]) -> Message:
    """Return a message with its content as one string: see `text_of`."""
    return {"role": message["role"], "content": text_of(message.get("content"))}


MEDIA = {
    **dict.fromkeys(("image", "image_url"), "[image]"),
    **dict.fromkeys(("video", "video_url"), "[video]"),
    **dict.fromkeys(("audio", "audio_url", "input_audio"), "[audio]"),
}
"""The mark that a guard reads instead of a media part, by the part's type."""


def text_of(content: Any) -> str:
    """Return a content as one string.

    Args:
        content: A text, a list of typed parts, or None.

    Returns:
        The joined texts of the parts, with a mark such as `[image]` on its own line for each media
        part; "" for None.
    """
    if not isinstance(content, list):
        return content or ""
    said, marked = "", False
    for part in content:
        mark = MEDIA.get(str(part.get("type")), "")
        piece = mark or part.get("text") or ""
        if said and piece and (mark or marked) and not (said[-1].isspace() or piece[0].isspace()):
            said += "\n"
        said, marked = said + piece, bool(mark) or (marked and not piece)
    return said


def template_arguments(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return a row's own template variables: `tools` and `chat_template_kwargs`.

    Raises:
        DataError: They are malformed, or `chat_template_kwargs` contains the template or another
            argument of `apply_chat_template`, which data must not choose.
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
    # In a column of mappings every row has all names, with null for those that it did not set.
    given = {
        name: value for name, value in given.items() if name not in _RESERVED or value is not None
    }
    if "chat_template" in given:
        raise DataError(
            "chat_template_kwargs brings a chat_template, which is a program: it may come with the "
            "tokenizer, but not with the data. Remove it from the row and set the tokenizer's."
        )
    if ours := sorted(_RESERVED & given.keys()):
        raise DataError(
            f"chat_template_kwargs brings {', '.join(ours)}, which is no variable of a template "
            "but says how rows are tokenized. Remove it from the row."
        )
    return {"tools": tools, **given}
