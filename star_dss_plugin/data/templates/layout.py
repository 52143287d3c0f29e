"""Locate each message in a rendered conversation.

The conversation is rendered a second time with marks in place of its contents. The text between the
marks is the *scaffold*: what the template writes around messages. Filled with the contents, the
scaffold must equal the rendered text, character by character; then every message's position is
certain. Conversations of the same form (roles, fields and white space) share a scaffold, so the
second rendering is needed only once per form.
"""

from __future__ import annotations

import json
import re
from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import accumulate
from typing import Any

from star_dss_plugin.data.templates.chat import ChatTokenizer
from star_dss_plugin.data.templates.tool_calls import call_spans, calls_of, named
from star_dss_plugin.errors import DataError

__all__ = ["TAGS", "Layout", "Turn", "generated_spans", "lay_out"]

_OPEN, _CLOSE, _BEGIN, _END = "\ue0f0", "\ue0f1", "\ue0f2", "\ue0f3"
_SCAFFOLDS = 2048  # cached at most, each about as long as a conversation
_SPOKEN = ("reasoning_content", "reasoning", "thinking", "tool_plan", "content")
TAGS = re.compile(
    r"(</?think>|</?thought>|</?tool_response>|\[/?THINK\]|<\|(?:START|END)_THINKING\|>)"
)
"""Tags that templates search for in a content; marks must not replace them."""
_GENERATION = re.compile(r"\{%([-+]?)\s*(end)?generation\s*([-+]?)%\}")


@dataclass(frozen=True)
class Turn:
    """One assistant turn in a rendered conversation; positions are in characters.

    Attributes:
        message: The message's index.
        begin: Where the turn begins: the end of the generation prompt.
        words: Spans [start, end) of the reasoning, content and tool calls, in order. A turn without
            text has one empty span.
        whole: Whether the words are exactly the message's content.
        right: Where the next message's text begins, or the conversation's end.
        calls: Whether the turn ends with a tool call.
    """

    message: int
    begin: int
    words: tuple[tuple[int, int], ...]
    whole: bool
    right: int
    calls: bool = False


@dataclass(frozen=True)
class Layout:
    """A rendered conversation and the positions of its messages, in characters.

    Attributes:
        text: The rendered conversation.
        turns: The assistant turns that it contains, in order.
        others: (start, end, message index) of the text of other roles, in order.
        generated: Spans that the template marks with `{% generation %}`; None if it marks none.
    """

    text: str
    turns: tuple[Turn, ...]
    others: tuple[tuple[int, int, int], ...]
    generated: tuple[tuple[int, int], ...] | None

    def turns_in(self, start: int, end: int) -> tuple[Turn, ...]:
        """Return the turns with words between two characters."""
        first = bisect_left(self.turns, start, key=lambda turn: turn.words[-1][1])
        last = bisect_right(self.turns, end, key=lambda turn: turn.words[0][0])
        return self.turns[first:last]


@dataclass(frozen=True)
class _Mark:
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


def lay_out(
    chat: ChatTokenizer, messages: Sequence[Mapping[str, Any]], arguments: Mapping[str, Any]
) -> tuple[str, Layout | None]:
    """Render a conversation and locate its messages.

    Args:
        chat: The tokenizer and its template.
        messages: The conversation as it is given.
        arguments: Template variables.

    Returns:
        The text and its layout. The layout is None if the messages' positions are uncertain because
        the template rewrites contents.

    Raises:
        DataError: The template cannot render the messages.
    """
    text = chat.render(messages, **arguments)
    for empty in (True, False):
        marked, marks, opening, form = _marked(messages, arguments, empty, _reads_tags(chat.source))
        if form not in chat.scaffolds:
            if len(chat.scaffolds) >= _SCAFFOLDS:
                chat.scaffolds.clear()
            chat.scaffolds[form] = _scaffold(chat, marked, arguments, opening)
        found = _fill(text, chat.scaffolds[form], marks)
        if found is not None:
            return text, _layout(chat, text, messages, marks, *found)
        if all(mark.text for mark in marks):
            break
    return text, None


def _marked(
    messages: Sequence[Mapping[str, Any]], arguments: Mapping[str, Any], empty: bool, tags: bool
) -> tuple[list[dict[str, Any]], list[_Mark], str, str]:
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
        marks: list[_Mark] = []
        marked = [
            _marked_message(k, m, marks, opening, empty, tags) for k, m in enumerate(messages)
        ]
        shown = json.dumps([marked, dict(arguments)], default=repr, ensure_ascii=False)
        if shown.count(opening) == len(marks):
            return marked, marks, opening, opening + shown
        opening += _OPEN  # the data contains the opening, perhaps an attacker's


def _marked_message(
    k: int, message: Mapping[str, Any], marks: list[_Mark], opening: str, empty: bool, tags: bool
) -> dict[str, Any]:
    def mark(text: str, lead: str = "", trail: str = "", call: int | None = None) -> str:
        marks.append(_Mark(k, text, lead, trail, call))
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
    for name in _SPOKEN:
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
            named(call, mark(name, call=n)) if isinstance(name, str) and name else call
            for n, (call, name, _) in enumerate(calls)
        ]
    return made


