"""Every error a user of this project can meet, named by what has to be changed.

All of them stop a run before its first step. A message says what was given, why it cannot work and
what to do. None derives from ImportError: host frameworks log those and train on without us.
"""

from __future__ import annotations

__all__ = [
    "CacheError",
    "CheckpointError",
    "ConfigError",
    "DataError",
    "GuardError",
    "OutputError",
    "PluginError",
    "StarDSSError",
]


class StarDSSError(ValueError):
    """Base of all errors raised on purpose by STAR-DSS."""


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
    """A result cannot be written: the disk is full, or the folder is not ours to write to."""


class PluginError(StarDSSError):
    """A plugin cannot be loaded or registers something that cannot be used."""
