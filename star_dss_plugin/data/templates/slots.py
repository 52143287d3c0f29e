"""Build messages from the slots of a parsed conversation."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from star_dss_plugin.data.templates.probes import (
    AGAIN,
    ARGUMENTS,
    CALL,
    CALL_ID,
    KEY,
    REASONING,
    THOUGHT,
    TOOL_ID,
    TOOL_NAME,
    VALUE,
)

__all__ = ["messages_of"]

_OF_TOOLS = {TOOL_ID: "tool_call_id", TOOL_NAME: "name"}


def messages_of(
    slots: Sequence[tuple[str, str]], reasoning: str | None, *, as_text: bool, linked: bool
) -> list[dict[str, Any]] | None:
    """Return the messages that slots form.

    Args:
        slots: (kind, text) of each slot.
        reasoning: The field for reasoning; None: the content holds it, between `<think>` tags.
        as_text: Whether call arguments stay JSON text.
        linked: Whether to give missing ids to calls and results, and the function's name to
            results.

    Returns:
        None if a call's arguments are not valid JSON or nested too deeply, or if no slot is a
        thought and `reasoning` is not the first of `REASONING` (the messages would be the same).
    """
    if not any(slot == THOUGHT for slot, _ in slots) and reasoning != REASONING[0]:
        return None
    builder = _Builder(reasoning, as_text)
    try:
        for slot, text in slots:
            builder.add(slot, text)
    except (ValueError, RecursionError):
        return None
    if linked:
        _link(builder.messages)
    return builder.messages


@dataclass
class _Builder:
    """Messages under construction.

    Attributes:
        reasoning: The field for reasoning; None: the content.
        as_text: Whether call arguments stay JSON text.
        messages: The messages so far.
        open: The assistant turn whose thought has been added and whose content comes next.
        ahead: Fields (ids, a tool's name) of a call or result that has not been added yet.
    """

    reasoning: str | None
    as_text: bool
    messages: list[dict[str, Any]] = field(default_factory=list)
    open: dict[str, Any] | None = None
    ahead: dict[str, str] = field(default_factory=dict)

    def add(self, slot: str, text: str) -> None:
        """Add a slot's text to the messages.

        Raises:
            ValueError: Arguments come before any call, or have another form than `as_text` says.
        """
        if slot == THOUGHT:
            self.open = self._turn()
            thought = f"<think>\n{text}\n</think>\n\n" if self.reasoning is None else text
            self.open[self.reasoning or "content"] = thought
        elif slot == "assistant":
            turn = self.open or self._turn()
            turn["content"] += text
            self.open = None
        elif slot in (CALL, CALL_ID, ARGUMENTS, KEY, VALUE):
            self._add_to_calls(slot, text)
        elif slot in _OF_TOOLS:
            last = self.messages[-1] if self.messages else {}
            name = _OF_TOOLS[slot]
            (last if last.get("role") == "tool" and name not in last else self.ahead)[name] = text
        elif slot != AGAIN:
            ahead = self.ahead if slot == "tool" else {}
            self.messages.append({"role": slot, "content": text, **ahead})
            self.open, self.ahead = None, {}

    def _turn(self) -> dict[str, Any]:
        self.messages.append({"role": "assistant", "content": ""})
        return self.messages[-1]

    def _add_to_calls(self, slot: str, text: str) -> None:
        last = self.messages[-1] if self.messages else {}
        calls = last.get("tool_calls", [])
        if slot == CALL:
            if last.get("role") != "assistant":
                last = self._turn()
            called = {"name": text, "arguments": "{}" if self.as_text else {}}
            call = {"type": "function", **self.ahead, "function": called}
            last.setdefault("tool_calls", []).append(call)
            self.ahead = {}
        elif slot == CALL_ID:
            (calls[-1] if calls and "id" not in calls[-1] else self.ahead)["id"] = text
        elif not calls or (self.as_text and slot != ARGUMENTS):
            raise ValueError("arguments of no call, or a part of them where they are one text")
        elif slot == ARGUMENTS:
            known = json.loads(text)
            calls[-1]["function"]["arguments"] = text if self.as_text else known
        elif slot == KEY:
            calls[-1]["function"]["arguments"][text] = ""
        else:
            # The value's type is unknown, but as a string it is rendered the same.
            arguments = calls[-1]["function"]["arguments"]
            arguments[next(reversed(arguments))] = text


def _link(messages: Sequence[dict[str, Any]]) -> None:
    """Add missing ids to calls and results, and missing function names to results.

    Results are matched to calls in order. Ids have nine characters because some templates require
    that.
    """
    count = 0
    waiting: list[dict[str, Any]] = []
    for message in messages:
        if calls := message.get("tool_calls"):
            for call in calls:
                call.setdefault("id", f"call{count:05d}")
                count += 1
            waiting = list(calls)
        elif message["role"] == "tool" and waiting:
            call = waiting.pop(0)
            message.setdefault("tool_call_id", call["id"])
            message.setdefault("name", call["function"]["name"])
