"""Find the responses of a data set, rendering and tokenizing every row once."""

from __future__ import annotations

import logging
import multiprocessing
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from datasets import Dataset, List, Value

from star_dss_plugin.data.columns import with_column
from star_dss_plugin.data.context import RowReader
from star_dss_plugin.data.responses import Response, has_untrained_tokens, responses_in
from star_dss_plugin.data.rows import (
    check_trained,
    content_rows,
    plain_rows,
    restrict_row_labels,
    with_labels,
    with_labels_from_masks,
    with_row_number,
)
from star_dss_plugin.data.templates.chat import ChatTokenizer
from star_dss_plugin.data.templates.tokenized import Tokenized, labels_of, trained_runs
from star_dss_plugin.data.tokenization import read_rows, truncate_row
from star_dss_plugin.segmenters import Segmenter

__all__ = ["ReadRows", "RowOptions", "missing_context_warning", "read_responses"]

logger = logging.getLogger(__name__)

_ROWS_NAMED = 5
_MISSING_CONTEXT_SHARE = 0.1  # share of responses without context from which a warning is logged
_ROWS_PER_PIECE = 64  # rows that a process reads before it returns them

_CUT_OFF = "max_length cuts off all that is trained"
_NO_ASSISTANT = "no assistant says anything in them"
_NO_LABELS = "all their labels are -100"


@dataclass(frozen=True)
class RowOptions:
    """How rows become responses.

    Attributes:
        segmenter: Decides where chunks end.
        chunk_size: M >= 1, in the segmenter's units.
        max_length: Raw rows are truncated to this many tokens; None: they are not.
        assistant_only_loss: Whether only text within `{% generation %}` is trained, in raw rows.
        keep_end: Whether truncation keeps the end of raw rows instead of the beginning.
    """

    segmenter: Segmenter
    chunk_size: int
    max_length: int | None = None
    assistant_only_loss: bool = False
    keep_end: bool = False


class ReadRows(NamedTuple):
    """A data set and its responses.

    Attributes:
        dataset: The rows, with `input_ids` and `labels`.
        responses: The responses of each row.
        untrained: The number of rows without a trained token, by reason.
    """

    dataset: Dataset
    responses: list[list[Response]]
    untrained: dict[str, int]


@dataclass(frozen=True)
class _RowResponses:
    """One row and its responses.

    Attributes:
        ids: `input_ids`.
        labels: `labels`.
        narrowed: Whether tokens of other roles were removed from the row's own labels.
        responses: The row's responses.
        silent: Why the row has no trained token; "" if it has one.
        rendered: Whether the row is a rendered chat that could not be parsed.
    """

    ids: list[int]
    labels: list[int]
    narrowed: bool
    responses: list[Response]
    silent: str
    rendered: bool


def read_responses(
    dataset: Dataset,
    chat: ChatTokenizer,
    options: RowOptions,
    *,
    needed: bool = True,
    num_proc: int = 1,
) -> ReadRows:
    """Tokenize a data set if it is raw, train only assistants' words, and find the responses.

    Args:
        dataset: Raw rows, or rows with `input_ids` and `labels` (or masks).
        chat: The trained model's tokenizer and its chat template.
        options: How rows become responses.
        needed: Whether at least one row must have a trained token.
        num_proc: Processes that read rows, at least 1. The result does not depend on it.

    Raises:
        DataError: A row cannot be read; the error has its number.
    """
    raw = "input_ids" not in dataset.column_names
    if not raw:
        dataset = with_labels_from_masks(dataset)
    read = list(_read_all(dataset, chat, options, num_proc))
    labels = [row.labels for row in read]
    if needed:
        check_trained(labels, (row.silent for row in read if row.silent))
    if raw:
        for name, column in (("input_ids", [row.ids for row in read]), ("labels", labels)):
            dataset = with_column(dataset, name, column, List(Value("int64")))
    else:
        dataset = with_labels(dataset, labels, sum(row.narrowed for row in read))
    _warn_about_rows(read)
    silent = Counter(row.silent for row in read if row.silent)
    return ReadRows(dataset, [row.responses for row in read], dict(sorted(silent.items())))


def _read_all(
    dataset: Dataset, chat: ChatTokenizer, options: RowOptions, num_proc: int
) -> Iterator[_RowResponses]:
    """Read the rows in order."""
    pieces = range(0, len(dataset), _ROWS_PER_PIECE)
    workers = min(num_proc, len(pieces))
    if workers < 2 or "fork" not in multiprocessing.get_all_start_methods():
        yield from _read_piece(dataset, chat, options, 0)
        return
    # Forked processes share the data, and their segmenter need not be picklable.
    _work["forked"] = dataset, chat, options
    try:
        with multiprocessing.get_context("fork").Pool(workers) as pool:
            for found in pool.imap(_read_forked, pieces):
                yield from found
    finally:
        del _work["forked"]