def _scaffold(
    chat: ChatTokenizer,
    marked: Sequence[Mapping[str, Any]],
    arguments: Mapping[str, Any],
    opening: str,
) -> list[str] | None:
    """Render a conversation with marks, and split it at marks and signs.

    Returns:
        A flat list of triples: a literal text, then a mark's number or None, then a sign (see
        `_with_signs`) or None. A literal text ends the list. None if rendering the marks fails.
    """
    try:
        text = chat.render(marked, **{**arguments, **_with_signs(chat, opening)})
    except DataError:
        return None
    return re.split(f"{opening}(?:([0-9]+){_CLOSE}|({_BEGIN}|{_END}))", text)


def _with_signs(chat: ChatTokenizer, opening: str) -> dict[str, str]:
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
    if not (signed := _with_signs(chat, opening)):
        return None
    pieces = re.split(
        f"{opening}[{_BEGIN}{_END}]", chat.render(messages, **{**arguments, **signed})
    )
    if "".join(pieces) != text:
        return None
    at = list(accumulate(map(len, pieces)))[:-1]
    return tuple(zip(at[::2], at[1::2], strict=True))


def _fill(
    text: str, scaffold: Sequence[str] | None, marks: Sequence[_Mark]
) -> tuple[list[tuple[int, int, _Mark]], list[int]] | None:
    """Fill a scaffold with the contents, and compare the result with the rendered text.

    Returns:
        (start, end, mark) of each mark, and the positions where generated text alternately begins
        and ends; None if the texts differ.
    """
    if scaffold is None:
        return None
    places: list[tuple[int, int, _Mark]] = []
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


def _layout(
    chat: ChatTokenizer,
    text: str,
    messages: Sequence[Mapping[str, Any]],
    marks: Sequence[_Mark],
    places: Sequence[tuple[int, int, _Mark]],
    generated: Sequence[int],
) -> Layout | None:
    """Return the layout of a filled scaffold; None if a turn is repeated or out of order."""
    spoken = [m["role"] == "assistant" for m in messages]
    expected = Counter(mark.message for mark in marks)
    seen: set[int] = set()
    groups: list[list[tuple[int, int, _Mark]]] = []
    for place in places:
        mark = place[2]
        again = id(mark) in seen
        seen.add(id(mark))
        if mark.call is not None and again:
            continue  # a template may repeat a function's name with the function's result
        if groups and groups[-1][0][2].message == mark.message:
            groups[-1].append(place)
        else:
            groups.append([place])
        if again and spoken[mark.message]:
            return None
    turns: list[Turn] = []
    others: list[tuple[int, int, int]] = []
    for i, group in enumerate(groups):
        k = group[0][2].message
        if not spoken[k]:
            others += [(start, end, k) for start, end, _ in group]
            continue
        if turns and k <= turns[-1].message:
            return None
        left = groups[i - 1][-1][1] if i else 0
        right = groups[i + 1][0][0] if i + 1 < len(groups) else len(text)
        begin = _begin(chat, text, left, group[0])
        words = _words(chat, text, group, begin, right, messages[k])
        content_only = all(mark.call is None for _, _, mark in group)
        whole = content_only and len(group) == expected[k] and not _reasons(chat, messages[k])
        calls = group[-1][2].call is not None
        turns.append(Turn(k, begin, tuple(words), whole, right, calls))
    spans = tuple(zip(generated[::2], generated[1::2], strict=True)) if generated else None
    return Layout(text, tuple(turns), tuple(others), spans)


@cache
def _reads_tags(template: str) -> bool:
    """Return whether a template searches contents for reasoning tags."""
    return bool(TAGS.search(template))


def _has_tags(text: str) -> bool:
    """Return whether a text contains reasoning tags."""
    return ("<" in text or "[" in text) and bool(TAGS.search(text))


def _reasons(chat: ChatTokenizer, message: Mapping[str, Any]) -> bool:
    """Return whether a message has reasoning, in a field of its own or in tags in its content."""
    content = message.get("content")
    if any(isinstance(message.get(n), str) and message[n].strip() for n in _SPOKEN[:-1]):
        return True
    return isinstance(content, str) and _reads_tags(chat.source) and _has_tags(content)


def _begin(chat: ChatTokenizer, text: str, left: int, place: tuple[int, int, _Mark]) -> int:
    """Return where a turn begins: after the generation prompt, or else at its first text."""
    first, _, mark = place
    at = text.rfind(chat.header, left, first) if chat.header else -1
    if at >= 0:
        return at + len(chat.header)
    if mark.call is None:
        return first
    # Before a tool call's function name the template writes text of its own.
    return max((m.end() for m in chat.added.finditer(text, left, first)), default=first)


def _words(
    chat: ChatTokenizer,
    text: str,
    group: Sequence[tuple[int, int, _Mark]],
    begin: int,
    right: int,
    message: Mapping[str, Any],
) -> list[tuple[int, int]]:
    """Return the spans of a turn's words, with the white space of the message around them."""
    found: list[tuple[int, int]] = []
    calls = calls_of(message)
    for i, (start, end, mark) in enumerate(group):
        limit = group[i + 1][0] if i + 1 < len(group) else right
        reached = found[-1][1] if found else begin
        if mark.call is not None:
            spans = call_spans(text, (reached, start, end, limit), calls[mark.call][2], chat.added)
            found += spans
            continue
        if mark.lead and text.endswith(mark.lead, reached, start):
            start -= len(mark.lead)
        if mark.trail and text.startswith(mark.trail, end, limit):
            end += len(mark.trail)
        found.append((start, end))
    return found
