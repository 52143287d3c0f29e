"""Conversations of marks, which show the text that a chat template writes around contents.

Each mark fills a *slot*: a message's content, a thought, a called function's name, or a key or
value of its arguments. Templates that write arguments as JSON have one slot for all of them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

__all__ = [
    "AGAIN",
    "ARGUMENTS",
    "CALL",
    "CALL_ID",
    "IN_CALLS",
    "KEY",
    "NAMES",
    "PROBES",
    "REASONING",
    "THOUGHT",
    "TOOL_ID",
    "TOOL_NAME",
    "VALUE",
    "pieces_of",
    "probe_conversation",
]

THOUGHT, CALL, ARGUMENTS, KEY, VALUE = "reasoning", "call", "arguments", "key", "value"
CALL_ID, TOOL_ID, TOOL_NAME = "call id", "tool's call id", "tool's name"
AGAIN = "again"
"""The slot of a name or id that the text repeats."""
IN_CALLS = frozenset({CALL, ARGUMENTS, KEY, VALUE, CALL_ID})
NAMES = frozenset({CALL, KEY, CALL_ID, TOOL_ID, TOOL_NAME})
"""Slots that hold one word."""
REASONING = ("reasoning_content", "thinking", "reasoning")
"""Message fields in which templates look for reasoning."""

_MARK = re.compile("\ue0f0([0-9]+)\ue0f1")  # private-use characters, which no template contains
_UNWRITTEN = frozenset({CALL_ID, TOOL_ID, TOOL_NAME})  # slots that most templates leave out
_REPEATED = frozenset({CALL, *_UNWRITTEN})  # slots that some templates repeat with the result
_TURN = frozenset({"thinking", "answer", "call", "bare"})

# The conversations that the inverse learns from. An assistant turn is written as its parts:
# "thinking" (a thought), "answer" (the content), "call" (a tool call) and "bare" (a tool call
# without arguments).
PROBES = (
    "user answer",
    "system user answer",
    "user answer user answer",
    "system user answer user answer",
    "developer user answer",
    "user answer system user answer",
    "user system answer",
    "user thinking+answer",
    "system user thinking+answer",
    "user thinking+answer user thinking+answer",
    "user answer user thinking+answer",
    "user thinking+answer user answer",
    "user answer answer",
    "user answer answer user answer",
    "answer",
    "answer user answer",
    "system answer user answer",
    "user answer tool answer",
    "user answer tool answer user answer",
    "user answer tool tool answer",
    "user call tool answer",
    "user call tool answer user answer",
    "user answer user call tool answer",
    "user answer user call tool thinking+answer",
    "user call tool tool answer",
    "user answer+call tool answer",
    "user call",
    "user call+call",
    "user call+call tool tool answer",
    "user call+call tool tool answer user answer",
    "user answer user call+call tool tool answer",
    "user answer+call+call tool tool answer",
    "user answer+call+call",
    "user call tool call tool answer",
    "user bare tool answer",
    "user bare+call+bare tool tool tool answer",
    "user bare",
    "user thinking+call",
    "user thinking+call+call",
    "user thinking+call tool answer",
    "user thinking+call tool call tool answer",
    "user thinking+call tool thinking+call tool thinking+answer",
    "user thinking+call+call tool tool thinking+answer",
    "user thinking+answer+call+call tool tool thinking+answer",
    "user answer user thinking+call+call tool tool thinking+answer",
)


def probe_conversation(
    kinds: Sequence[str], reasoning: str, *, as_text: bool, linked: bool
) -> tuple[list[dict[str, Any]], list[str]]:
    """Return a conversation of marks, and the slot of each mark.

    Args:
        kinds: The kinds of its messages, as in `PROBES`.
        reasoning: The field for thoughts.
        as_text: Whether call arguments are JSON text.
        linked: Whether results have their call's id and a function's name.
    """
    slots: list[str] = []

    def mark(slot: str) -> str:
        slots.append(slot)
        # Nine characters, because some templates require ids of that length.
        return f"\ue0f0{len(slots) - 1:07d}\ue0f1"

    def call(arguments: int) -> dict[str, Any]:
        name, number = mark(CALL), mark(CALL_ID)
        given: Any = {mark(KEY): mark(VALUE) for _ in range(arguments)}
        given = json.dumps(given, ensure_ascii=False) if as_text else given
        called = {"name": name, "arguments": given}
        return {"type": "function", "id": number, "function": called}

    made: list[dict[str, Any]] = []
    waiting: list[str] = []  # ids of calls that have no result yet
    for kind in kinds:
        parts = kind.split("+")
        if not set(parts) <= _TURN:
            message = {"role": kind, "content": mark(kind)}
            if kind == "tool" and linked:
                known = {"tool_call_id": waiting.pop(0)} if waiting else {}
                message |= {"name": mark(TOOL_NAME), **known}
            made.append(message)
            continue
        turn: dict[str, Any] = {"role": "assistant"}
        if "thinking" in parts:
            turn[reasoning] = mark(THOUGHT)
        turn["content"] = mark("assistant") if "answer" in parts else ""
        if calls := [call(2 * (part == "call")) for part in parts if part in ("call", "bare")]:
            turn["tool_calls"] = calls
            waiting = [one["id"] for one in calls]
        made.append(turn)
    return made, slots


def pieces_of(text: str, slots: Sequence[str]) -> tuple[list[str], list[str]] | None:
    """Split a rendered probe into slots and the template's text around them.

    Args:
        text: The rendered probe.
        slots: The slot of each mark.

    Returns:
        The slots in the order of the text, and the template's text before, between and behind
        them. None if the template dropped, repeated or moved a message, which cannot be inverted.
    """
    numbers = [int(n) for n in _MARK.findall(text)]
    pieces = _MARK.split(text)[::2]
    found, seen, first = [], set(), []
    for n in numbers:
        again = n in seen
        if again and slots[n] not in _REPEATED:
            return None
        # A call's id is written again as its result's id.
        found.append((TOOL_ID if slots[n] == CALL_ID else AGAIN) if again else slots[n])
        seen.add(n)
        if not again and slots[n] not in _UNWRITTEN:
            first.append(n)
    if first != [n for n, slot in enumerate(slots) if slot not in _UNWRITTEN]:
        return None
    return _with_json(found, pieces)


def _with_json(slots: Sequence[str], pieces: Sequence[str]) -> tuple[list[str], list[str]]:
    """Merge the keys and values of a JSON object into one slot that includes the braces."""
    found: list[str] = []
    words = [pieces[0]]
    i = 0
    while i < len(slots):
        n = 0
        while slots[i + n : i + n + 2] == [KEY, VALUE]:
            n += 2
        inner = pieces[i + 1 : i + n]
        spelled = [re.fullmatch(('": ?"', '", ?"')[k % 2], piece) for k, piece in enumerate(inner)]
        as_json = n and all(spelled) and words[-1].endswith('{"')
        if as_json and pieces[i + n].startswith('"}'):
            found.append(ARGUMENTS)
            words[-1] = words[-1].removesuffix('{"')
            words.append(pieces[i + n].removeprefix('"}'))
            i += n
            continue
        found.append(slots[i])
        words.append(pieces[i + 1])
        i += 1
    return found, words
