"""Parse a rendered conversation back into its messages: the inverse of a chat template.

Some hosts keep only tokens, and some data sets hold rendered chats, but a guard should read the
conversation. To learn the template's text between messages, the template renders conversations
whose contents are marks (see `probes`). Two checks guard against a wrong parse: every result is
rendered again and must equal the input, and the inverse is used only if it recovers two known
conversations.
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
from star_dss_plugin.data.templates.probes import (
    IN_CALLS,
    NAMES,
    PROBES,
    REASONING,
    pieces_of,
    probe_conversation,
)
from star_dss_plugin.data.templates.scaffold import TAGS
from star_dss_plugin.data.templates.slots import messages_of
from star_dss_plugin.errors import DataError

__all__ = ["TemplateInverse"]

_NAME = re.compile(r"[\w.$:-]*")  # a function's or argument's name, possibly truncated
_INSTRUCTING = ("system", "developer")
_KNOWN = (
    {"role": "system", "content": "Answer in one line."},
    {"role": "user", "content": "What is 2 + 2?\n\nSay it, please."},
    {"role": "assistant", "content": "It is 4."},
    {"role": "user", "content": "And 3 + 3?"},
    {"role": "assistant", "content": "It is 6:\n- three\n- and three"},
)


class TemplateInverse:
    """Recover messages from a chat template's output.

    Args:
        tokenizer: Renders the template.
        chat_template: The Jinja source; None: the tokenizer's own.
        template_kwargs: Template variables.

    Attributes:
        chat: The tokenizer with the template.
        reliable: Whether the inverse recovers the known conversations.
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
        self._as_text = False  # whether the template accepts call arguments only as JSON text
        for kinds in map(str.split, PROBES):
            thinks = any("thinking" in kind for kind in kinds)
            for name in REASONING if thinks else REASONING[:1]:
                for linked in (True, False) if "tool" in kinds else (False,):
                    self._learn(kinds, name, linked)
        self._merge_system_into_user()
        self.reliable = all(self._recovers(_KNOWN[first:]) for first in (0, 1))

    def messages(self, text: str) -> list[dict[str, Any]] | None:
        """Return the messages whose rendering is `text` or begins with it.

        Args:
            text: The rendered or decoded text. A space that SentencePiece decodes behind each
                added token is tolerated.

        Returns:
            None if the text cannot be parsed, or the inverse is not reliable.
        """
        return next(self._candidates(text), None)

    def messages_of_tokens(self, ids: Sequence[int]) -> list[dict[str, Any]] | None:
        """Return the messages whose rendering has these tokens.

        Returns:
            None if the text cannot be parsed, the inverse is not reliable, or the parsed messages
            have other tokens (the last four may differ if the row was truncated).
        """
        if not self.reliable:
            return None
        text = decode(self.chat.tokenizer, ids)
        controls = sum(token in self.chat.special for token in ids)
        if len(self.chat.control.findall(text)) != controls:
            return None  # ordinary tokens spell a control token, which then does not end a turn
        for found in self._candidates(text):
            again = self.chat.encode(self.chat.render(found)).ids
            cut = 0 if len(again) == len(ids) else 4
            checked = max(0, len(ids) - cut)
            if again[:checked] == list(ids[:checked]):
                return found
        return None

    def _candidates(self, text: str) -> Iterator[list[dict[str, Any]]]:
        """Yield the messages of a text as it is, and without spaces that the tokenizer added."""
        for variant in dict.fromkeys((text, self._without_spaces(text))) if self.reliable else ():
            found = self._parse(variant)
            if found is not None:
                yield found

    def messages_of_prompt(self, text: str) -> list[dict[str, Any]] | None:
        """Return the messages of a rendered prompt, which ends where the answer begins.

        Returns:
            None if no messages render as `text` with `add_generation_prompt`.
        """
        if not self.reliable or not self.chat.header:
            return None
        for behind in ("", "?"):  # a header may end in white space that the prompt lacks
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
        """Return a decoded text without the space that SentencePiece adds after added tokens."""
        return re.sub(f"({self.chat.added.pattern}) ", r"\1", text)

    def _learn(self, kinds: Sequence[str], reasoning: str, linked: bool) -> None:
        """Learn the template's text around messages of these kinds."""
        text = None
        for as_text in (False, True) if any("call" in kind for kind in kinds) else (False,):
            made, marked = probe_conversation(kinds, reasoning, as_text=as_text, linked=linked)
            try:
                text = self.chat.render(made)
            except DataError:
                continue  # templates may refuse a role, an order, or arguments that are not text
            self._as_text |= as_text
            break
        taken = None if text is None else pieces_of(text, marked)
        if taken is None:
            return
        slots, pieces = taken
        header = self.chat.header
        # If answers have no header, any text could be an answer that begins a conversation.
        if slots[0] != "assistant" or (header and header in pieces[0]):
            self._openings.add((pieces[0], slots[0]))
        for slot, piece, following in zip(slots, pieces[1:], slots[1:], strict=False):
            # If answers have no header, the text between two of them only ends the first.
            parts = {slot, following} != {"assistant"} or (header and header in piece)
            if piece and parts:
                self._between[slot].add((piece, following))
        self._closings[slots[-1]].add(pieces[-1])

    def _merge_system_into_user(self) -> None:
        """Parse a system or developer turn as a user's if the template renders both the same way.

        Guards read user turns.
        """
        users = {text for text, slot in self._openings if slot == "user"}
        alike = {slot for text, slot in self._openings if text in users and slot in _INSTRUCTING}
        begin = self.chat.tokenizer.bos_token or ""
        headers = tuple(text.removeprefix(begin) for text in users - {begin, ""})
        for slot, behind in self._between.items():
            self._between[slot] = {
                (piece, "user" if f in alike and piece.endswith(headers) else f)
                for piece, f in behind
            }

    def _recovers(self, known: Sequence[Mapping[str, str]]) -> bool:
        """Return whether the inverse recovers a known conversation.

        The system turn is exempt: templates may refuse it or merge it into the first user turn.
        """
        try:
            found = self._parse(self.chat.render(known))
        except DataError:
            return known[0]["role"] == "system"
        # Everything from the first answer on must be recovered exactly.
        answers = 3 if known[0]["role"] == "system" else len(known)
        return found is not None and found[-answers:] == list(known)[-answers:]

    def _parse(self, text: str, *, exact: bool = True) -> list[dict[str, Any]] | None:
        # If parsing tool calls fails, they are parsed as the turn's text.
        for known in (True, False):
            for opening, slot in self._sorted_openings:
                if text.startswith(opening):
                    slots, behind = self._split(text, len(opening), slot, calls=known)
                    if any(self._overruns(*one) for one in slots):
                        continue
                    said = text[: len(text) - behind]  # the template's last words may be truncated
                    found = self._messages_of(slots, said if exact else None)
                    if found is not None:
                        return found
        return None

    @cached_property
    def _sorted_openings(self) -> list[tuple[str, str]]:
        """The openings in the order in which they are tried.

        The longest come first because they may contain a default system turn. Of equal openings
        "user" precedes "system", because the template renders them as one turn, and "system"
        precedes "developer", its newer name.
        """
        ranks = {"user": 0, "system": 1}
        return sorted(self._openings, key=lambda o: (-len(o[0]), ranks.get(o[1], 2), o))

    @cached_property
    def _structure(self) -> set[str]:
        """The control tokens around messages: the template's, and bos, eos and pad."""
        pieces = [piece for piece, _ in self._openings]
        pieces += [piece for behind in self._between.values() for piece, _ in behind]
        pieces += [piece for closings in self._closings.values() for piece in closings]
        tokenizer = self.chat.tokenizer
        edges = {tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token} - {None}
        return edges | {token for piece in pieces for token in self.chat.control.findall(piece)}

    def _overruns(self, slot: str, text: str) -> bool:
        """Return whether a slot's text contains text of the template that should follow it."""
        if self._header and self._header in text:
            return True  # the next answer's header
        if any(token in text for token in self._structure):
            return True  # a message that no probe has: another role, or another position
        if slot in NAMES:
            return not _NAME.fullmatch(text)
        if slot not in IN_CALLS:
            return False
        endings = {ending.strip() for ending in self._closings[slot]} - {""}
        return bool(self.chat.added.search(text)) or any(ending in text for ending in endings)

    @cached_property
    def _header(self) -> str:
        """The generation prompt without the `<think>` tag that some templates add to it."""
        pieces = TAGS.split(self.chat.header)
        return pieces[0].strip() or self.chat.header.strip()

    def _messages_of(
        self, slots: Sequence[tuple[str, str]], text: str | None
    ) -> list[dict[str, Any]] | None:
        """Return the messages of slots; None if none of their readings renders as `text`."""
        calls = any(slot in IN_CALLS for slot, _ in slots)
        for linked in (False, True) if calls else (False,):
            for reasoning in (*REASONING, None):
                found = messages_of(slots, reasoning, as_text=self._as_text, linked=linked)
                if found is not None and (text is None or self._renders(found, text)):
                    return found
        return None

    def _split(
        self, text: str, position: int, slot: str, *, calls: bool
    ) -> tuple[list[tuple[str, str]], int]:
        """Split a text into slots.

        Args:
            text: The rendered text.
            position: Where the first slot begins.
            slot: The first slot's kind.
            calls: Whether slots of tool calls are recognised.

        Returns:
            (kind, text) of each slot, and the number of characters behind the last slot.
        """
        found: list[tuple[str, str]] = []
        ahead: dict[str, int] = {}  # each piece's next position; -1: it does not occur

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
        """Return the last content without the template's text behind it, which may be truncated."""
        behind = self._closings[slot] | {piece for piece, _ in self._between[slot]}
        endings = {piece[:n] for piece in behind for n in self._truncated_lengths(piece)}
        return last.removesuffix(max((e for e in endings if last.endswith(e)), key=len, default=""))

    def _truncated_lengths(self, piece: str) -> list[int]:
        """Return the lengths to which a piece may be truncated: never within an added token."""
        within = [match.span() for match in self.chat.added.finditer(piece)]
        return [n for n in range(1, len(piece) + 1) if not any(a < n < b for a, b in within)]

    def _renders(self, messages: Sequence[Mapping[str, Any]], text: str) -> bool:
        """Return whether the messages render as `text`, which may be truncated in a character."""
        try:
            rendered = self.chat.render(messages)
        except DataError:
            return False
        return rendered.startswith(text) or rendered.startswith(text.rstrip(REPLACEMENT).rstrip())
