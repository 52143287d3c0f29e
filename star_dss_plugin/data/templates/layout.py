"""Locate each message in a rendered conversation.

The conversation is rendered a second time with marks in place of its contents. The text between the
marks is the *scaffold*: what the template writes around messages. Filled with the contents, the
scaffold must equal the rendered text, character by character; then every message's position is
certain. Conversations of the same form (roles, fields and white space) share a scaffold, so the
second rendering is needed only once per form.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from star_dss_plugin.data.templates.chat import ChatTokenizer
from star_dss_plugin.data.templates.scaffold import (
    Mark,
    fill_scaffold,
    has_reasoning,
    mark_contents,
    reads_tags,
    render_scaffold,
)
from star_dss_plugin.data.templates.tool_calls import call_spans, calls_of

__all__ = ["Layout", "Turn", "render_with_layout"]

_SCAFFOLDS = 2048  # cached at most, each about as long as a conversation


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


def render_with_layout(
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
        marked, marks, opening, form = mark_contents(
            messages, arguments, empty, reads_tags(chat.source)
        )
        if form not in chat.scaffolds:
            if len(chat.scaffolds) >= _SCAFFOLDS:
                chat.scaffolds.clear()
            chat.scaffolds[form] = render_scaffold(chat, marked, arguments, opening)
        found = fill_scaffold(text, chat.scaffolds[form], marks)
        if found is not None:
            return text, _layout(chat, text, messages, marks, *found)
        if all(mark.text for mark in marks):
            break
    return text, None


def _layout(
    chat: ChatTokenizer,
    text: str,
    messages: Sequence[Mapping[str, Any]],
    marks: Sequence[Mark],
    places: Sequence[tuple[int, int, Mark]],
    generated: Sequence[int],
) -> Layout | None:
    """Return the layout of a filled scaffold; None if a turn is repeated or out of order."""
    spoken = [m["role"] == "assistant" for m in messages]
    expected = Counter(mark.message for mark in marks)
    seen: set[int] = set()
    groups: list[list[tuple[int, int, Mark]]] = []
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
        begin = _turn_begin(chat, text, left, group[0])
        words = _turn_spans(chat, text, group, begin, right, messages[k])
        content_only = all(mark.call is None for _, _, mark in group)
        whole = content_only and len(group) == expected[k] and not has_reasoning(chat, messages[k])
        calls = group[-1][2].call is not None
        turns.append(Turn(k, begin, tuple(words), whole, right, calls))
    spans = tuple(zip(generated[::2], generated[1::2], strict=True)) if generated else None
    return Layout(text, tuple(turns), tuple(others), spans)


def _turn_begin(chat: ChatTokenizer, text: str, left: int, place: tuple[int, int, Mark]) -> int:
    """Return where a turn begins: after the generation prompt, or else at its first text."""
    first, _, mark = place
    at = text.rfind(chat.header, left, first) if chat.header else -1
    if at >= 0:
        return at + len(chat.header)
    if mark.call is None:
        return first
    # Before a tool call's function name the template writes text of its own.
    return max((m.end() for m in chat.added.finditer(text, left, first)), default=first)


def _turn_spans(
    chat: ChatTokenizer,
    text: str,
    group: Sequence[tuple[int, int, Mark]],
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
