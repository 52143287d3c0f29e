"""Prepare data sets for scoring: plain rows, labels, and no trained tokens outside responses."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from datasets import Dataset, List, Value

from star_dss_plugin.data.columns import with_column
from star_dss_plugin.data.host_labels import (
    MASKS,
    assistant_labels,
    has_mask,
    labels_from_masks,
    needs_assistant_labels,
)
from star_dss_plugin.data.media import check_features
from star_dss_plugin.data.responses import ids_and_labels
from star_dss_plugin.data.templates.chat import ChatTokenizer
from star_dss_plugin.data.templates.tokenized import Tokenized
from star_dss_plugin.data.tokenization import read_row
from star_dss_plugin.errors import DataError, StarDSSError
from star_dss_plugin.logprobs import IGNORE_INDEX

__all__ = [
    "CONTENT_COLUMNS",
    "check_trained",
    "content_rows",
    "plain_rows",
    "restrict_labels",
    "restrict_row_labels",
    "unreadable",
    "with_labels",
    "with_labels_from_masks",
    "with_row_number",
]

logger = logging.getLogger(__name__)

_AT_ONCE = 64  # rows converted to Python in one step, which is faster

CONTENT_COLUMNS = (
    "input_ids",
    "labels",
    "messages",
    "conversations",
    "prompt",
    "completion",
    "tools",
    "chat_template_kwargs",
    "completion_mask",
    "assistant_masks",
)
"""Columns of tokenized rows that determine the messages and the trained tokens."""


def content_rows(dataset: Dataset) -> Iterator[dict[str, Any]]:
    """Yield the rows as plain Python values, with the columns in `CONTENT_COLUMNS` only."""
    return plain_rows(dataset, [c for c in CONTENT_COLUMNS if c in dataset.column_names])


def with_row_number(i: int, function: Any, *args: Any, **kwargs: Any) -> Any:
    """Call `function` and add the row number to any StarDSSError it raises."""
    try:
        return function(*args, **kwargs)
    except StarDSSError as error:
        error.at(rows=(i,))
        raise


def restrict_labels(dataset: Dataset, chat: ChatTokenizer, *, needed: bool = True) -> Dataset:
    """Restrict the labels of a tokenized data set to the assistant's turns.

    Args:
        dataset: Rows with `input_ids` and `labels`.
        chat: The tokenizer and the template that made the tokens.
        needed: Whether at least one row must have a trained token.

    Raises:
        DataError: No row has a trained token, or the assistant's turns cannot be located.
    """
    column, changed = [], 0
    for i, row in enumerate(content_rows(dataset)):
        labels, narrowed, _ = with_row_number(i, restrict_row_labels, row, chat)
        changed += narrowed
        column.append(labels)
    if needed:
        check_trained(column)
    return with_labels(dataset, column, changed)


def restrict_row_labels(
    row: Mapping[str, Any], chat: ChatTokenizer
) -> tuple[list[int], bool, Tokenized | None]:
    """Return the labels of a tokenized row, restricted to the assistant's turns.

    Args:
        row: Has `input_ids`, `labels` and, if known, masks or the messages.
        chat: The tokenizer and the template that made the tokens.

    Returns:
        The labels; whether they differ from the row's own; the row's conversation, if it had to be
        rendered.

    Raises:
        DataError: The row's tokens are malformed, or the assistant's turns cannot be located.
    """
    _, labels = ids_and_labels(row)
    if not needs_assistant_labels(row):
        return labels, False, None
    tokenized = None if has_mask(row) else read_row(row, chat)
    found = assistant_labels(row, chat, tokenized)
    return found, found != labels, tokenized


def with_labels_from_masks(dataset: Dataset) -> Dataset:
    """Return tokenized rows with `labels`, which are made from masks if the column is missing.

    Raises:
        DataError: The rows have neither labels nor masks, or a mask is not as long as its row.
    """
    if "labels" in dataset.column_names:
        return dataset
    masks = [c for c in MASKS if c in dataset.column_names]
    if not masks:
        raise DataError(
            "The data set has 'input_ids' but no 'labels', so it does not say which tokens are "
            "trained. Add labels: a copy of input_ids with -100 where nothing is trained."
        )
    column = []
    for i, row in enumerate(plain_rows(dataset, ["input_ids", *masks])):
        ids = row["input_ids"]
        if any(not isinstance(row[m], list) or len(row[m]) != len(ids) for m in masks):
            raise DataError(
                f"{' or '.join(masks)} is not as long as input_ids. Give one 0 or 1 for each token."
            ).at(rows=(i,))
        column.append(labels_from_masks(ids, [row[m] for m in masks]))
    return with_column(dataset, "labels", column, List(Value("int64")))


def check_trained(labels: Sequence[Sequence[int]], reasons: Iterable[str] = ()) -> None:
    """Raise a DataError if no row has a trained token.

    Args:
        labels: The labels of each row.
        reasons: Reasons why rows have no trained token, for the message.
    """
    if not any(label != IGNORE_INDEX for row in labels for label in row):
        given = " and ".join(dict.fromkeys(reasons)) or "every label is -100"
        raise DataError(
            f"None of the {len(labels)} rows has a trained token: {given}. Check the "
            "columns, the chat template and max_length (a prompt that fills it leaves no response)."
        )


def with_labels(dataset: Dataset, column: Sequence[Sequence[int]], changed: int) -> Dataset:
    """Replace the labels and log a warning if `changed` rows is not 0."""
    if not changed:
        return dataset
    logger.warning(
        "In %d of %d conversations what the user says was trained too. It is not any more, "
        "because STAR-DSS shapes only what the assistant says.",
        changed,
        len(column),
    )
    return with_column(dataset, "labels", column, List(Value("int64")))


def plain_rows(dataset: Dataset, columns: Sequence[str] | None = None) -> Iterator[dict[str, Any]]:
    """Yield the rows as plain Python values.

    Args:
        dataset: The rows.
        columns: The columns to read; None: all.

    Raises:
        DataError: A value cannot be read, or a column contains media, whose values name files.
    """
    plain = dataset.with_format(None)
    check_features(plain.features, columns=columns)
    if columns is not None:
        plain = plain.select_columns(list(columns))
    try:
        for batch in plain.iter(_AT_ONCE):
            names, columns = batch.keys(), batch.values()
            yield from (dict(zip(names, row, strict=True)) for row in zip(*columns, strict=True))
    except ValueError as error:  # a UnicodeDecodeError, or invalid text in a JSON column
        raise unreadable(plain, error) from error


def unreadable(dataset: Dataset, error: Exception) -> DataError:
    """Return the error for the first value that cannot be read.

    Args:
        dataset: The rows.
        error: The reader's exception, for the message if no single value fails.
    """
    plain = dataset.with_format(None)
    for name in plain.column_names:
        column = plain.select_columns([name])
        for i in range(len(column)):
            try:
                column[i]
            except ValueError as fault:
                return DataError(
                    f"the value cannot be read: {fault}. Write the data again, in UTF-8."
                ).at(rows=(i,), field=name)
    return DataError(f"The data is damaged: {error}. Write it again, in UTF-8.")
