"""Find a row's tokens in its rendered conversation, and what is said before and in some of them."""

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
from star_dss_plugin.data.decoding import (
    REPLACEMENT,
    byte_places,
    spells_bytes,
    token_boundaries,
)
from star_dss_plugin.data.requests import Message
from star_dss_plugin.data.templates.chat import ChatTokenizer, Encoded
from star_dss_plugin.data.templates.layout import Layout, Turn, lay_out
from star_dss_plugin.data.templates.tokenized import Tokenized

__all__ = ["Placed", "place", "place_bytes"]

_BETWEEN = "\n\n"
"""Stands for what a template writes between two things that an assistant says."""
_INSTRUCTING = ("system", "developer")


def place_bytes(chat: ChatTokenizer, ids: Sequence[int], row: Mapping[str, Any]) -> Placed | None:
    """Find a row's tokens at the beginning of its conversation, which need not be tokenized.

    Returns:
        None if their bytes are not what the conversation begins with, or not known.
    """
    if conversation_of(row) is None and not isinstance(row.get("prompt"), list):
        return None
    if not spells_bytes(chat.tokenizer):
        return None
    source = source_messages(row)
    assert source is not None
    text, layout = lay_out(chat, source, template_arguments(row))
    if layout is None:
        return None
    bos = chat.tokenizer.bos_token_id
    for skipped in (0, 1) if bos is not None and ids[:1] == [bos] else (0,):
        places = byte_places(chat.tokenizer, ids[skipped:], text)
        if places is not None:
            starts, ends, exact = places
            head = [0] * skipped
            exact = exact and not skipped
            return Placed(
                layout, source, Encoded(list(ids), head + starts, head + ends, exact), True
            )
    return None


def place(chat: ChatTokenizer, ids: Sequence[int], made: Tokenized) -> Placed | None:
    """Find a row's tokens among those of its conversation; None if they are others."""
    if made.layout is None or made.source is None:
        return None
    full = made.encoded
    bos = chat.tokenizer.bos_token_id
    # A host may have put the token that begins texts before what the template writes.
    for skipped in (0, 1) if bos is not None and ids[:1] == [bos] else (0,):
        rest = list(ids[skipped:])
        if rest == full.ids and not skipped:
            return Placed(made.layout, made.source, full, True)
        for start in (0, len(full.ids) - len(rest)):
            cut = slice(start, start + len(rest))
            if start >= 0 and full.ids[cut] == rest:
                first = full.starts[start] if start < len(full.starts) else 0
                starts, ends = full.starts[cut], full.ends[cut]
                head = [first] * skipped
                exact = full.exact and not skipped
                places = Encoded(list(ids), head + starts, head + ends, exact)
                return Placed(made.layout, made.source, places, start == 0)
    # The same text in other tokens: hosts may tokenize it in pieces.
    text, reached, _ = token_boundaries(chat.tokenizer, ids)
    if made.text.startswith(text.rstrip(REPLACEMENT)):
        places = Encoded(list(ids), [0, *reached[:-1]], reached)
        return Placed(made.layout, made.source, places, True)
    return None


