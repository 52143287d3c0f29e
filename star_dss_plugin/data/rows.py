"""Data sets as responses need them: tokenized, and with nothing trained that is not a response."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from typing import Any

from datasets import Dataset, List, Value

from star_dss_plugin.data.chat import ChatTokenizer
from star_dss_plugin.data.columns import with_column
from star_dss_plugin.data.media import check_features
from star_dss_plugin.data.responses import tokens_of
from star_dss_plugin.data.tokenization import assistant_labels, needs_assistant_labels, tokenize_row
from star_dss_plugin.errors import DataError, StarDSSError
from star_dss_plugin.logprobs import IGNORE_INDEX

__all__ = ["in_row", "known_rows", "only_responses", "plain_rows", "tokenized", "unreadable"]

logger = logging.getLogger(__name__)

_COLUMNS = (
    "input_ids",
    "labels",
    "messages",
    "prompt",
    "completion",
    "tools",
    "chat_template_kwargs",
)


def known_rows(dataset: Dataset) -> Iterator[dict[str, Any]]:
    """The rows as plain Python values, with the columns that say what was said."""
    return plain_rows(dataset, [c for c in _COLUMNS if c in dataset.column_names])


def in_row(i: int, function: Any, *args: Any, **kwargs: Any) -> Any:
    """Call `function` and add the row number to any StarDSSError it raises."""
    try:
        return function(*args, **kwargs)
    except StarDSSError as error:
        error.at(rows=(i,))
        raise


def tokenized(dataset: Dataset, chat: ChatTokenizer, max_length: int | None) -> Dataset:
    """Adds `input_ids` and `labels` to raw rows (`tokenization.tokenize_row`)."""
    rows = [
        in_row(i, tokenize_row, row, chat, max_length=max_length)
        for i, row in enumerate(plain_rows(dataset))
    ]
    for name in ("input_ids", "labels"):
        column = [row[name] for row in rows]
        dataset = with_column(dataset, name, column, List(Value("int64")))
    return dataset


def only_responses(
    dataset: Dataset,
    chat: ChatTokenizer,
    *,
    needed: bool = True,
) -> Dataset:
    """Takes the turns that are not an assistant's out of the labels, where they were trained.

    Args:
        dataset: With `input_ids` and `labels`.
        chat: The tokenizer and the template that made the tokens.
        needed: Whether some row has to have a trained token.

    Raises:
        DataError: No row has a trained token, though one is needed, or the assistant's turns cannot
            be found.
    """
    column, changed, trained = [], 0, False
    for i, row in enumerate(known_rows(dataset)):
        _, labels = in_row(i, tokens_of, row)
        if in_row(i, needs_assistant_labels, row):
            labels = in_row(i, assistant_labels, row, chat)
            changed += labels != row["labels"]
        trained = trained or any(label != IGNORE_INDEX for label in labels)
        column.append(labels)
    if needed and not trained:
        raise DataError(
            f"None of the {len(column)} rows has a trained token: every label is -100. Check the "
            "columns, the chat template and max_length (a prompt that fills it leaves no response)."
        )
    if not changed:
        return dataset
    logger.warning(
        "In %d of %d conversations what the user says was trained too; it is not any more. "
        "STAR-DSS shapes what the assistant says.",
        changed,
        len(column),
    )
    return with_column(dataset, "labels", column, List(Value("int64")))


def plain_rows(dataset: Dataset, columns: Sequence[str] | None = None) -> Iterator[dict[str, Any]]:
    """The rows as plain Python values.

    Args:
        dataset: The rows.
        columns: Which columns; None: all.

    Raises:
        DataError: A value cannot be read, or a column holds media, whose values name files.
    """
    plain = dataset.with_format(None)
    check_features(plain.features, columns=columns)
    if columns is not None:
        plain = plain.select_columns(list(columns))
    try:
        yield from map(dict, plain)
    except ValueError as error:  # UnicodeDecodeError; text that is not the JSON it should be
        raise unreadable(plain, error) from error


def unreadable(dataset: Dataset, error: Exception) -> DataError:
    """Return the error for the first value that cannot be read.

    Args:
        dataset: The rows.
        error: What reading them raised, for the message if no single value is at fault.
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
