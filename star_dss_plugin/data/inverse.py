"""From the text of a rendered conversation back to its messages: a chat template's inverse.

Some hosts keep tokens only, and some data sets hold chats that are rendered already; a guard should
read a conversation and not a rendered prompt. The template is given conversations whose contents
are marks; what stands between the marks is what it writes around messages. Every result is rendered
again and must give the text it came from, and the inverse as a whole must give back known
conversations, else it is not used.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from star_dss_plugin.data.chat import ChatTokenizer
from star_dss_plugin.data.decoding import REPLACEMENT, decode
from star_dss_plugin.errors import DataError

__all__ = ["TemplateInverse"]

_MARK = re.compile("\ue0f0([0-9]+)\ue0f1")  # private use: in no template
_THOUGHT, _CALL, _ARGUMENTS = "reasoning", "call", "arguments"
_REASONING = ("reasoning_content", "thinking", "reasoning")

# Conversations that are learned from. "thinking" is an assistant's turn with reasoning before its
# answer, "calling" one that calls a function; "answer+call" says something before it calls.
_PROBES = (
    "user assistant",
    "system user assistant",
    "user assistant user assistant",
    "system user assistant user assistant",
    "developer user assistant",
    "user thinking",
    "system user thinking",
    "user thinking user thinking",
    "user assistant user thinking",
    "user thinking user assistant",
    "user assistant tool assistant",
    "user assistant tool assistant user assistant",
    "user calling tool assistant",
    "user calling tool assistant user assistant",
    "user assistant user calling tool assistant",
    "user assistant user calling tool thinking",
    "user calling tool tool assistant",
    "user answer+call tool assistant",
    "user calling",
)
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
        for probe in _PROBES:
            for name in _REASONING if "thinking" in probe else _REASONING[:1]:
                self._learn(probe.split(), name)
        self.reliable = all(self._gives_back(_KNOWN[first:]) for first in (0, 1))

    def messages(self, text: str) -> list[dict[str, Any]] | None:
        """Return the messages that the template renders as `text`, or as a text that begins so.

        Args:
            text: The text, or what a tokenizer decodes that writes a space before each stretch of
                text.

        Returns:
            None if there are none, or the inverse cannot be trusted.
        """
        if not self.reliable:
            return None
        for variant in dict.fromkeys((text, self._without_spaces(text))):
            found = self._parse(variant)
            if found is not None:
                return found
        return None

    def of_tokens(self, ids: Sequence[int]) -> list[dict[str, Any]] | None:
        """Return the messages that the template and the tokenizer make some tokens of.

        Returns:
            None if there are none, the inverse cannot be trusted, or the conversation does not give
            these tokens (but for the last few, where a row was cut).
        """
        found = self.messages(decode(self.chat.tokenizer, ids))
        if found is None:
            return None
        again = self.chat.encode(self.chat.render(found)).ids
        cut = 0 if len(again) == len(ids) else 4
        checked = max(0, len(ids) - cut)
        return found if again[:checked] == list(ids[:checked]) else None

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

    def _learn(self, kinds: Sequence[str], reasoning: str) -> None:
        """Take what the template writes around the messages of some kinds."""
        probe, slots = _probe(kinds, reasoning)
        try:
            text = self.chat.render(probe)
        except DataError:
            return  # templates may refuse a role or an order
        order = [int(n) for n in _MARK.findall(text)]
        if order != list(range(len(slots))):
            return  # a message was dropped, written twice, or moved: no way back from here
        pieces = _MARK.split(text)[::2]
        for i, slot in enumerate(slots):
            if slot == _ARGUMENTS:  # the mark stands between {" and ": 0}
                if not (pieces[i].endswith('{"') and re.match(r'": ?0\}', pieces[i + 1])):
                    return
                pieces[i] = pieces[i][:-2]
                pieces[i + 1] = re.sub(r'^": ?0\}', "", pieces[i + 1])
        self._openings.add((pieces[0], slots[0]))
        for slot, piece, following in zip(slots, pieces[1:], slots[1:], strict=False):
            if piece:
                self._between[slot].add((piece, following))
        self._closings[slots[-1]].add(pieces[-1])

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
        # The longest opening first: it may hold a default system turn. "user" before "system":
        # where both look alike, the template makes one turn of them.
        for opening, slot in sorted(self._openings, key=lambda o: (-len(o[0]), o[1] != "user")):
            if text.startswith(opening):
                slots, behind = self._slots(text, len(opening), slot)
                said = text[: len(text) - behind]  # the template's own words may be cut
                for reasoning in (*_REASONING, None):
                    found = _messages(slots, reasoning)
                    if found is None:
                        break
                    if not exact or self._renders(found, said):
                        return found
        return None

    def _slots(self, text: str, position: int, slot: str) -> tuple[list[tuple[str, str]], int]:
        """Return what stands in each slot from a position on, and how much follows the last."""
        found: list[tuple[str, str]] = []
        while True:
            places = [
                # "user" first: some templates write other roles as users.
                (at, -len(piece), following != "user", piece, following)
                for piece, following in self._between[slot]
                if (at := text.find(piece, position)) >= 0
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
        endings = {piece[:n] for piece in behind for n in range(1, len(piece) + 1)}
        return last.removesuffix(max((e for e in endings if last.endswith(e)), key=len, default=""))

    def _renders(self, messages: Sequence[Mapping[str, Any]], text: str) -> bool:
        """Return whether the messages give the text; rows may be cut within a character."""
        try:
            rendered = self.chat.render(messages)
        except DataError:
            return False
        return rendered.startswith(text) or rendered.startswith(text.rstrip(REPLACEMENT).rstrip())


def _probe(kinds: Sequence[str], reasoning: str) -> tuple[list[dict[str, Any]], list[str]]:
    """Return a conversation of marks, and the slot of each mark."""
    slots: list[str] = []

    def mark(slot: str) -> str:
        slots.append(slot)
        return f"\ue0f0{len(slots) - 1}\ue0f1"

    probe: list[dict[str, Any]] = []
    for kind in kinds:
        if kind == "thinking":
            thought = mark(_THOUGHT)
            probe.append({"role": "assistant", reasoning: thought, "content": mark("assistant")})
        elif kind in ("calling", "answer+call"):
            content = mark("assistant") if kind == "answer+call" else ""
            call = {"name": mark(_CALL), "arguments": {mark(_ARGUMENTS): 0}}
            calls = [{"type": "function", "id": "call00001", "function": call}]
            probe.append({"role": "assistant", "content": content, "tool_calls": calls})
        elif kind == "tool":
            told = {"role": "tool", "tool_call_id": "call00001", "content": mark("tool")}
            probe.append(told)
        else:
            probe.append({"role": kind, "content": mark(kind)})
    return probe, slots


def _messages(
    slots: Sequence[tuple[str, str]], reasoning: str | None
) -> list[dict[str, Any]] | None:
    """Return the messages that some slots make.

    Args:
        slots: Kinds and texts.
        reasoning: The field for reasoning; None: it stands in the content, between tags.

    Returns:
        None if a call's arguments are not JSON, or there is another field for no reasoning.
    """
    found: list[dict[str, Any]] = []
    thinks = any(slot == _THOUGHT for slot, _ in slots)
    if not thinks and reasoning != _REASONING[0]:
        return None
    pending: dict[str, Any] | None = None  # an assistant's turn that is not complete
    for slot, text in slots:
        if slot == _THOUGHT:
            pending = {"role": "assistant", "content": ""}
            pending["content" if reasoning is None else reasoning] = (
                f"<think>\n{text}\n</think>\n\n" if reasoning is None else text
            )
            found.append(pending)
        elif slot == "assistant":
            if pending is None:
                pending = {"role": "assistant", "content": ""}
                found.append(pending)
            pending["content"] += text
            pending = pending if pending["content"] else None
        elif slot == _CALL:
            if not found or found[-1]["role"] != "assistant":
                found.append({"role": "assistant", "content": ""})
            calls = found[-1].setdefault("tool_calls", [])
            calls.append({"type": "function", "function": {"name": text, "arguments": {}}})
            continue
        elif slot == _ARGUMENTS:
            try:
                known = json.loads(text)
            except ValueError:
                return None
            found[-1]["tool_calls"][-1]["function"]["arguments"] = known
        else:
            found.append({"role": slot, "content": text})
        if slot != _THOUGHT:
            pending = None
    return found
