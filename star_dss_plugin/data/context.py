"""Find which messages were said before a response."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

from star_dss_plugin.data.chat import ChatTokenizer
from star_dss_plugin.data.conversations import (
    row_messages,
    source_messages,
    template_arguments,
)
from star_dss_plugin.data.decoding import REPLACEMENT, decode
from star_dss_plugin.data.requests import Message
from star_dss_plugin.errors import DataError

__all__ = ["context_finder"]


def _squash(text: str) -> str:
    """Without white space: templates trim and pad it."""
    return "".join(text.split())


def context_finder(
    chat: ChatTokenizer, ids: Sequence[int], row: Mapping[str, Any]
) -> Callable[[int, str], tuple[tuple[Message, ...], bool]]:
    """A function (start of a run, its text) → (context, whether it is raw).

    A run is assistant message k if it agrees with k's content, and the tokens before it are what
    the row's own template makes of the messages before k. Where the template makes other tokens
    (another one was used), `_by_contents` decides.
    """
    source, messages = source_messages(row), row_messages(row) or []
    contents = [_squash(str(m["content"])) for m in messages]
    arguments = template_arguments(row)
    bos = str(chat.tokenizer.bos_token or "")
    plain = isinstance(row.get("prompt"), str) and not isinstance(row.get("messages"), list)

    @cache
    def rendered(k: int) -> str | None:
        """The messages before k; None if the template cannot say (it may insist on an answer)."""
        assert source is not None
        if k == 0 or plain:
            return "".join(contents[:k])
        try:
            text = chat.render(source[:k], **arguments)
        except DataError:
            return None
        return _squash(text.removeprefix(bos))

    def begins(before: str, k: int) -> bool:
        text = rendered(k)
        return text is not None and before.startswith(text)

    def find(start: int, text: str) -> tuple[tuple[Message, ...], bool]:
        decoded = decode(chat.tokenizer, ids[:start])
        before, run = _squash(decoded.removeprefix(bos)), _squash(text)
        spoken = [
            k
            for k, message in enumerate(messages)
            if message["role"] == "assistant" and _agrees(contents[k], run)
        ]
        here = [k for k in spoken if begins(before, k) and not begins(before, k + 1)]
        match = here[-1] if here else _by_contents(before, messages, contents, spoken)
        if match is not None:
            return tuple(messages[:match]), False
        return ({"role": "user", "content": decoded},) if decoded else (), True

    return find


def _by_contents(
    before: str, messages: Sequence[Message], contents: Sequence[str], spoken: Sequence[int]
) -> int | None:
    """The candidate whose earlier messages all stand before the run, in order.

    Templates drop system turns and cut old answers, never a question. Of several candidates, the
    one with the fewest such gaps (a short question may seem to stand in the template's own words);
    then the last.
    """
    found: list[tuple[int, int]] = []
    reached = missing = 0
    for k, content in enumerate(contents):
        if k in spoken:
            found.append((missing, -k))
        position = before.find(content, reached)
        if position >= 0:
            reached = position + len(content)
        elif messages[k]["role"] == "user":
            break
        else:
            missing += 1
    return -min(found)[1] if found else None


def _agrees(content: str, run: str) -> bool:
    """Whether a run is this message, up to truncation and what a template puts around it."""
    run = run.rstrip(REPLACEMENT)  # half a character, where the row was cut
    return run in content if len(run) <= len(content) else content in run
