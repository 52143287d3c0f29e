"""From the text of a rendered conversation back to its messages: a chat template's inverse.

Some hosts keep tokens only, and some data sets hold chats that are rendered already; a guard should
read a conversation and not a rendered prompt. The template is given conversations whose contents
are marks; what stands between the marks is what it writes around messages. Every result is rendered
again and must give the text it came from, and the inverse as a whole must give back known
conversations, else it is not used.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

from transformers import PreTrainedTokenizerBase

from star_dss_plugin.data.decoding import REPLACEMENT, decode
from star_dss_plugin.data.templates.chat import ChatTokenizer
from star_dss_plugin.data.templates.layout import TAGS
from star_dss_plugin.data.templates.probes import (
    IN_CALLS,
    NAMES,
    PROBES,
    REASONING,
    pieces_of,
    probe,
)
from star_dss_plugin.data.templates.slots import messages_of
from star_dss_plugin.errors import DataError

__all__ = ["TemplateInverse"]

_NAME = re.compile(r"[\w.$:-]*")  # of a function or an argument, which may be cut
_INSTRUCTING = ("system", "developer")
_KNOWN = (
    {"role": "system", "content": "Answer in one line."},
    {"role": "user", "content": "What is 2 + 2?\n\nSay it, please."},
    {"role": "assistant", "content": "It is 4."},
    {"role": "user", "content": "And 3 + 3?"},
    {"role": "assistant", "content": "It is 6:\n- three\n- and three"},
)


class TemplateInverse:
    """Messages from a chat template's text.

    Args:
        tokenizer: Renders the template.
        chat_template: The Jinja source; None: the tokenizer's own.
        template_kwargs: What it is given beside the messages.

    Attributes:
        chat: The tokenizer with the template.
        reliable: Whether known conversations come back.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        chat_template: str | None,
        template_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        self.chat = ChatTokenizer(tokenizer, chat_template, dict(template_kwargs or {}))
        self._openings: set[tuple[str, str]] = set()  # (text, slot)
        self._between: dict[str, set[tuple[str, str]]] = defaultdict(set)  # slot: (text, next slot)
        self._closings: dict[str, set[str]] = defaultdict(set)
        self._as_text = False  # whether the template takes arguments of calls as JSON text only
        for kinds in map(str.split, PROBES):
            thinks = any("thinking" in kind for kind in kinds)
            for name in REASONING if thinks else REASONING[:1]:
                for linked in (True, False) if "tool" in kinds else (False,):
                    self._learn(kinds, name, linked)
        self._join_alike()
        self.reliable = all(self._gives_back(_KNOWN[first:]) for first in (0, 1))

    def messages(self, text: str) -> list[dict[str, Any]] | None:
        """Return the messages that the template renders as `text`, or as a text that begins so.

        Args:
            text: The text, or what a tokenizer decodes that writes a space before each stretch of
                text.

        Returns:
            None if there are none, or the inverse cannot be trusted.
        """
        return next(self._found(text), None)

    def of_tokens(self, ids: Sequence[int]) -> list[dict[str, Any]] | None:
        """Return the messages that the template and the tokenizer make some tokens of.

        Returns:
            None if there are none, the inverse cannot be trusted, or the conversation does not give
            these tokens (but for the last few, where a row was cut).
        """
        if not self.reliable:
            return None
        text = decode(self.chat.tokenizer, ids)
        controls = sum(token in self.chat.special for token in ids)
        if len(self.chat.control.findall(text)) != controls:
            return None  # some are spelled in ordinary tokens: words, and no end of a turn
        for found in self._found(text):
            again = self.chat.encode(self.chat.render(found)).ids
            cut = 0 if len(again) == len(ids) else 4
            checked = max(0, len(ids) - cut)
            if again[:checked] == list(ids[:checked]):
                return found
        return None

    def _found(self, text: str) -> Iterator[list[dict[str, Any]]]:
        """Yield the messages of a text, and of what it is if the tokenizer wrote spaces into it."""
        for variant in dict.fromkeys((text, self._without_spaces(text))) if self.reliable else ():
            found = self._parse(variant)
            if found is not None:
                yield found

    def question(self, text: str) -> list[dict[str, Any]] | None:
        """Return the messages of a text that ends where an answer is to begin.

        Returns:
            None if the template does not render them, with the opening of an answer, as `text`.
        """
        if not self.reliable or not self.chat.header:
            return None
        for behind in ("", "?"):  # a header may end in white space that a prompt lacks
            found = self._parse(text.rstrip() + behind if behind else text, exact=False)
            if found is None or found[-1]["role"] != "assistant":
                continue
            try:
                asked = self.chat.render(found[:-1], add_generation_prompt=True)
            except DataError:
                continue
            if asked.rstrip() == text.rstrip():
                return found[:-1]
        return None

    def _without_spaces(self, text: str) -> str:
        """Return a decoded text without the space that SentencePiece puts behind added tokens."""
        return re.sub(f"({self.chat.added.pattern}) ", r"\1", text)

    def _learn(self, kinds: Sequence[str], reasoning: str, linked: bool) -> None:
        """Take what the template writes around the messages of some kinds."""
        text = None
        for as_text in (False, True) if any("call" in kind for kind in kinds) else (False,):
            made, marked = probe(kinds, reasoning, as_text=as_text, linked=linked)
            try:
                text = self.chat.render(made)
            except DataError:
                continue  # templates may refuse a role, an order, or arguments that are no text
            self._as_text |= as_text
            break
        taken = None if text is None else pieces_of(text, marked)
        if taken is None:
            return
        slots, pieces = taken
        self._openings.add((pieces[0], slots[0]))
        for slot, piece, following in zip(slots, pieces[1:], slots[1:], strict=False):
            # Where answers have no header, what is between two of them is the end of one.
            header = self.chat.header
            parts = {slot, following} != {"assistant"} or (header and header in piece)
            if piece and parts:
                self._between[slot].add((piece, following))
        self._closings[slots[-1]].add(pieces[-1])

    def _join_alike(self) -> None:
        """Take for a user's every turn that the template writes as one: guards read these."""
        users = {text for text, slot in self._openings if slot == "user"}
        alike = {slot for text, slot in self._openings if text in users and slot in _INSTRUCTING}
        begin = self.chat.tokenizer.bos_token or ""
        headers = tuple(text.removeprefix(begin) for text in users - {begin, ""})
        for slot, behind in self._between.items():
            self._between[slot] = {
                (piece, "user" if f in alike and piece.endswith(headers) else f)
                for piece, f in behind
            }

    def _gives_back(self, known: Sequence[Mapping[str, str]]) -> bool:
        """Return whether a known conversation comes back.

        Its system turn may have become part of the first question, or may be refused, as templates
        do.
        """
        try:
            found = self._parse(self.chat.render(known))
        except DataError:
            return known[0]["role"] == "system"
        # What was asked and answered, from the first answer on, must be there in any case.
        answers = 3 if known[0]["role"] == "system" else len(known)
        return found is not None and found[-answers:] == list(known)[-answers:]

    def _parse(self, text: str, *, exact: bool = True) -> list[dict[str, Any]] | None:
        # A call that cannot be told apart is read as words that the turn says.
        for known in (True, False):
            for opening, slot in self._sorted_openings:
                if text.startswith(opening):
                    slots, behind = self._slots(text, len(opening), slot, calls=known)
                    if any(self._overruns(*one) for one in slots):
                        continue
                    said = text[: len(text) - behind]  # the template's own words may be cut
                    found = self._said(slots, said if exact else None)
                    if found is not None:
                        return found
        return None

    @cached_property
    def _sorted_openings(self) -> list[tuple[str, str]]:
        """The openings in the order in which they are tried.

        The longest first: it may hold a default system turn. "user" before "system", where both
        look alike: the template makes one turn of them. "system" before "developer", its newer
        name.
        """
        ranks = {"user": 0, "system": 1}
        return sorted(self._openings, key=lambda o: (-len(o[0]), ranks.get(o[1], 2), o))

    @cached_property
    def _structure(self) -> set[str]:
        """The control tokens around messages: the template's, and those that begin or end texts."""
        pieces = [piece for piece, _ in self._openings]
        pieces += [piece for behind in self._between.values() for piece, _ in behind]
        pieces += [piece for closings in self._closings.values() for piece in closings]
        tokenizer = self.chat.tokenizer
        edges = {tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token} - {None}
        return edges | {token for piece in pieces for token in self.chat.control.findall(piece)}

    def _overruns(self, slot: str, text: str) -> bool:
        """Return whether what seems to stand in a slot holds what comes behind it."""
        if self._header and self._header in text:
            return True  # of the next answer
        if any(token in text for token in self._structure):
            return True  # a message that no probe has: of another role, or at another place
        if slot in NAMES:
            return not _NAME.fullmatch(text)
        if slot not in IN_CALLS:
            return False
        endings = {ending.strip() for ending in self._closings[slot]} - {""}
        return bool(self.chat.added.search(text)) or any(ending in text for ending in endings)

    @cached_property
    def _header(self) -> str:
        """What stands before every answer: without a thought that headers of prompts begin."""
        pieces = TAGS.split(self.chat.header)
        return pieces[0].strip() or self.chat.header.strip()

    def _said(
        self, slots: Sequence[tuple[str, str]], text: str | None
    ) -> list[dict[str, Any]] | None:
        """Return the messages of some slots; None if there are none that give a text."""
        calls = any(slot in IN_CALLS for slot, _ in slots)
        for linked in (False, True) if calls else (False,):
            for reasoning in (*REASONING, None):
                found = messages_of(slots, reasoning, as_text=self._as_text, linked=linked)
                if found is not None and (text is None or self._renders(found, text)):
                    return found
        return None

    def _slots(
        self, text: str, position: int, slot: str, *, calls: bool
    ) -> tuple[list[tuple[str, str]], int]:
        """Return what stands in each slot from a position on, and how much follows the last."""
        found: list[tuple[str, str]] = []
        ahead: dict[str, int] = {}  # where each piece comes next; −1: nowhere

        def next_of(piece: str) -> int:
            if 0 <= ahead.get(piece, 0) < max(position, 1):
                ahead[piece] = text.find(piece, position)
            return ahead[piece]

        while True:
            places = [
                # "user" first: some templates write other roles as users.
                (at, -len(piece), following != "user", piece, following)
                for piece, following in self._between[slot]
                if (calls or following not in IN_CALLS) and (at := next_of(piece)) >= 0
            ]
            if not places:
                break
            at, _, _, piece, following = min(places)
            found.append((slot, text[position:at]))
            position, slot = at + len(piece), following
        last = self._unclosed(text[position:], slot)
        return [*found, (slot, last)], len(text) - position - len(last)

    def _unclosed(self, last: str, slot: str) -> str:
        """Return the last content without what the template writes behind it, which may be cut."""
        behind = self._closings[slot] | {piece for piece, _ in self._between[slot]}
        endings = {piece[:n] for piece in behind for n in self._cuts(piece)}
        return last.removesuffix(max((e for e in endings if last.endswith(e)), key=len, default=""))

    def _cuts(self, piece: str) -> list[int]:
        """Return where a piece may be cut, its end included: not within an added token."""
        within = [match.span() for match in self.chat.added.finditer(piece)]
        return [n for n in range(1, len(piece) + 1) if not any(a < n < b for a, b in within)]

    def _renders(self, messages: Sequence[Mapping[str, Any]], text: str) -> bool:
        """Return whether the messages give the text; rows may be cut within a character."""
        try:
            rendered = self.chat.render(messages)
        except DataError:
            return False
        return rendered.startswith(text) or rendered.startswith(text.rstrip(REPLACEMENT).rstrip())
