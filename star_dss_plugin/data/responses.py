"""Find the responses of a row, with their text, context and chunks.

A *response* is a maximal run of trained tokens (`labels != -100`). Its text is the exact decoding
of those tokens, without the special tokens around it. Its context is the messages before it, or the
decoded tokens before it if the messages are unknown.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from operator import eq
from typing import Any

from star_dss_plugin.data.context import RowReader, RunText
from star_dss_plugin.data.requests import PrefixRequest
from star_dss_plugin.data.templates.chat import ChatTokenizer
from star_dss_plugin.data.templates.tokenized import Runs, trained_runs
from star_dss_plugin.errors import DataError
from star_dss_plugin.logprobs import IGNORE_INDEX
from star_dss_plugin.segmenters import Segmenter, chunk_ends

__all__ = ["Response", "find_responses", "has_untrained_tokens", "ids_and_labels", "responses_in"]

_IDS = 2**32  # token ids that decoders accept are below this


@dataclass(frozen=True)
class Response:
    """One response of a row and its chunks.

    Attributes:
        start: Index of the run's first token in the row.
        end: One past the index of its last token.
        chunk_ends: One past the index of each chunk's last token; strictly increasing. The last is
            `end`, so that the chunks partition the run, special tokens included.
        request: Context, text and prefix ends for the guard, one prefix per chunk.
        raw_context: Whether the context is decoded tokens, because no message matched the run.
    """

    start: int
    end: int
    chunk_ends: tuple[int, ...]
    request: PrefixRequest
    raw_context: bool

    @property
    def lacks_context(self) -> bool:
        """Whether the row is trained from its first token, and no message is known before it.

        Not so of an assistant's message that begins a conversation.
        """
        return self.raw_context and not self.request.context


def ids_and_labels(row: Mapping[str, Any]) -> tuple[list[int], list[int]]:
    """Return `input_ids` and `labels` of a row after checking them.

    Raises:
        DataError: One of them is not a list of integers, they differ in length, an id is out of
            range, or a label is neither -100 nor its token.
    """
    ids, labels = _integers(row, "input_ids"), _integers(row, "labels")
    if len(ids) != len(labels):
        raise DataError(
            f"input_ids has {len(ids)} tokens and labels has {len(labels)}. They must be the same "
            "tokens: truncate both, or neither."
        )
    if ids and not (min(ids) >= 0 and max(ids) < _IDS):
        wrong = [i for i in ids if not 0 <= i < _IDS]
        raise DataError(
            f"input_ids holds {wrong[0]}, which is no token of any tokenizer. Tokenize the row "
            "again, or remove it."
        )
    for start, end in trained_runs(labels):
        if labels[start:end] != ids[start:end]:
            raise DataError(
                f"The labels at tokens {start} to {end} are not the input's own tokens. STAR-DSS "
                "needs unshifted labels: a copy of input_ids with -100 where nothing is trained."
            )
    return ids, labels


def _integers(row: Mapping[str, Any], column: str) -> list[int]:
    found = row[column]
    if not isinstance(found, Sequence) or isinstance(found, str | bytes):
        raise DataError(
            f"{column} is a {type(found).__name__}; it must be a list of integers. Tokenize the "
            "row again, or remove it."
        )
    if other := set(map(type, found)) - {int}:
        names = " and ".join(sorted(kind.__name__ for kind in other))
        raise DataError(
            f"{column} holds {names}; it must be a list of integers. Tokenize the row again, or "
            "remove it."
        )
    return list(found)


def find_responses(
    row: Mapping[str, Any],
    chat: ChatTokenizer,
    segmenter: Segmenter,
    chunk_size: int,
) -> list[Response]:
    """Return all responses of a tokenized row.

    Args:
        row: `input_ids` and `labels`, and if known the messages (`messages`, or `prompt` and
            `completion`). Unknown messages are parsed from the tokens, unless all are trained.
        chat: The tokenizer and the template that made `input_ids`.
        segmenter: Decides where chunks end.
        chunk_size: M, in the segmenter's units.

    Raises:
        DataError: As for `ids_and_labels` and `RowReader`.
    """
    ids, labels = ids_and_labels(row)
    reader = RowReader(chat, ids, row, recover=has_untrained_tokens(labels))
    return responses_in(trained_runs(labels), reader, segmenter, chunk_size)


def has_untrained_tokens(labels: Sequence[int]) -> bool:
    """Return whether a row has untrained tokens.

    A row without any is treated as plain text, even if it looks like a chat.
    """
    return IGNORE_INDEX in labels


def responses_in(
    trained: Runs, reader: RowReader, segmenter: Segmenter, chunk_size: int
) -> list[Response]:
    """Return one response per run of trained tokens of a row."""
    return [
        _response(reader.read(start, end), start, end, segmenter, chunk_size)
        for start, end in trained
    ]


def _response(
    run: RunText, start: int, end: int, segmenter: Segmenter, chunk_size: int
) -> Response:
    """Split a run into chunks; tokens without text at its beginning and end are not counted."""
    ends = run.ends
    first = bisect_right(ends, 0)
    last = bisect_left(ends, len(run.text)) + 1 if run.text else first
    cuts = chunk_ends(segmenter(run.text, ends[first:last], chunk_size), run.complete[first:last])
    prefix_ends = [ends[first + cut - 1] for cut in cuts] or [0]
    tokens = [start + first + cut for cut in cuts[:-1]] + [end]
    tokens, prefix_ends = _merge_empty(tokens, prefix_ends)
    before = len(run.before)
    request = PrefixRequest(
        run.context,
        run.before + run.text,
        tuple(before + end for end in prefix_ends) if before else tuple(prefix_ends),
    )
    return Response(start, end, tuple(tokens), request, run.raw)


def _merge_empty(tokens: list[int], prefix_ends: list[int]) -> tuple[list[int], list[int]]:
    """Merge each chunk that adds no text (its tokens decode to nothing) into the chunk before."""
    if not any(map(eq, prefix_ends, prefix_ends[1:])):
        return tokens, prefix_ends
    keep = [i for i, (a, b) in enumerate(pairwise([*prefix_ends, -1])) if a != b]
    return [tokens[i] for i in keep], [prefix_ends[i] for i in keep]
