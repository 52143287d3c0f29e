"""From the text of a tokenized conversation back to its messages: a chat template's inverse.

Axolotl keeps tokens only, and a guard should read a conversation and not a rendered prompt. The
template is given conversations whose contents are marks; what stands between the marks is what it
writes around messages. Every result is rendered again and must give the text it came from, and the
inverse as a whole must give back a known conversation, else it is not used.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from star_dss_plugin.data.chat import ChatTokenizer
from star_dss_plugin.errors import DataError

__all__ = ["TemplateInverse"]

_PROBES = (
    ("user", "assistant"),
    ("system", "user", "assistant"),
    ("user", "assistant", "user", "assistant"),
    ("system", "user", "assistant", "user", "assistant"),
    ("user", "assistant", "tool", "assistant"),
    ("user", "assistant", "tool", "assistant", "user", "assistant"),
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
        chat_template: The Jinja source.
        template_kwargs: What it is given beside the messages.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        chat_template: str,
        template_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        self._chat = ChatTokenizer(tokenizer, chat_template)
        self._kwargs = dict(template_kwargs or {})
        self._openings: set[tuple[str, str]] = set()  # (text, role of the first message)
        self._between: dict[str, set[tuple[str, str]]] = defaultdict(set)  # role: (text, next role)
        self._closings: dict[str, set[str]] = defaultdict(set)
        for roles in _PROBES:
            self._learn(roles)
        self.reliable = all(self._gives_back(_KNOWN[first:]) for first in (0, 1))

    def messages(self, text: str) -> list[dict[str, str]] | None:
        """The messages that the template renders as `text`, or as a text that begins with it.

        Returns:
            None if there are none, or the inverse cannot be trusted.
        """
        return self._parse(text) if self.reliable else None

    def _learn(self, roles: Sequence[str]) -> None:
        """Takes what the template writes around the messages of some roles."""
        marks = [f"\ue0f0{i}\ue0f1" for i in range(len(roles))]  # private use: in no template
        probe = [{"role": r, "content": m} for r, m in zip(roles, marks, strict=True)]
        try:
            text = self._chat.render(probe, **self._kwargs)
        except DataError:
            return  # templates may refuse a role or an order
        if any(text.count(mark) != 1 for mark in marks):
            return  # a message was dropped or written twice: no way back from here
        pieces = []
        for mark in marks:
            piece, found, text = text.partition(mark)
            if not found:
                return  # another order
            pieces.append(piece)
        self._openings.add((pieces[0], roles[0]))
        for role, piece, following in zip(roles, pieces[1:], roles[1:], strict=False):
            if piece:
                self._between[role].add((piece, following))
        self._closings[roles[-1]].add(text)

    def _gives_back(self, known: Sequence[Mapping[str, str]]) -> bool:
        """Whether a known conversation comes back; its system turn may have become part of the
        first question, or may be refused, as templates do.
        """
        try:
            found = self._parse(self._chat.render(known, **self._kwargs))
        except DataError:
            return known[0]["role"] == "system"
        # What was asked and answered, from the first answer on, must be there in any case.
        answers = 3 if known[0]["role"] == "system" else len(known)
        return found is not None and found[-answers:] == list(known)[-answers:]

    def _parse(self, text: str) -> list[dict[str, str]] | None:
        # The longest opening first: it may hold a default system turn. "user" before "system":
        # where both look alike, the template makes one turn of them.
        for opening, role in sorted(self._openings, key=lambda o: (-len(o[0]), o[1] != "user")):
            if text.startswith(opening):
                found, end = self._turns(text, len(opening), role)
                if self._renders(found, text[:end]):
                    return found
        return None

    def _turns(self, text: str, position: int, role: str) -> tuple[list[dict[str, str]], int]:
        """The messages from a position on, and where the last one's content ends."""
        found = []
        while True:
            places = [
                (at, -len(piece), piece, following)
                for piece, following in self._between[role]
                if (at := text.find(piece, position)) >= 0
            ]
            if not places:
                break
            at, _, piece, following = min(places)
            found.append({"role": role, "content": text[position:at]})
            position, role = at + len(piece), following
        content = self._unclosed(text[position:], role)
        return [*found, {"role": role, "content": content}], position + len(content)

    def _unclosed(self, last: str, role: str) -> str:
        """The last content: without what the template writes behind it, which may be cut."""
        behind = self._closings[role] | {piece for piece, _ in self._between[role]}
        endings = {piece[:n] for piece in behind for n in range(1, len(piece) + 1)}
        return last.removesuffix(max((e for e in endings if last.endswith(e)), key=len, default=""))

    def _renders(self, messages: Sequence[Mapping[str, str]], text: str) -> bool:
        try:
            rendered = self._chat.render(messages, **self._kwargs)
        except DataError:
            return False
        # White space apart: templates trim contents. Rows may be cut.
        return "".join(rendered.split()).startswith("".join(text.split()))
