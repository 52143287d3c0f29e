"""Render a conversation with marks in place of its contents, and fill them in again.

The text between the marks is the *scaffold*: what the template writes around messages.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import accumulate
from typing import Any

from star_dss_plugin.data.templates.chat import ChatTokenizer
from star_dss_plugin.data.templates.tool_calls import calls_of, with_function_name
from star_dss_plugin.errors import DataError

__all__ = [
    "TAGS",
    "Mark",
    "fill_scaffold",
    "generated_spans",
    "has_reasoning",
    "mark_contents",
    "reads_tags",
    "render_scaffold",
]

_OPEN, _CLOSE, _BEGIN, _END = "\ue0f0", "\ue0f1", "\ue0f2", "\ue0f3"
_TEXT_FIELDS = ("reasoning_content", "reasoning", "thinking", "tool_plan", "content")
TAGS = re.compile(
    r"(</?think>|</?thought>|</?tool_response>|\[/?THINK\]|<\|(?:START|END)_THINKING\|>)"
)
"""Tags that templates search for in a content; marks must not replace them."""
_GENERATION = re.compile(r"\{%([-+]?)\s*(end)?generation\s*([-+]?)%\}")


@dataclass(frozen=True)
class Mark:
    """What a mark replaces: a text of a message, or the name of a function that it calls.

    Attributes:
        message: The message's index.
        text: The text, without white space around it.
        lead: White space before the text.
        trail: White space behind it.
        call: The tool call's index, if `text` is a function's name.
    """

    message: int
    text: str
    lead: str = ""
    trail: str = ""
    call: int | None = None


def mark_contents(
    messages: Sequence[Mapping[str, Any]], arguments: Mapping[str, Any], empty: bool, tags: bool
) -> tuple[list[dict[str, Any]], list[Mark], str, str]:
    """Replace a conversation's contents by marks.

    Args:
        messages: The conversation.
        arguments: Template variables, which must not contain marks either.
        empty: Whether a blank content gets a mark too.
        tags: Whether the template searches contents for reasoning tags.

    Returns:
        The conversation with marks, what each mark replaces, the string that opens a mark, and the
        conversation's form: the key of its scaffold.
    """
    opening = _OPEN
    while True:
        marks: list[Mark] = []
        marked = [_mark_message(k, m, marks, opening, empty, tags) for k, m in enumerate(messages)]
        shown = json.dumps([marked, dict(arguments)], default=repr, ensure_ascii=False)
        if shown.count(opening) == len(marks):
            return marked, marks, opening, opening + shown
        opening += _OPEN  # the data contains the opening, perhaps an attacker's


def _mark_message(
    k: int, message: Mapping[str, Any], marks: list[Mark], opening: str, empty: bool, tags: bool
) -> dict[str, Any]:
    def mark(text: str, lead: str = "", trail: str = "", call: int | None = None) -> str:
        marks.append(Mark(k, text, lead, trail, call))
        return f"{opening}{len(marks) - 1}{_CLOSE}"

    def of_text(text: str, empty: bool) -> str:
        if not text.strip():
            return text + mark("", text) if empty else text
        # To a template that does not search for reasoning tags they are ordinary text.
        pieces = TAGS.split(text) if tags and _has_tags(text) else [text]
        made = []
        for i, piece in enumerate(pieces):
            body = piece.strip()
            if i % 2 or not body:
                made.append(piece)
                continue
            before, _, behind = piece.partition(body)
            # White space next to a tag belongs to the tag.
            shown = mark(body, before, behind) if len(pieces) == 1 else mark(body)
            made.append(before + shown + behind)
        return "".join(made)

    made = dict(message)
    alone = empty and not message.get("tool_calls")
    for name in _TEXT_FIELDS:
        said = message.get(name)
        if isinstance(said, str):
            made[name] = of_text(said, alone and name == "content")
        elif name == "content" and isinstance(said, list):
            made[name] = [
                {**part, "text": of_text(part["text"], alone and len(said) == 1)}
                if isinstance(part.get("text"), str)
                else dict(part)
                for part in said
            ]
    if calls := calls_of(message):
        made["tool_calls"] = [
            with_function_name(call, mark(name, call=n)) if isinstance(name, str) and name else call
            for n, (call, name, _) in enumerate(calls)
        ]
    return made


def render_scaffold(
    chat: ChatTokenizer,
    marked: Sequence[Mapping[str, Any]],
    arguments: Mapping[str, Any],
    opening: str,
) -> list[str] | None:
    """Render a conversation with marks, and split it at marks and signs.

    Returns:
        A flat list of triples: a literal text, then a mark's number or None, then a sign (see
        `_with_generation_signs`) or None. A literal text ends the list. None if rendering the marks
        fails.
    """
    try:
        text = chat.render(marked, **{**arguments, **_with_generation_signs(chat, opening)})
    except DataError:
        return None
    return re.split(f"{opening}(?:([0-9]+){_CLOSE}|({_BEGIN}|{_END}))", text)


def _with_generation_signs(chat: ChatTokenizer, opening: str) -> dict[str, str]:
    """Return a `chat_template` argument that writes signs at `{% generation %}` boundaries.

    Returns:
        Empty if the template has no `{% generation %}`.
    """
    begin, end = opening + _BEGIN, opening + _END

    def sign(match: re.Match[str]) -> str:
        before, ends, behind = match.groups()
        if ends:
            return f"{{%{before} set _mark = 0 %}}{{{{ '{end}' }}}}{{% endgeneration {behind}%}}"
        return f"{{%{before} generation %}}{{{{ '{begin}' }}}}{{% set _mark = 0 {behind}%}}"

    signed = _GENERATION.sub(sign, chat.source)
    return {"chat_template": signed} if signed != chat.source else {}


def generated_spans(
    chat: ChatTokenizer,
    messages: Sequence[Mapping[str, Any]],
    arguments: Mapping[str, Any],
    text: str,
) -> tuple[tuple[int, int], ...] | None:
    """Return what the template marks with `{% generation %}`, without a layout.

    Args:
        chat: The tokenizer and its template.
        messages: The conversation.
        arguments: Template variables.
        text: The rendered conversation.

    Returns:
        Spans of `text`; None if the template marks nothing.
    """
    opening = _OPEN
    while opening in text:
        opening += _OPEN
    if not (signed := _with_generation_signs(chat, opening)):
        return None
    pieces = re.split(
        f"{opening}[{_BEGIN}{_END}]", chat.render(messages, **{**arguments, **signed})
    )
    if "".join(pieces) != text:
        return None
    at = list(accumulate(map(len, pieces)))[:-1]
    return tuple(zip(at[::2], at[1::2], strict=True))


def fill_scaffold(
    text: str, scaffold: Sequence[str] | None, marks: Sequence[Mark]
) -> tuple[list[tuple[int, int, Mark]], list[int]] | None:
    """Fill a scaffold with the contents, and compare the result with the rendered text.

    Returns:
        (start, end, mark) of each mark, and the positions where generated text alternately begins
        and ends; None if the texts differ.
    """
    if scaffold is None:
        return None
    places: list[tuple[int, int, Mark]] = []
    generated: list[int] = []
    position = 0
    for i in range(0, len(scaffold), 3):
        literal = scaffold[i]
        if not text.startswith(literal, position):
            return None
        position += len(literal)
        if i + 1 == len(scaffold):
            break
        if scaffold[i + 1] is None:
            generated.append(position)
            continue
        mark = marks[int(scaffold[i + 1])]
        if not text.startswith(mark.text, position):
            return None
        places.append((position, position + len(mark.text), mark))
        position += len(mark.text)
    return (places, generated) if position == len(text) else None


@cache
def reads_tags(template: str) -> bool:
    """Return whether a template searches contents for reasoning tags."""
    return bool(TAGS.search(template))


def _has_tags(text: str) -> bool:
    """Return whether a text contains reasoning tags."""
    return ("<" in text or "[" in text) and bool(TAGS.search(text))


def has_reasoning(chat: ChatTokenizer, message: Mapping[str, Any]) -> bool:
    """Return whether a message has reasoning, in a field of its own or in tags in its content."""
    content = message.get("content")
    if any(isinstance(message.get(n), str) and message[n].strip() for n in _TEXT_FIELDS[:-1]):
        return True
    return isinstance(content, str) and reads_tags(chat.source) and _has_tags(content)
