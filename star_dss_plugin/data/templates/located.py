"""Locate a row's tokens in its rendered conversation, and return the text in and before them."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Any

from star_dss_plugin.data.conversations import (
    conversation_of,
    source_messages,
    template_arguments,
    text_message,
)
from star_dss_plugin.data.decoding import REPLACEMENT, token_boundaries
from star_dss_plugin.data.requests import Message
from star_dss_plugin.data.templates.chat import ChatTokenizer
from star_dss_plugin.data.templates.encoded import Encoded
from star_dss_plugin.data.templates.layout import Layout, Turn, render_with_layout
from star_dss_plugin.data.templates.tokenized import Tokenized
from star_dss_plugin.data.token_bytes import byte_offsets, is_byte_level

__all__ = ["LocatedRow", "locate", "locate_by_bytes"]

_SEPARATOR = "\n\n"
"""Replaces the template's text between two spans of an assistant's words."""
_SYSTEM_ROLES = ("system", "developer")


def locate_by_bytes(
    chat: ChatTokenizer, ids: Sequence[int], row: Mapping[str, Any]
) -> LocatedRow | None:
    """Locate a row's tokens by their bytes, without tokenizing its conversation.

    Returns:
        None if the row has no conversation or no certain layout, or if the tokens' bytes are
        unknown or not a prefix of the rendered conversation.
    """
    if conversation_of(row) is None and not isinstance(row.get("prompt"), list):
        return None
    if not is_byte_level(chat.tokenizer):
        return None
    source = source_messages(row)
    assert source is not None
    text, layout = render_with_layout(chat, source, template_arguments(row))
    if layout is None:
        return None
    bos = chat.tokenizer.bos_token_id
    for skipped in (0, 1) if bos is not None and ids[:1] == [bos] else (0,):
        places = byte_offsets(chat.tokenizer, ids[skipped:], text)
        if places is not None:
            starts, ends, exact = places
            head = [0] * skipped
            exact = exact and not skipped
            return LocatedRow(
                layout, source, Encoded(list(ids), head + starts, head + ends, exact), True
            )
    return None


def locate(chat: ChatTokenizer, ids: Sequence[int], tokenized: Tokenized) -> LocatedRow | None:
    """Locate a row's tokens among those of its conversation; None if they do not occur there."""
    if tokenized.layout is None or tokenized.source is None:
        return None
    full = tokenized.encoded
    bos = chat.tokenizer.bos_token_id
    # A host may have put a bos token before the template's text.
    for skipped in (0, 1) if bos is not None and ids[:1] == [bos] else (0,):
        rest = list(ids[skipped:])
        if rest == full.ids and not skipped:
            return LocatedRow(tokenized.layout, tokenized.source, full, True)
        for start in (0, len(full.ids) - len(rest)):
            cut = slice(start, start + len(rest))
            if start >= 0 and full.ids[cut] == rest:
                first = full.starts[start] if start < len(full.starts) else 0
                starts, ends = full.starts[cut], full.ends[cut]
                head = [first] * skipped
                exact = full.exact and not skipped
                places = Encoded(list(ids), head + starts, head + ends, exact)
                return LocatedRow(tokenized.layout, tokenized.source, places, start == 0)
    # Hosts may tokenize the text in pieces, which gives other tokens for the same text.
    text, reached, _ = token_boundaries(chat.tokenizer, ids)
    if tokenized.text.startswith(text.rstrip(REPLACEMENT)):
        places = Encoded(list(ids), [0, *reached[:-1]], reached)
        return LocatedRow(tokenized.layout, tokenized.source, places, True)
    return None


