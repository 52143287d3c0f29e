"""Find where each message stands in a rendered conversation.

The template is rendered once with marks in place of what is said, which shows what it writes around
messages: the *scaffold*. Filled with what is said, the scaffold must give the rendered text,
character by character; then every message's place is known, and nothing was guessed. Conversations
of one form (the same roles, fields and white space) share a scaffold, so that each of them is
rendered once.
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
_SCAFFOLDS = 2048  # kept at most, each about as long as a conversation
_SPOKEN = ("reasoning_content", "reasoning", "thinking", "tool_plan", "content")
TAGS = re.compile(
    r"(</?think>|</?thought>|</?tool_response>|\[/?THINK\]|<\|(?:START|END)_THINKING\|>)"
)
"""What templates look for in a content, which stays in its place."""
_GENERATION = re.compile(r"\{%([-+]?)\s*(end)?generation\s*([-+]?)%\}")


@dataclass(frozen=True)
class Turn:
    """One assistant's turn in a rendered conversation.

    Attributes:
        message: Its index.
        begin: First character behind what the template writes before an answer.
        words: Spans of what is said: reasoning, content and tool calls, in order. A turn that says
            nothing has an empty span.
        whole: Whether the words are the message's content and nothing else.
        right: Where the next words of another message begin, or the text ends.
        calls: Whether the turn ends with a call of a function.
    """

    message: int
    begin: int
    words: tuple[tuple[int, int], ...]
    whole: bool
    right: int
    calls: bool = False


@dataclass(frozen=True)
class Layout:
    """A rendered conversation, and where everything stands in it.

    Attributes:
        text: The rendered conversation.
        turns: The assistant's turns that stand in it, in order.
        others: (first character, one past the last, message) of what others say, in order.
        generated: What the template itself marks as generated; None if it marks nothing.
    """

    text: str
    turns: tuple[Turn, ...]
    others: tuple[tuple[int, int, int], ...]
    generated: tuple[tuple[int, int], ...] | None

    def turns_in(self, start: int, end: int) -> tuple[Turn, ...]:
        """Return the turns that say something within some characters."""
        first = bisect_left(self.turns, start, key=lambda turn: turn.words[-1][1])
        last = bisect_right(self.turns, end, key=lambda turn: turn.words[0][0])
        return self.turns[first:last]


@dataclass(frozen=True)
class _Mark:
    """What stands in one place: some words of a message, or the name of a function it calls."""

    message: int
    text: str
    lead: str = ""
    trail: str = ""
    call: int | None = None


def lay_out(
    chat: ChatTokenizer, messages: Sequence[Mapping[str, Any]], arguments: Mapping[str, Any]
) -> tuple[str, Layout | None]:
    """Render a conversation and find its messages.

    Args:
        chat: The tokenizer and its template.
        messages: The conversation as it is given.
        arguments: Of the template.

    Returns:
        The text, and its layout; None where the messages' places are not certain, because the
        template rewrites what is said.

    Raises:
        DataError: The template cannot render the messages.
    """
    text = chat.render(messages, **arguments)
    for empty in (True, False):
        marked, marks, opening, form = _marked(messages, arguments, empty, _minds_tags(chat.source))
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
    """Put marks in place of what is said.

    Args:
        messages: The conversation.
        arguments: Of the template; they must not look like marks either.
        empty: Whether a content that says nothing gets a mark too.
        tags: Whether the template looks for tags of thought in a content.

    Returns:
        The conversation with marks, what each mark stands for, how marks begin, and the form:
        conversations that have the same one share a scaffold.
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
        opening += _OPEN  # the data holds it: it may come from an attacker


def _marked_message(
    k: int, message: Mapping[str, Any], marks: list[_Mark], opening: str, empty: bool, tags: bool
) -> dict[str, Any]:
    def mark(text: str, lead: str = "", trail: str = "", call: int | None = None) -> str:
        marks.append(_Mark(k, text, lead, trail, call))
        return f"{opening}{len(marks) - 1}{_CLOSE}"

    def of_text(text: str, empty: bool) -> str:
        if not text.strip():
            return text + mark("", text) if empty else text
        # To a template that knows no such tags they are words like any other.
        pieces = TAGS.split(text) if tags and _has_tags(text) else [text]
        made = []
        for i, piece in enumerate(pieces):
            body = piece.strip()
            if i % 2 or not body:
                made.append(piece)
                continue
            before, _, behind = piece.partition(body)
            # White space beside a tag is the tag's.
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
    """Render a conversation with marks: literal texts, with a mark's number or a sign between."""
    try:
        text = chat.render(marked, **{**arguments, **_signed(chat, opening)})
    except DataError:
        return None
    return re.split(f"{opening}(?:([0-9]+){_CLOSE}|({_BEGIN}|{_END}))", text)


def _signed(chat: ChatTokenizer, opening: str) -> dict[str, str]:
    """Return the argument for a template that writes signs where generated text begins and ends."""
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
    """Return what the template marks as generated, wherever messages stand.

    Args:
        chat: The tokenizer and its template.
        messages: The conversation.
        arguments: Of the template.
        text: The rendered conversation.

    Returns:
        Spans of `text`; None if the template marks nothing.
    """
    opening = _OPEN
    while opening in text:
        opening += _OPEN
    if not (signed := _signed(chat, opening)):
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
    """Compare a text with a filled scaffold.

    Returns:
        Where marks stand, and where what is generated begins and ends in turn; None if the texts
        differ.
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
    """Return the layout of a filled scaffold; None if a turn stands in several places."""
    spoken = [m["role"] == "assistant" for m in messages]
    expected = Counter(mark.message for mark in marks)
    seen: set[int] = set()
    groups: list[list[tuple[int, int, _Mark]]] = []
    for place in places:
        mark = place[2]
        again = id(mark) in seen
        seen.add(id(mark))
        if mark.call is not None and again:
            continue  # a function's name may be written again where its result is
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
def _minds_tags(template: str) -> bool:
    """Return whether a template looks for tags of thought in what a turn says."""
    return bool(TAGS.search(template))


def _has_tags(text: str) -> bool:
    """Return whether tags of thought stand in a text."""
    return ("<" in text or "[" in text) and bool(TAGS.search(text))


def _reasons(chat: ChatTokenizer, message: Mapping[str, Any]) -> bool:
    """Return whether a message says something beside its content, or marks parts of it."""
    content = message.get("content")
    if any(isinstance(message.get(n), str) and message[n].strip() for n in _SPOKEN[:-1]):
        return True
    return isinstance(content, str) and _minds_tags(chat.source) and _has_tags(content)


def _begin(chat: ChatTokenizer, text: str, left: int, place: tuple[int, int, _Mark]) -> int:
    """Return where an answer begins: behind the template's header, or with its first word."""
    first, _, mark = place
    at = text.rfind(chat.header, left, first) if chat.header else -1
    if at >= 0:
        return at + len(chat.header)
    if mark.call is None:
        return first
    # A call has words of the template's before the function's name.
    return max((m.end() for m in chat.added.finditer(text, left, first)), default=first)


def _words(
    chat: ChatTokenizer,
    text: str,
    group: Sequence[tuple[int, int, _Mark]],
    begin: int,
    right: int,
    message: Mapping[str, Any],
) -> list[tuple[int, int]]:
    """Return the spans of what a turn says, with the white space that belongs to it."""
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
