"""Open files in folders that others may write to: regular ones only, never through a link."""

from __future__ import annotations

import os
import stat
from pathlib import Path

__all__ = ["NotRegularError", "kind_of", "read_regular"]


class NotRegularError(OSError):
    """What should be a regular file is something else, or is too large to be one of ours."""


def kind_of(path: Path) -> str:
    """Return what is at a path itself, for messages; "" for a regular file.

    Raises:
        FileNotFoundError: There is nothing.
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
        NotRegularError: It is no regular file, or has more than `max_bytes`.
        OSError: It cannot be opened.
    """
    if kind := kind_of(path):
        raise NotRegularError(f"it is {kind} and not a file")
    # Between that look and this one it may have been replaced.
    handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    with os.fdopen(handle, "rb") as file:
        status = os.fstat(handle)
        if not stat.S_ISREG(status.st_mode):
            raise NotRegularError("it is not a file any more")
        if status.st_size > max_bytes:
            raise NotRegularError(f"it has more than {max_bytes:,} bytes")
        return file.read(max_bytes)