@dataclass(frozen=True)
class LocatedRow:
    """A row's tokens and their positions in its rendered conversation.

    Attributes:
        layout: The conversation's layout.
        source: The conversation's messages.
        tokens: The row's tokens, with offsets into the conversation's text.
        from_start: Whether the tokens begin at the conversation's beginning.
    """

    layout: Layout
    source: Sequence[Mapping[str, Any]]
    tokens: Encoded
    from_start: bool

    def turn_text(
        self, chat: ChatTokenizer, turns: Sequence[Turn], start: int, end: int
    ) -> tuple[str, list[int], list[bool]]:
        """Return the words of turns in the tokens [start, end).

        Returns:
            `text`, `ends` and `complete` as in `context.RunText`.
        """
        text, tokens = self.layout.text, self.tokens
        first, last = tokens.starts[start], tokens.ends[end - 1]
        if tokens.exact:
            spans = _clipped((span for turn in turns for span in turn.words), first, last)
            return *_joined(text, tokens.ends[start:end], spans), [True] * (end - start)
        known = text[first:last]
        decoded, ends, complete = token_boundaries(chat.tokenizer, tokens.ids[start:end], known)
        spans = self._turn_spans(turns, start, end, decoded, ends)
        return *_joined(decoded, ends, spans), complete

    def turns(self, start: int, end: int) -> tuple[Turn, ...]:
        """Return the assistant turns in the tokens [start, end); none if another role speaks there.

        The first token may contain the end of a user's turn, and the last the beginning of the
        next.
        """
        starts, ends, others = self.tokens.starts, self.tokens.ends, self.layout.others
        low = bisect_right(others, ends[start], key=lambda other: other[1])
        high = bisect_left(others, starts[end - 1], key=lambda other: other[0])
        inside = others[low : high + 1] if low < high else others[low : low + 1]
        if low < high or any(starts[start] <= a and b <= ends[end - 1] for a, b, _ in inside):
            return ()
        return self.layout.turns_in(starts[start], ends[end - 1])

    def other_role(self, start: int, end: int) -> str | None:
        """Return the other role that speaks in the tokens [start, end).

        Only tokens that lie entirely within that role's words count.

        Returns:
            None if an assistant speaks there too, or no other role does.
        """
        starts, ends = self.tokens.starts, self.tokens.ends
        if self.layout.turns_in(starts[start], ends[end - 1]):
            return None
        for a, b, k in self.layout.others:
            low, high = bisect_left(starts, a, start, end), bisect_right(ends, b, start, end)
            if low < high and self.layout.text[starts[low] : ends[high - 1]].strip():
                return str(self.source[k]["role"])
        return None

    def _turn_spans(
        self, turns: Sequence[Turn], start: int, end: int, text: str, ends: Sequence[int]
    ) -> list[tuple[int, int]]:
        """Return the spans of decoded tokens that are words of turns.

        Args:
            turns: The turns that the tokens belong to.
            start: The first token.
            end: One past the last token.
            text: The decoded text of the tokens.
            ends: The length of `text` after each token.
        """
        first = self.tokens.starts[start]
        spans = [span for turn in turns for span in turn.words]
        known = text if self.layout.text.startswith(text, first) else text.rstrip(REPLACEMENT)
        if self.layout.text.startswith(known, first):
            return _clipped(((a - first, b - first) for a, b in spans), 0, len(known))
        # The decoded text differs from the rendered one: normalised (NFC), or with spaces that the
        # tokenizer added (SentencePiece).
        found = []
        for a, b in spans:
            low = bisect_right(self.tokens.ends, a, start, end)
            high = bisect_left(self.tokens.starts, b, start, end)
            begin = ends[low - start - 1] if low > start else 0
            piece = text[begin : ends[high - start - 1]] if low < high else ""
            if piece.strip():
                begin += len(piece) - len(piece.lstrip())
                found.append((begin, begin + len(piece.strip())))
        return found

    def text_before(self, turn: Turn, start: int) -> str:
        """Return a turn's words before a token, separated from the token's own words."""
        first = self.tokens.starts[start]
        earlier = [(a, min(b, first)) for a, b in turn.words if a < first]
        said = _SEPARATOR.join(self.layout.text[a:b] for a, b in earlier)
        goes_on = any(a < first < b for a, b in turn.words)
        return said if goes_on or not said else said + _SEPARATOR

    def context(self, turn: Turn, start: int) -> tuple[Message, ...] | None:
        """Return the messages before a turn that also precede the token `start`.

        System messages that the template leaves out or moves behind the token are excluded.

        Returns:
            None if the text before the token has other messages than those before the turn.
        """
        k = turn.message
        first = self.tokens.starts[start]
        before = bisect_right(self.layout.others, first, key=lambda other: other[1])
        last = self._latest_messages[before - 1] if before else -1
        if not self.from_start or last > k or k > self._first_missing:
            return None
        unread = {m for m, end in self._system_ends.items() if m < k and not 0 < end <= first}
        return tuple(message for m, message in enumerate(self._messages[:k]) if m not in unread)

    @cached_property
    def _system_ends(self) -> dict[int, int]:
        """The position where each system message ends; 0 if the template leaves the message out.

        Templates may drop a system message or move it into a later user turn; the model does not
        see it before that.
        """
        found = {
            k: 0
            for k, message in enumerate(self._messages)
            if message["role"] in _SYSTEM_ROLES and str(message["content"]).strip()
        }
        for _, end, k in reversed(self.layout.others) if found else ():
            if k in found:
                found[k] = end
        return found

    @cached_property
    def _latest_messages(self) -> list[int]:
        """The largest message index up to each entry of `layout.others`; templates may reorder."""
        return list(accumulate((m for _, _, m in self.layout.others), max))

    @cached_property
    def _first_missing(self) -> int:
        """The index of the first user or tool message that the text lacks.

        `len(_messages)` if it lacks none.
        """
        there = {m for _, _, m in self.layout.others}
        missing = (
            k
            for k, message in enumerate(self._messages)
            if message["role"] not in ("assistant", *_SYSTEM_ROLES)
            and str(message["content"]).strip()
            and k not in there
        )
        return next(missing, len(self._messages))

    @cached_property
    def _messages(self) -> list[Message]:
        """The messages, with the assistant's contents as the template rendered them."""
        said = [text_message(message) for message in self.source]
        there = {turn.message: turn for turn in self.layout.turns}
        for k, message in enumerate(said):
            if message["role"] == "assistant" and not (k in there and there[k].whole):
                words = [self.layout.text[a:b] for a, b in there[k].words] if k in there else []
                content = _SEPARATOR.join(word for word in words if word.strip())
                said[k] = {"role": "assistant", "content": content}
        return said


def _clipped(spans: Iterable[tuple[int, int]], first: int, last: int) -> list[tuple[int, int]]:
    """Return the parts of spans that lie within [first, last)."""
    cut = ((max(a, first), min(b, last)) for a, b in spans)
    return [(a, b) for a, b in cut if a < b]


def _joined(
    text: str, ends: Sequence[int], spans: Sequence[tuple[int, int]]
) -> tuple[str, list[int]]:
    """Join spans of a text.

    Args:
        text: Any text.
        ends: The length of `text` after each token; never decreasing.
        spans: Non-empty spans in order.

    Returns:
        The joined text, and its length after each token.
    """
    parts: list[str] = []
    reached: list[int] = []
    length = 0
    for n, (a, b) in enumerate(spans):
        reached += [length] * (bisect_right(ends, a) - len(reached))
        if n:
            between = text[spans[n - 1][1] : a]
            parts.append(_SEPARATOR if between.strip() else between)
            length += len(parts[-1])
        moved = length - a
        inside = ends[len(reached) : bisect_left(ends, b)]
        reached += [end + moved for end in inside] if moved else inside
        parts.append(text[a:b])
        length += b - a
    return "".join(parts), reached + [length] * (len(ends) - len(reached))