@dataclass(frozen=True)
class Placed:
    """A row's tokens in its rendered conversation.

    Attributes:
        layout: Of the conversation.
        source: Its messages.
        places: The tokens, and where they lie in the conversation's text.
        whole: Whether they begin where it begins.
    """

    layout: Layout
    source: Sequence[Mapping[str, Any]]
    places: Encoded
    whole: bool

    def said(
        self, chat: ChatTokenizer, turns: Sequence[Turn], start: int, end: int
    ) -> tuple[str, list[int], list[bool]]:
        """Return what turns say in some tokens, as `Reading` has it: text, ends, complete."""
        text, places = self.layout.text, self.places
        first, last = places.starts[start], places.ends[end - 1]
        if places.exact:
            spans = _within((span for turn in turns for span in turn.words), first, last)
            return *_joined(text, places.ends[start:end], spans), [True] * (end - start)
        known = text[first:last]
        decoded, ends, complete = token_boundaries(chat.tokenizer, places.ids[start:end], known)
        spans = self._inside(turns, start, end, decoded, ends)
        return *_joined(decoded, ends, spans), complete

    def turns(self, start: int, end: int) -> tuple[Turn, ...]:
        """Return the turns that some tokens are of; none if others speak in these tokens too.

        The first token may hold the end of a question, and the last the beginning of the next.
        """
        starts, ends, others = self.places.starts, self.places.ends, self.layout.others
        low = bisect_right(others, ends[start], key=lambda other: other[1])
        high = bisect_left(others, starts[end - 1], key=lambda other: other[0])
        inside = others[low : high + 1] if low < high else others[low : low + 1]
        if low < high or any(starts[start] <= a and b <= ends[end - 1] for a, b, _ in inside):
            return ()
        return self.layout.turns_in(starts[start], ends[end - 1])

    def other(self, start: int, end: int) -> str | None:
        """Return the role of somebody else whose words some tokens are; None if an assistant's too.

        Words that share a token with the template's, or with an assistant's, do not count.
        """
        starts, ends = self.places.starts, self.places.ends
        if self.layout.turns_in(starts[start], ends[end - 1]):
            return None
        for a, b, k in self.layout.others:
            low, high = bisect_left(starts, a, start, end), bisect_right(ends, b, start, end)
            if low < high and self.layout.text[starts[low] : ends[high - 1]].strip():
                return str(self.source[k]["role"])
        return None

    def _inside(
        self, turns: Sequence[Turn], start: int, end: int, text: str, ends: Sequence[int]
    ) -> list[tuple[int, int]]:
        """Return where some tokens' decoded text is what turns say.

        Args:
            turns: Those that the tokens are of.
            start: The first token.
            end: One past the last token.
            text: The decoded text of the tokens.
            ends: How far it reaches after each of them.
        """
        first = self.places.starts[start]
        spans = [span for turn in turns for span in turn.words]
        known = text if self.layout.text.startswith(text, first) else text.rstrip(REPLACEMENT)
        if self.layout.text.startswith(known, first):
            return _within(((a - first, b - first) for a, b in spans), 0, len(known))
        # The tokens stand for another spelling (NFC), or bring spaces of their own (SentencePiece).
        found = []
        for a, b in spans:
            low = bisect_right(self.places.ends, a, start, end)
            high = bisect_left(self.places.starts, b, start, end)
            begin = ends[low - start - 1] if low > start else 0
            piece = text[begin : ends[high - start - 1]] if low < high else ""
            if piece.strip():
                begin += len(piece) - len(piece.lstrip())
                found.append((begin, begin + len(piece.strip())))
        return found

    def before(self, turn: Turn, start: int) -> str:
        """Return what a turn says before a token, up to what is said in that token."""
        first = self.places.starts[start]
        earlier = [(a, min(b, first)) for a, b in turn.words if a < first]
        said = _BETWEEN.join(self.layout.text[a:b] for a, b in earlier)
        goes_on = any(a < first < b for a, b in turn.words)
        return said if goes_on or not said else said + _BETWEEN

    def context(self, turn: Turn, start: int) -> tuple[Message, ...] | None:
        """Return the messages before a turn; None if they are not what stands before a token."""
        k = turn.message
        first = self.places.starts[start]
        before = bisect_right(self.layout.others, first, key=lambda other: other[1])
        last = self._latest[before - 1] if before else -1
        if not self.whole or last > k or k > self._missing:
            return None
        unread = {m for m, end in self._instructions.items() if m < k and not 0 < end <= first}
        return tuple(message for m, message in enumerate(self._said[:k]) if m not in unread)

    @cached_property
    def _instructions(self) -> dict[int, int]:
        """Where each system message ends; 0 if the template leaves it out.

        Templates may drop one, or move it to a later question: the model is not shown it before.
        """
        found = {
            k: 0
            for k, message in enumerate(self._said)
            if message["role"] in _INSTRUCTING and str(message["content"]).strip()
        }
        for _, end, k in reversed(self.layout.others) if found else ():
            if k in found:
                found[k] = end
        return found

    @cached_property
    def _latest(self) -> list[int]:
        """The latest message, up to each place where others speak; templates may move messages."""
        return list(accumulate((m for _, _, m in self.layout.others), max))

    @cached_property
    def _missing(self) -> int:
        """The first message of a user or a tool that is not in the text; beyond all if all are."""
        there = {m for _, _, m in self.layout.others}
        missing = (
            k
            for k, message in enumerate(self._said)
            if message["role"] not in ("assistant", *_INSTRUCTING)
            and str(message["content"]).strip()
            and k not in there
        )
        return next(missing, len(self._said))

    @cached_property
    def _said(self) -> list[Message]:
        """The messages, with what stands in the text of the assistant's."""
        said = [text_message(message) for message in self.source]
        there = {turn.message: turn for turn in self.layout.turns}
        for k, message in enumerate(said):
            if message["role"] == "assistant" and not (k in there and there[k].whole):
                words = [self.layout.text[a:b] for a, b in there[k].words] if k in there else []
                content = _BETWEEN.join(word for word in words if word.strip())
                said[k] = {"role": "assistant", "content": content}
        return said


def _within(spans: Iterable[tuple[int, int]], first: int, last: int) -> list[tuple[int, int]]:
    """Return the parts of spans that lie between two characters."""
    cut = ((max(a, first), min(b, last)) for a, b in spans)
    return [(a, b) for a, b in cut if a < b]


def _joined(
    text: str, ends: Sequence[int], spans: Sequence[tuple[int, int]]
) -> tuple[str, list[int]]:
    """Return the parts of a text that spans name, and how far they reach after each token.

    Args:
        text: Any text.
        ends: How far it reaches after each token; never decreasing.
        spans: In order, and none of them empty.
    """
    parts: list[str] = []
    reached: list[int] = []
    length = 0
    for n, (a, b) in enumerate(spans):
        reached += [length] * (bisect_right(ends, a) - len(reached))
        if n:
            between = text[spans[n - 1][1] : a]
            parts.append(_BETWEEN if between.strip() else between)
            length += len(parts[-1])
        moved = length - a
        inside = ends[len(reached) : bisect_left(ends, b)]
        reached += [end + moved for end in inside] if moved else inside
        parts.append(text[a:b])
        length += b - a
    return "".join(parts), reached + [length] * (len(ends) - len(reached))
