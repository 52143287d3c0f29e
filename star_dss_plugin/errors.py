"""Define all errors of this project, one class for each kind of thing that the user has to change.

A message says what was given, why it cannot work and what to do. No class derives from ImportError,
because host frameworks log ImportErrors and continue to train without STAR-DSS.
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
"""How many rows a message lists."""


@dataclass(frozen=True)
class Where:
    """Locate an error in the input.

    Attributes:
        file: The file or folder, as it was given; "" if unknown.
        rows: Indices of the rows, from 0; a `range` stands for consecutive rows.
        line: Line of the file on which the row begins, from 1; 0 if unknown.
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
        where: The location of the error in the input; `str(error)` begins with it.
    """

    where: Where = Where()

    def at(self, **place: Any) -> Self:
        """Add to the error's location.

        Args:
            **place: Fields of `Where`. Fields that are set already stay, because they were set
                closer to the error.

        Returns:
            The error itself: a copy could not be made of a subclass with another constructor.
        """
        missing = {name: value for name, value in place.items() if not getattr(self.where, name)}
        self.where = replace(self.where, **missing)
        return self

    def counted_from(self, start: int) -> Self:
        """Convert rows from indices in a part of the data to indices in the whole data.

        Args:
            start: Index of the part's first row in the whole data.

        Returns:
            The error itself.
        """
        self.where = replace(self.where, rows=tuple(start + row for row in self.where.rows))
        return self

    def __str__(self) -> str:
        """Return the message with its location, safe to print even if it quotes untrusted text."""
        return visible(f"{self.where}{super().__str__()}")


class ConfigError(StarDSSError):
    """An option has an invalid value, or one that conflicts with other options."""


class DataError(StarDSSError):
    """A row or a column of the data set cannot be scored or trained on."""


class GuardError(StarDSSError):
    """A guard cannot be loaded, or its answers cannot be trusted.

    Args:
        message: What happened.
        request: The index of the failed request in its batch; None if not about one request.
    """

    def __init__(self, message: str, *, request: int | None = None) -> None:
        super().__init__(message)
        self.request = request


class CacheError(StarDSSError):
    """A cache cannot be read or written, or was given something that it cannot store."""


class CheckpointError(StarDSSError):
    """Training cannot resume from a checkpoint, because it was not written completely."""


class OutputError(StarDSSError):
    """A result cannot be written, because the disk is full or the folder is read-only."""


class PluginError(StarDSSError):
    """A plugin cannot be loaded, or registers something invalid."""
