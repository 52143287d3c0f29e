"""Rows of a data set as plain values, or an error that names the row and the column.

Arrow keeps the bytes that it is given: text may be no UTF-8, and offsets in a damaged file may
point anywhere. And a column's type may make the names of files out of its values.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import pyarrow as pa
from datasets import Dataset, Json, LargeList, List

from star_dss_plugin.errors import DataError

__all__ = ["check_readable", "plain_rows"]


def check_readable(dataset: Dataset, source: str) -> None:
    """Checks a data set that came from a file, before any of its values is used.

    Args:
        dataset: As read.
        source: Where from, for messages.

    Raises:
        DataError: Its bytes are not what they should be, or a column holds media, whose rows name
            files: those would be opened, and copied into whatever is written.
    """
    for name, feature in dataset.features.items():
        if _names_files(feature):
            raise DataError(
                f"{source}: the column {name!r} is {feature}, whose values name files to be "
                "opened. Only text can be scored: remove the column."
            )
    try:
        dataset.data.validate(full=True)
    except pa.ArrowInvalid as error:
        where = _unreadable(dataset) or f"it is damaged: {error}."
        raise DataError(f"{source}: {where} Write the file again, in UTF-8.") from error


def plain_rows(dataset: Dataset, columns: Sequence[str] | None = None) -> Iterator[dict[str, Any]]:
    """The rows as plain Python values.

    Args:
        dataset: The rows.
        columns: Which columns; None: all.

    Raises:
        DataError: A value cannot be read.
    """
    plain = dataset.with_format(None)
    if columns is not None:
        plain = plain.select_columns(list(columns))
    try:
        yield from map(dict, plain)
    except ValueError as error:  # UnicodeDecodeError; text that is not the JSON it should be
        raise DataError(
            f"{_unreadable(plain) or f'The rows cannot be read: {error}.'} Write the data again, "
            "in UTF-8."
        ) from error


def _names_files(feature: Any) -> bool:
    """Whether a column holds images, sounds or the like, at any depth."""
    if isinstance(feature, List | LargeList):
        return _names_files(feature.feature)
    if isinstance(feature, dict):
        return any(map(_names_files, feature.values()))
    return hasattr(feature, "decode_example") and not isinstance(feature, Json)


def _unreadable(dataset: Dataset) -> str:
    """The first row, and its column, that cannot be read, as a sentence; "" if all can."""
    plain = dataset.with_format(None)
    for name in plain.column_names:
        column = plain.select_columns([name])
        for i in range(len(column)):
            try:
                column[i]
            except ValueError as error:
                return f"Row {i}: column {name!r} cannot be read: {error}."
    return ""