_work: dict[str, tuple[Dataset, ChatTokenizer, RowOptions]] = {}


def _read_forked(start: int) -> list[_RowResponses]:
    """Read one piece of the data in a forked process."""
    dataset, chat, options = _work["forked"]
    stop = min(start + _ROWS_PER_PIECE, len(dataset))
    return list(_read_piece(dataset.select(range(start, stop)), chat, options, start))


def _read_piece(
    dataset: Dataset, chat: ChatTokenizer, options: RowOptions, start: int
) -> Iterator[_RowResponses]:
    if "input_ids" in dataset.column_names:
        for i, row in enumerate(content_rows(dataset), start):
            yield with_row_number(i, _read_tokenized, row, chat, options)
        return
    only = options.assistant_only_loss
    tokenized = read_rows(plain_rows(dataset), chat, assistant_only_loss=only)
    for i in range(start, start + len(dataset)):
        yield with_row_number(i, _read_raw, with_row_number(i, next, tokenized), chat, options)


def _read_raw(tokenized: Tokenized, chat: ChatTokenizer, options: RowOptions) -> _RowResponses:
    ids, trained = truncate_row(tokenized, options.max_length, keep_end=options.keep_end)
    silent = "" if trained else _CUT_OFF if tokenized.trained else _NO_ASSISTANT
    reader = RowReader(chat, ids, {}, tokenized)
    found = responses_in(trained, reader, options.segmenter, options.chunk_size)
    return _RowResponses(ids, labels_of(ids, trained), False, found, silent, tokenized.rendered)


def _read_tokenized(
    row: Mapping[str, Any], chat: ChatTokenizer, options: RowOptions
) -> _RowResponses:
    labels, narrowed, tokenized = restrict_row_labels(row, chat)
    trained = trained_runs(labels)
    reader = RowReader(chat, row["input_ids"], row, tokenized, recover=has_untrained_tokens(labels))
    found = responses_in(trained, reader, options.segmenter, options.chunk_size)
    return _RowResponses(
        row["input_ids"], labels, narrowed, found, "" if trained else _NO_LABELS, False
    )


def missing_context_warning(missing: int, responses: int) -> str:
    """Return a warning about responses without context; "" if they are less than a tenth.

    Args:
        missing: The number of responses without context.
        responses: The number of responses.
    """
    if not missing or missing < _MISSING_CONTEXT_SHARE * responses:
        return ""
    return (
        f"{missing} of {responses} responses have nothing said before them: their rows are trained "
        "from the first token, so the guard takes a user's words in them for the assistant's, and "
        "a refusal behind an unsafe question scores low. Give question and answer separately: "
        "messages, or a prompt and its completion (Axolotl: type chat_template, alpaca or "
        "input_output in place of completion)"
    )


def _warn_about_rows(read: Sequence[_RowResponses]) -> None:
    """Warn about rows without trained tokens, unparsed chats, and raw or missing contexts."""
    silent: dict[str, list[int]] = defaultdict(list)
    for i, row in enumerate(read):
        if row.silent:
            silent[row.silent].append(i)
    for why, rows in silent.items():
        logger.warning(
            "%d of %d rows train nothing, because %s (rows %s). They stay in the data.",
            len(rows),
            len(read),
            why,
            _shown_rows(rows),
        )
    if rendered := [i for i, row in enumerate(read) if row.rendered]:
        logger.warning(
            "%d texts are chats that are rendered already (rows %s), and are read as they are, not "
            "turn by turn: a 'text' is one answer, and a 'prompt' is parsed only if it is what the "
            "tokenizer's chat template renders. Give messages.",
            len(rendered),
            _shown_rows(rendered),
        )
    responses = [response for row in read for response in row.responses]
    unasked = sum(response.lacks_context for response in responses)
    if said := missing_context_warning(unasked, len(responses)):
        logger.warning("%s.", said)
    if raw := sum(response.raw_context for response in responses):
        logger.warning(
            "For %d responses the guard reads the decoded tokens before them instead of messages: "
            "the data has none, or the chat template does not render them to these tokens.",
            raw,
        )


def _shown_rows(rows: Sequence[int]) -> str:
    return ", ".join(map(str, rows[:_ROWS_NAMED])) + (", …" if len(rows) > _ROWS_NAMED else "")
