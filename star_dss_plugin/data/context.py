"""Determine what a guard reads of a run of trained tokens: its context and its text.

A run's message is known by position: the row's messages are rendered once, and the row's tokens are
matched with those of the rendered conversation, or of its beginning or end. If they do not match,
or the run is not an assistant's, the context is *raw*: the decoded tokens before the run. An
exception are prompts that the host's own format can parse (`ChatTokenizer.read_prompt`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from star_dss_plugin.data.conversations import source_messages
from star_dss_plugin.data.decoding import decode, token_boundaries
from star_dss_plugin.data.requests import Message
from star_dss_plugin.data.templates.chat import ChatTokenizer
from star_dss_plugin.data.templates.located import locate, locate_by_bytes
from star_dss_plugin.data.templates.rendered import parsed_tokens
from star_dss_plugin.data.templates.tokenized import Tokenized
from star_dss_plugin.data.tokenization import read_row
from star_dss_plugin.errors import DataError
from star_dss_plugin.validation import shortened

__all__ = ["RowReader", "RunText"]


@dataclass(frozen=True)
class RunText:
    """What a guard reads of a run of trained tokens.

    Attributes:
        context: The messages before the turn, oldest first.
        raw: Whether the context is decoded tokens.
        before: The untrained text of the same turn before the run.
        text: The run's text.
        ends: For each token of the run, the number of characters of `text` that are complete after
            it; never decreasing.
        complete: For each token, whether it ends at a character's boundary.
    """

    context: tuple[Message, ...]
    raw: bool
    before: str
    text: str
    ends: list[int]
    complete: list[bool]


class RowReader:
    """Read the runs of one row.

    Args:
        chat: The tokenizer and the template that made the tokens.
        ids: The row's tokens.
        row: The row, with its messages if they are known.
        tokenized: The result of `read_row` for the row, if known.
        recover: Whether to parse the messages from the tokens if the row has none.

    Raises:
        DataError: The row's messages are malformed.
    """

    def __init__(
        self,
        chat: ChatTokenizer,
        ids: Sequence[int],
        row: Mapping[str, Any],
        tokenized: Tokenized | None = None,
        *,
        recover: bool = False,
    ) -> None:
        self._chat = chat
        self._ids = list(ids)
        self._tokenized = tokenized
        if recover and tokenized is None and source_messages(row) is None:
            found = parsed_tokens(ids, chat)
            row = row if found is None else {"messages": found}
        self._located = None if tokenized is None else locate(chat, self._ids, tokenized)
        for one in (chat, *chat.others) if self._located is None and source_messages(row) else ():
            # A template that cannot render the messages did not make the tokens.
            with contextlib.suppress(DataError):
                self._located = locate_by_bytes(one, self._ids, row) or locate(
                    one, self._ids, read_row(row, one, whole_completion=False)
                )
            if self._located is not None:
                break

    def read(self, start: int, end: int) -> RunText:
        """Return what a guard reads of the tokens [start, end), at least one.

        Raises:
            DataError: The tokens belong to another role than the assistant.
        """
        located = self._located
        turns = located.turns(start, end) if located is not None else ()
        if located is not None and not turns and (role := located.other_role(start, end)):
            said = shortened(decode(self._chat.tokenizer, self._ids[start:end]))
            raise DataError(
                f"The tokens {start} to {end} ({said}) are trained, and the {role} says them. A "
                "guard judges what the assistant says: set their labels to -100 (in Axolotl, give "
                f"no turn of the {role} a 'training' of true)."
            )
        if located is None or not turns:
            return self._raw(start, *self._bare(start, end))
        said, ends, complete = located.turn_text(self._chat, turns, start, end)
        context = located.context(turns[0], start)
        if context is None:
            return self._raw(start, said, ends, complete)
        return RunText(context, False, located.text_before(turns[0], start), said, ends, complete)

    @cached_property
    def _reached(self) -> list[int] | None:
        """The length of the row's text before each token, and after the last one.

        None if it is uncertain what the tokens spell, so that they must be decoded.
        """
        if self._tokenized is None:
            return None
        own = self._tokenized.encoded
        count = len(self._ids)
        return [0, *own.ends[:count]] if own.exact and own.ids[:count] == self._ids else None

    def _raw(self, start: int, text: str, ends: list[int], complete: list[bool]) -> RunText:
        if self._located is None and self._chat.read_prompt is not None and start:
            asked = self._chat.read_prompt(self._ids[:start])
            if asked is not None:
                return RunText(asked, False, "", text, ends, complete)
        if self._tokenized is not None and self._reached is not None:
            decoded = self._tokenized.text[: self._reached[start]]
        else:
            decoded = decode(self._chat.tokenizer, self._ids[:start])
        context: tuple[Message, ...] = ()
        if decoded:
            context = ({"role": "user", "content": decoded},)
        return RunText(context, True, "", text, ends, complete)

    def _bare(self, start: int, end: int) -> tuple[str, list[int], list[bool]]:
        """Return text, ends and complete of a run without control tokens at its beginning and end.

        At the end, white space behind and between the control tokens is left out too.
        """
        ids, special = self._ids[start:end], self._chat.special
        first, last = 0, len(ids)
        while first < last and ids[first] in special:
            first += 1
        cut = last
        while cut > first and (
            ids[cut - 1] in special or not decode(self._chat.tokenizer, [ids[cut - 1]]).strip()
        ):
            cut -= 1
            if ids[cut] in special:
                last = cut
        known = None
        if self._tokenized is not None and self._reached is not None:
            known = self._tokenized.text[self._reached[start + first] :]
        body, inner, whole = token_boundaries(self._chat.tokenizer, ids[first:last], known)
        behind = len(ids) - last
        return (
            body,
            [0] * first + inner + [len(body)] * behind,
            [True] * first + whole + [True] * behind,
        )
