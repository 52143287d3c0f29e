"""Restrict the labels of rows that a host tokenized to the assistant's turns.

On a conversation, TRL trains every token unless `assistant_only_loss` is set. A response is what an
assistant says (paper, section 3), so only those tokens stay trained.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from star_dss_plugin.data.conversations import conversation_of, source_messages
from star_dss_plugin.data.templates.chat import ChatTokenizer
from star_dss_plugin.data.templates.tokenized import Tokenized, labels_of, runs_within, trained_runs
from star_dss_plugin.data.tokenization import read_row
from star_dss_plugin.errors import DataError
from star_dss_plugin.logprobs import IGNORE_INDEX

__all__ = [
    "MASKS",
    "assistant_labels",
    "has_mask",
    "labels_from_masks",
    "needs_assistant_labels",
]

MASKS = ("completion_mask", "assistant_masks")
"""TRL's columns with 1 for trained tokens and 0 for others."""


def needs_assistant_labels(row: Mapping[str, Any]) -> bool:
    """Return whether the labels of a tokenized row train turns of other roles than the assistant.

    True if every token of a conversation, or of a prompt and its completion, is trained, or if a
    completion that includes turns of other roles is trained as one run.
    """
    messages, completion = conversation_of(row), row.get("completion")
    if isinstance(messages, list) or isinstance(completion, list):
        source_messages(row)  # raises a DataError if they are not messages
    if has_mask(row) and IGNORE_INDEX not in row["labels"]:
        return True
    if isinstance(messages, list):
        others = any(m["role"] != "assistant" for m in messages)
        return others and IGNORE_INDEX not in row["labels"]
    if isinstance(completion, list):
        others = any(m["role"] != "assistant" for m in completion)
        # Several runs: the host has excluded other roles already (assistant_only_loss).
        in_one_run = len(trained_runs(row["labels"])) == 1
        return IGNORE_INDEX not in row["labels"] or (others and in_one_run)
    said = isinstance(row.get("prompt"), str) and isinstance(completion, str)
    return said and bool(row["prompt"]) and IGNORE_INDEX not in row["labels"]


def assistant_labels(
    row: Mapping[str, Any], chat: ChatTokenizer, tokenized: Tokenized | None = None
) -> list[int]:
    """Return labels of a tokenized row with only its assistant turns trained.

    Args:
        row: `input_ids` (possibly truncated at either end) and the messages they were made from.
        chat: The tokenizer and the template that made `input_ids`.
        tokenized: The result of `read_row` for the row, if known.

    Returns:
        One label per token of `input_ids`.

    Raises:
        DataError: The row's messages render to other tokens.
    """
    given = list(row["input_ids"])
    if has_mask(row):
        return labels_from_masks(given, [row[m] for m in MASKS if row.get(m) is not None])
    tokenized = tokenized or read_row(row, chat)
    if tokenized.trained is None:
        raise DataError(tokenized.problem)
    ids, trained = tokenized.encoded.ids, tokenized.trained
    for start in (0, max(0, len(ids) - len(given))):
        kept = slice(start, start + len(given))
        if ids[kept] == given:
            return labels_of(given, runs_within(trained, kept))
    if tokenized.plain:
        raise DataError(
            "All tokens of a prompt and its completion are trained, and they are not those of the "
            "two texts, so the completion cannot be found in them. Set completion_only_loss=True, "
            "or give labels that are -100 on the prompt."
        )
    raise DataError(
        "All tokens of a conversation are trained, and its tokens are not those of its chat "
        "template, so the assistant's turns cannot be found in them. Set "
        "assistant_only_loss=True, or give prompt-completion data."
    )


def labels_from_masks(ids: Sequence[int], masks: Sequence[Sequence[int]]) -> list[int]:
    """Return one label per token: the token's id if it is 1 in every mask, else -100."""
    tokens = zip(ids, *masks, strict=True)
    return [token if all(bits) else IGNORE_INDEX for token, *bits in tokens]


def has_mask(row: Mapping[str, Any]) -> bool:
    """Return whether a row's own masks determine its trained tokens.

    They do not if a host truncated `input_ids` but not the masks, or if the completion includes
    turns of other roles; then the row's messages are used.
    """
    masks = [row[m] for m in MASKS if row.get(m) is not None]
    completion = row.get("completion")
    if isinstance(completion, list) and any(m["role"] != "assistant" for m in completion):
        return False
    return bool(masks) and all(len(m) == len(row["input_ids"]) for m in masks)
