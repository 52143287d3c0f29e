"""Every error a user of this project can meet, named by what has to be changed.

All of them stop a run before its first step. A message says what was given, why it cannot work and
what to do. None derives from ImportError: host frameworks log those and train on without STAR-DSS.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

from star_dss_plugin.visible import visible, visible_line

__all__ = [
    "CacheError",
    "CheckpointError",
    "ConfigError",
    "DataError",
    "GuardError",
    "OutputError",
    "PluginError",
    "StarDSSError",
    "Where",
]

_LISTED = 5
"""Rows that a message names one by one."""


@dataclass(frozen=True)
class Where:
    """Say which part of the input an error is about.

    Attributes:
        file: The file or folder, as it was given; "" if unknown.
        rows: Numbers of the rows, counted from 0; a `range` is one run of rows.
        line: Line of the file on which the row begins, counted from 1; 0 if unknown.
        field: Name of the field or column; "" if unknown.
    """

    file: str = ""
    rows: Sequence[int] = ()
    line: int = 0
    field: str = ""

    def __str__(self) -> str:
        """Return the beginning of a message, such as "FILE: Row 3: field 'text': "."""
        field = f"field {self.field!r}" if self.field else ""
        parts = [visible_line(self.file, 500), self._row(), field]
        return "".join(f"{part}: " for part in parts if part)

    def _row(self) -> str:
        if isinstance(self.rows, range) and len(self.rows) > 1:
            return f"Rows {self.rows[0]} to {self.rows[-1]}"
        if not self.rows:
            return ""
        listed = ", ".join(map(str, self.rows[:_LISTED]))
        more = ", …" if len(self.rows) > _LISTED else ""
        return f"Row {listed}{more}" + (f" (line {self.line})" if self.line else "")


class StarDSSError(ValueError):
    """Base of all errors raised on purpose by STAR-DSS.

    Attributes:
        where: Which part of the input it is about; `str(error)` begins with it.
    """

    where: Where = Where()

    def at(self, **place: Any) -> Self:
        """Add what is not known yet about where the error is.

        Args:
            **place: Fields of `Where`. What the error says already stays: it was closer.

        Returns:
            The error itself, so that a class with a constructor of its own survives.
        """
        missing = {name: value for name, value in place.items() if not getattr(self.where, name)}
        self.where = replace(self.where, **missing)
        return self

    def counted_from(self, start: int) -> Self:
        """Move the rows of an error about a part of the data, whose first row is row `start`.

        Args:
            start: Number of the part's first row in the whole.

        Returns:
            The error itself.
        """
        self.where = replace(self.where, rows=tuple(start + row for row in self.where.rows))
        return self

    def __str__(self) -> str:
        """Return the message, in which no character of untrusted text acts on a terminal."""
        return visible(f"{self.where}{super().__str__()}")


class ConfigError(StarDSSError):
    """An option has a value that cannot work, alone or with the options beside it."""


class DataError(StarDSSError):
    """A row or a column of the data set cannot be scored or trained on."""


class GuardError(StarDSSError):
    """A guard cannot be loaded, or its answers cannot be trusted.

    Args:
        message: What happened.
        request: Which request of a batch it is about, if it is about one.
    """

    def __init__(self, message: str, *, request: int | None = None) -> None:
        super().__init__(message)
        self.request = request


class CacheError(StarDSSError):
    """The score cache cannot be read or written, or was given something it cannot hold."""


class CheckpointError(StarDSSError):
    """Training cannot resume from what it was given: it was not written to its end."""


class OutputError(StarDSSError):
    """A result cannot be written: the disk is full, or the folder does not allow it."""


class PluginError(StarDSSError):
    """A plugin cannot be loaded or registers something that cannot be used."""
