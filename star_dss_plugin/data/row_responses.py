"""Read the responses of a data set: every row is rendered and tokenized once, in any process."""

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
from star_dss_plugin.data.responses import Response, is_answered, responses_in, runs
from star_dss_plugin.data.rows import (
    check_trained,
    in_row,
    known_rows,
    labelled_by_masks,
    own_labels,
    plain_rows,
    with_labels,
)
from star_dss_plugin.data.templates.chat import ChatTokenizer
from star_dss_plugin.data.templates.tokenized import Tokenized, labels_of
from star_dss_plugin.data.tokenization import cut_row, read_rows
from star_dss_plugin.segmenters import Segmenter

__all__ = ["ReadRows", "RowOptions", "read_responses", "without_question"]

logger = logging.getLogger(__name__)

_ROWS_NAMED = 5
_UNASKED = 0.1  # the share of responses that answer nothing from which on it is said
_ROWS_A_PIECE = 64  # that a process reads before it hands them back

_CUT = "max_length cuts off all that is trained"
_SILENT = "no assistant says anything in them"
_MASKED = "all their labels are -100"


@dataclass(frozen=True)
class RowOptions:
    """How rows become responses.

    Attributes:
        segmenter: Where chunks end.
        chunk_size: M >= 1, in the segmenter's units.
        max_length: Raw rows are cut to this many tokens; None: they are not.
        assistant_only_loss: Whether of raw rows only what the chat template marks as generated is
            trained.
        keep_end: Whether the end of raw rows is kept where they are cut, and not the beginning.
    """

    segmenter: Segmenter
    chunk_size: int
    max_length: int | None = None
    assistant_only_loss: bool = False
    keep_end: bool = False


class ReadRows(NamedTuple):
    """What was found in a data set.

    Attributes:
        dataset: With `input_ids` and `labels`.
        responses: Of each row.
        untrained: How many rows train nothing, by why.
    """

    dataset: Dataset
    responses: list[list[Response]]
    untrained: dict[str, int]


@dataclass(frozen=True)
class _Read:
    """What was found in one row."""

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
    """Return a tokenized data set in which only responses are trained, and its responses.

    Args:
        dataset: Raw rows, or rows with `input_ids` and `labels` (or masks).
        chat: The trained model's tokenizer and the template of its conversations.
        options: How rows become responses.
        needed: Whether some row has to have a trained token.
        num_proc: Processes that read rows, at least 1. They read the same for any number.

    Raises:
        DataError: What cannot be read, with the row's number.
    """
    raw = "input_ids" not in dataset.column_names
    if not raw:
        dataset = labelled_by_masks(dataset)
    read = list(_each(dataset, chat, options, num_proc))
    labels = [row.labels for row in read]
    if needed:
        check_trained(labels, (row.silent for row in read if row.silent))
    if raw:
        for name, column in (("input_ids", [row.ids for row in read]), ("labels", labels)):
            dataset = with_column(dataset, name, column, List(Value("int64")))
    else:
        dataset = with_labels(dataset, labels, sum(row.narrowed for row in read))
    _say_what_is_missing(read)
    silent = Counter(row.silent for row in read if row.silent)
    return ReadRows(dataset, [row.responses for row in read], dict(sorted(silent.items())))


def _each(
    dataset: Dataset, chat: ChatTokenizer, options: RowOptions, num_proc: int
) -> Iterator[_Read]:
    """Yield what is in each row, in their order."""
    pieces = range(0, len(dataset), _ROWS_A_PIECE)
    workers = min(num_proc, len(pieces))
    if workers < 2 or "fork" not in multiprocessing.get_all_start_methods():
        yield from _piece(dataset, chat, options, 0)
        return
    # Forked processes need no copy of the data, and segmenters that cannot be pickled work too.
    _work["forked"] = dataset, chat, options
    try:
        with multiprocessing.get_context("fork").Pool(workers) as pool:
            for found in pool.imap(_forked, pieces):
                yield from found
    finally:
        del _work["forked"]


_work: dict[str, tuple[Dataset, ChatTokenizer, RowOptions]] = {}


def _forked(start: int) -> list[_Read]:
    """Read one piece of the data in a forked process."""
    dataset, chat, options = _work["forked"]
    stop = min(start + _ROWS_A_PIECE, len(dataset))
    return list(_piece(dataset.select(range(start, stop)), chat, options, start))


def _piece(
    dataset: Dataset, chat: ChatTokenizer, options: RowOptions, start: int
) -> Iterator[_Read]:
    if "input_ids" in dataset.column_names:
        for i, row in enumerate(known_rows(dataset), start):
            yield in_row(i, _read_tokenized, row, chat, options)
        return
    only = options.assistant_only_loss
    made = read_rows(plain_rows(dataset), chat, assistant_only_loss=only)
    for i in range(start, start + len(dataset)):
        yield in_row(i, _read_raw, in_row(i, next, made), chat, options)


def _read_raw(made: Tokenized, chat: ChatTokenizer, options: RowOptions) -> _Read:
    ids, trained = cut_row(made, options.max_length, keep_end=options.keep_end)
    silent = "" if trained else _CUT if made.trained else _SILENT
    reader = RowReader(chat, ids, {}, made)
    found = responses_in(trained, reader, options.segmenter, options.chunk_size)
    return _Read(ids, labels_of(ids, trained), False, found, silent, made.rendered)


def _read_tokenized(row: Mapping[str, Any], chat: ChatTokenizer, options: RowOptions) -> _Read:
    labels, narrowed, made = own_labels(row, chat)
    trained = runs(labels)
    reader = RowReader(chat, row["input_ids"], row, made, recover=is_answered(labels))
    found = responses_in(trained, reader, options.segmenter, options.chunk_size)
    return _Read(row["input_ids"], labels, narrowed, found, "" if trained else _MASKED, False)


def without_question(unasked: int, responses: int) -> str:
    """Say that responses have nothing before them; nothing where that is true of few.

    Args:
        unasked: How many have nothing before them.
        responses: How many there are.
    """
    if not unasked or unasked < _UNASKED * responses:
        return ""
    return (
        f"{unasked} of {responses} responses have nothing said before them: their rows are trained "
        "from the beginning, so the guard takes all of it for the assistant's words, a user's, "
        "too, and a refusal behind an unsafe question scores low with it. Give question and answer "
        "apart: messages, or a prompt and its completion (Axolotl: type chat_template, alpaca or "
        "input_output in place of completion)"
    )


def _say_what_is_missing(read: Sequence[_Read]) -> None:
    """Warn of rows that train nothing, of raw or no contexts, and of texts that are chats."""
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
            _named(rows),
        )
    if rendered := [i for i, row in enumerate(read) if row.rendered]:
        logger.warning(
            "%d texts are chats that are rendered already (rows %s), and the tokenizer's chat "
            "template does not give them, so nobody can tell their turns apart. Give messages.",
            len(rendered),
            _named(rendered),
        )
    responses = [response for row in read for response in row.responses]
    unasked = sum(not response.request.context for response in responses)
    if said := without_question(unasked, len(responses)):
        logger.warning("%s.", said)
    if raw := sum(response.raw_context for response in responses):
        logger.warning(
            "For %d responses the guard reads the decoded tokens before them: the data has tokens "
            "or texts only, or the chat template does not make these tokens of the messages.",
            raw,
        )


def _named(rows: Sequence[int]) -> str:
    return ", ".join(map(str, rows[:_ROWS_NAMED])) + (", …" if len(rows) > _ROWS_NAMED else "")
