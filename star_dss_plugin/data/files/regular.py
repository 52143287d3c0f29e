"""Open files in folders that others can write to: only regular files, never through a link."""

from __future__ import annotations

import os
import stat
from pathlib import Path

__all__ = ["NotRegularError", "kind_of", "read_regular"]


class NotRegularError(OSError):
    """A file is not regular, or is larger than the plugin writes it."""


def kind_of(path: Path) -> str:
    """Return what a path is, without following links, for messages; "" for a regular file.

    Raises:
        FileNotFoundError: The path does not exist.
    """
    mode = path.lstat().st_mode
    kinds = (
        (stat.S_ISREG, ""),
        (stat.S_ISLNK, "a link"),
        (stat.S_ISDIR, "a folder"),
        (stat.S_ISFIFO, "a pipe"),
        (stat.S_ISSOCK, "a socket"),
    )
    return next((name for matches, name in kinds if matches(mode)), "a device")


def read_regular(path: Path, max_bytes: int) -> bytes:
    """Return the contents of a regular file, without waiting for a pipe or following a link.

    Raises:
        NotRegularError: The path is not a regular file, or has more than `max_bytes`.
        OSError: The file cannot be opened.
    """
    if kind := kind_of(path):
        raise NotRegularError(f"it is {kind} and not a file")
    # The file may have been replaced since `kind_of`.
    handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    with os.fdopen(handle, "rb") as file:
        status = os.fstat(handle)
        if not stat.S_ISREG(status.st_mode):
            raise NotRegularError("it is not a file any more")
        if status.st_size > max_bytes:
            raise NotRegularError(f"it has more than {max_bytes:,} bytes")
        return file.read(max_bytes)
