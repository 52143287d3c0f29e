"""Conversations of marks: what a chat template writes between them is what it writes around words.

A mark stands in a *slot*: what a user says, a thought, the name of a function that is called, a key
or a value of its arguments. Templates that write arguments as JSON have one slot for all of them.
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
    "probe",
]

THOUGHT, CALL, ARGUMENTS, KEY, VALUE = "reasoning", "call", "arguments", "key", "value"
CALL_ID, TOOL_ID, TOOL_NAME = "call id", "tool's call id", "tool's name"
AGAIN = "again"
"""What has been written before in the text: the name of a function, or the id of its call."""
IN_CALLS = frozenset({CALL, ARGUMENTS, KEY, VALUE, CALL_ID})
NAMES = frozenset({CALL, KEY, CALL_ID, TOOL_ID, TOOL_NAME})
"""Slots of one word."""
REASONING = ("reasoning_content", "thinking", "reasoning")
"""Fields that templates look for reasoning in."""

_MARK = re.compile("\ue0f0([0-9]+)\ue0f1")  # private use: in no template
_UNWRITTEN = frozenset({CALL_ID, TOOL_ID, TOOL_NAME})  # by most templates
_REPEATED = frozenset({CALL, *_UNWRITTEN})  # by some, where the result is
_TURN = frozenset({"thinking", "answer", "call", "bare"})

# Kinds of messages that are learned from. An assistant's turn is its parts: "thinking" is a thought
# before what is said, "call" the call of a function, "bare" one without arguments.
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


def probe(
    kinds: Sequence[str], reasoning: str, *, as_text: bool, linked: bool
) -> tuple[list[dict[str, Any]], list[str]]:
    """Return a conversation of marks, and the slot of each mark.

    Args:
        kinds: Of its messages, as in `PROBES`.
        reasoning: The field for thoughts.
        as_text: Whether calls have their arguments as JSON text.
        linked: Whether results have the ids of their calls, and a function's name.
    """
    slots: list[str] = []

    def mark(slot: str) -> str:
        slots.append(slot)
        # Nine characters: templates may ask that of an id.
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
    """Take a rendered probe apart.

    Args:
        text: The rendered probe.
        slots: Of its marks.

    Returns:
        The slots in the order of the text, and the template's own words before, between and behind
        them; None if a message was dropped, written twice or moved: then there is no way back.
    """
    numbers = [int(n) for n in _MARK.findall(text)]
    pieces = _MARK.split(text)[::2]
    found, seen, first = [], set(), []
    for n in numbers:
        again = n in seen
        if again and slots[n] not in _REPEATED:
            return None
        # The id of a call stands with its result too.
        found.append((TOOL_ID if slots[n] == CALL_ID else AGAIN) if again else slots[n])
        seen.add(n)
        if not again and slots[n] not in _UNWRITTEN:
            first.append(n)
    if first != [n for n, slot in enumerate(slots) if slot not in _UNWRITTEN]:
        return None
    return _with_json(found, pieces)


def _with_json(slots: Sequence[str], pieces: Sequence[str]) -> tuple[list[str], list[str]]:
    """Make one slot of arguments that are written as a JSON object, braces included."""
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
