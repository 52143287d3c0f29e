"""Tokenize and label rows that no host has tokenized, and restore labels that a host left open.

Hosts tokenize their own data; this module serves rows that no host has tokenized yet.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from star_dss_plugin.data.conversations import conversation_of, source_messages
from star_dss_plugin.data.templates.chat import ChatTokenizer
from star_dss_plugin.data.templates.plain_texts import render_prompt_completion, render_text
from star_dss_plugin.data.templates.tokenized import (
    RenderedRow,
    Runs,
    Tokenized,
    labels_of,
    runs_within,
)
from star_dss_plugin.data.templates.trained_turns import render_completion, render_conversation
from star_dss_plugin.errors import DataError

__all__ = ["read_row", "read_rows", "tokenize_row", "truncate_row"]

_AT_ONCE = 64
_CHARACTERS_AT_ONCE = 1 << 18
"""Limits of one tokenizer call, in rows and in characters."""


def tokenize_row(
    row: Mapping[str, Any],
    chat: ChatTokenizer,
    *,
    max_length: int | None = None,
    assistant_only_loss: bool = False,
) -> dict[str, list[int]]:
    """Return `input_ids` and `labels` of a raw row, as TRL's SFTTrainer makes them.

    Args:
        row: Has `messages` (only assistant turns are trained), `prompt` and `completion` (plain
            texts or messages; the completion is trained) or `text` (all of it is trained).
        chat: The trained model's tokenizer and its template.
        max_length: Tokens kept from the start; None: all.
        assistant_only_loss: Whether only text within `{% generation %}` is trained, in completions
            too.

    Raises:
        DataError: The row has none of these columns, or the assistant's turns cannot be located.
    """
    tokenized = read_row(row, chat, assistant_only_loss=assistant_only_loss)
    ids, trained = truncate_row(tokenized, max_length)
    return {"input_ids": ids, "labels": labels_of(ids, trained)}


def truncate_row(
    tokenized: Tokenized, max_length: int | None, *, keep_end: bool = False
) -> tuple[list[int], Runs]:
    """Truncate a tokenized row, and return its token ids and the runs of trained ones.

    Args:
        tokenized: The result of `read_row`.
        max_length: Tokens to keep; None: all.
        keep_end: Whether to keep the last tokens, as TRL's truncation_mode "keep_end" does.

    Raises:
        DataError: It is uncertain which tokens are trained.
    """
    if tokenized.trained is None:
        raise DataError(tokenized.problem)
    tokens = len(tokenized.encoded.ids)
    most = tokens if max_length is None else min(max_length, tokens)
    kept = slice(tokens - most, tokens) if keep_end else slice(0, most)
    return tokenized.encoded.ids[kept], runs_within(tokenized.trained, kept)


def read_rows(
    rows: Iterable[Mapping[str, Any]], chat: ChatTokenizer, *, assistant_only_loss: bool = False
) -> Iterator[Tokenized]:
    """Yield the result of `read_row` for each row, tokenizing several rows in one call.

    Args:
        rows: As for `tokenize_row`.
        chat: As for `tokenize_row`.
        assistant_only_loss: As for `tokenize_row`.

    Raises:
        DataError: As for `read_row`, after all earlier rows were yielded.
    """
    waiting: list[RenderedRow] = []
    length = 0
    for row in rows:
        try:
            rendered = _render(row, chat, assistant_only_loss, True)
        except DataError:
            yield from _tokenized(waiting, chat)
            raise
        full = len(waiting) == _AT_ONCE or length >= _CHARACTERS_AT_ONCE
        if waiting and (full or waiting[0].plain != rendered.plain):
            yield from _tokenized(waiting, chat)
            waiting, length = [], 0
        waiting.append(rendered)
        length += len(rendered.text)
    yield from _tokenized(waiting, chat)


def _tokenized(rows: Sequence[RenderedRow], chat: ChatTokenizer) -> Iterator[Tokenized]:
    """Tokenize rendered rows in one call; `plain` is the same for all."""
    if rows:
        encoded = chat.encode_all([row.text for row in rows], add_special_tokens=rows[0].plain)
        yield from (row.finish(found) for row, found in zip(rows, encoded, strict=True))


def read_row(
    row: Mapping[str, Any],
    chat: ChatTokenizer,
    *,
    assistant_only_loss: bool = False,
    whole_completion: bool = True,
) -> Tokenized:
    """Tokenize a row, and locate its messages and trained tokens.

    Args:
        row: As for `tokenize_row`.
        chat: As for `tokenize_row`.
        assistant_only_loss: As for `tokenize_row`.
        whole_completion: Whether all tokens behind the prompt are trained if the completion has
            only assistant turns, the template's own text included.

    Raises:
        DataError: The row has none of the columns, or its messages cannot be rendered.
    """
    rendered = _render(row, chat, assistant_only_loss, whole_completion)
    return rendered.finish(chat.encode(rendered.text, add_special_tokens=rendered.plain))


def _render(
    row: Mapping[str, Any], chat: ChatTokenizer, assistant_only_loss: bool, whole_completion: bool
) -> RenderedRow:
    """Render a row."""
    given = {name for name, value in row.items() if value is not None}
    if conversation_of(row) is not None:
        messages = source_messages(row)
        assert messages is not None
        return render_conversation(row, messages, chat, 0, assistant_only_loss)
    if {"prompt", "completion"} <= given:
        prompt, completion = row["prompt"], row["completion"]
        source = source_messages(row)
        assert source is not None
        if isinstance(prompt, str) != isinstance(completion, str):
            raise DataError(
                f"'prompt' is a {type(prompt).__name__} and 'completion' a "
                f"{type(completion).__name__}. Both must be texts, or both lists of messages."
            )
        if isinstance(prompt, str):
            return render_prompt_completion(prompt, completion, chat)
        others = any(m["role"] != "assistant" for m in completion)
        if others or assistant_only_loss or not whole_completion:
            return render_conversation(row, source, chat, len(prompt), assistant_only_loss)
        return render_completion(row, source, chat)
    if "text" in given:
        text = row["text"]
        if not isinstance(text, str):
            raise DataError(f"'text' is a {type(text).__name__}; it must be a text.")
        return render_text(text, chat)
    raise DataError(
        f"A row has the columns {sorted(given)}. Scoring needs 'messages', 'prompt' and "
        "'completion', or 'text' (or 'input_ids' and 'labels')."
    )
