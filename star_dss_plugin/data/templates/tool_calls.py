"""Locate tool calls in a rendered conversation."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

__all__ = ["call_spans", "calls_of", "with_function_name"]

# Words of channel and recipient headers, which templates write between control tokens.
_HEADER_WORDS = frozenset(
    {"analysis", "assistant", "commentary", "final", "function", "json", "model"}
)
_CLOSING = re.compile(r"[\s}\]\"']*")


def calls_of(message: Mapping[str, Any]) -> list[tuple[Any, Any, Any]]:
    """Return the tool calls of a message: (as given, name, arguments)."""
    found = []
    calls = message.get("tool_calls")
    for call in calls if isinstance(calls, list) else ():
        if isinstance(call, Mapping):
            inner = call.get("function")
            inner = inner if isinstance(inner, Mapping) else call
            found.append((call, inner.get("name"), inner.get("arguments")))
    return found


def with_function_name(call: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Return a tool call with its function renamed."""
    if isinstance(call.get("function"), Mapping):
        return {**call, "function": {**call["function"], "name": name}}
    return {**call, "name": name}


def call_spans(
    text: str, place: tuple[int, int, int, int], arguments: Any, control: re.Pattern[str]
) -> list[tuple[int, int]]:
    """Return the spans of a tool call, without the control tokens in and around it.

    Args:
        text: The rendered conversation.
        place: Four positions: the end of the turn's earlier words, the begin and end of the
            function's name, and the beginning of the next words.
        arguments: The call's arguments: a mapping, or JSON text.
        control: Matches control tokens.

    Returns:
        The spans from the piece with the name to the end of the arguments; at least the name.
    """
    reached, start, end, limit = place
    before = [match.end() for match in control.finditer(text, reached, start)]
    begin = before[-1] if before else reached
    first = control.search(text, end, limit)
    finish = max(
        _arguments_end(text, end, limit, arguments, first.start() if first else limit), end
    )
    behind = control.search(text, finish, limit)
    closing = _CLOSING.match(text, finish, behind.start() if behind else limit)
    finish = closing.end() if closing else finish
    spans = []
    position = begin
    for match in [*control.finditer(text, begin, finish), None]:
        stop = match.start() if match else finish
        piece = text[position:stop]
        if piece.strip() and not set(piece.split()) <= _HEADER_WORDS:
            at = position + len(piece) - len(piece.lstrip())
            spans.append((at, at + len(piece.strip())))
        position = match.end() if match else stop
    return spans or [(start, end)]


def _arguments_end(text: str, start: int, limit: int, arguments: Any, otherwise: int) -> int:
    """Return where a call's arguments end; `otherwise` if they are not found."""
    known = arguments
    if isinstance(arguments, str):
        at = text.find(arguments, start, limit)
        if at >= 0:
            return at + len(arguments)
        try:
            known = json.loads(arguments)
        except (ValueError, RecursionError):
            return otherwise
    try:
        found = _parsed_arguments_end(text, start, limit, known)
    except RecursionError:  # newer Pythons read deeper JSON than they can write or traverse
        found = None
    return otherwise if found is None else found


def _parsed_arguments_end(text: str, start: int, limit: int, known: Any) -> int | None:
    """Return where parsed arguments end: spelled as JSON, or else key by key and value by value.

    Returns:
        None if a key or value is not found.
    """
    for separators in ((", ", ": "), (",", ":")):
        for ascii_only in (False, True):
            spelled = json.dumps(known, separators=separators, ensure_ascii=ascii_only, default=str)
            at = text.find(spelled, start, limit)
            if at >= 0:
                return at + len(spelled)
    position = start
    for leaf in _keys_and_values(known):
        at = text.find(leaf, position, limit)
        if at < 0:
            return None
        position = at + len(leaf)
    return position


def _keys_and_values(value: Any) -> Iterator[str]:
    """Yield the keys and values in nested arguments as text."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield str(key)
            yield from _keys_and_values(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _keys_and_values(inner)
    elif isinstance(value, str):
        yield value
    elif value is not None:
        yield json.dumps(value)
