"""Every error a user of this project can meet, named by what has to be changed.

All of them stop a run before its first step. A message says what was given, why it cannot work and
what to do. None derives from ImportError: host frameworks log those and train on without us.
"""

from __future__ import annotations

import contextlib
import difflib
import os
from collections.abc import Iterable, Iterator

__all__ = [
    "CacheError",
    "CheckpointError",
    "ConfigError",
    "DataError",
    "GuardError",
    "OutputError",
    "PluginError",
    "StarDSSError",
    "unknown_name",
    "writing",
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


@contextlib.contextmanager
def writing(path: str | os.PathLike[str]) -> Iterator[None]:
    """Turns an error of the file system into one that says what to do.

    Args:
        path: The result that is being written.

    Raises:
        OutputError: In place of an OSError.
    """
    try:
        yield
    except OSError as error:
        raise OutputError(
            f"{os.fspath(path)} cannot be written: {error}. Free space there, or name an output "
            "that can be written, and start the same command again: what guards and models have "
            "answered so far is kept, and nothing that was complete is lost."
        ) from error


def unknown_name(kind: str, name: object, known: Iterable[str]) -> ConfigError:
    """The error for a name that nobody registered, with the nearest known names.

    Args:
        kind: What was looked up, in the singular ("guard", "loss_type").
        name: What was given.
        known: All names that would have worked.
    """
    names = sorted(known)
    near = difflib.get_close_matches(str(name), names, n=3, cutoff=0.5)
    hint = f" Did you mean {' or '.join(repr(n) for n in near)}?" if near else ""
    return ConfigError(f"Unknown {kind} {name!r}.{hint} Known: {', '.join(names)}.")
