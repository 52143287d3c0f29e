"""Files of JSON lines that runs append to, so that a killed run goes on where it was."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from star_dss_plugin.errors import writing

__all__ = ["append_lines", "read_lines"]


def read_lines(path: Path) -> list[Any]:
    """The values of all whole lines; none if there is no file.

    Half a line at the end, which a killed run leaves, is cut off the file.

    Raises:
        ValueError: A line is not JSON.
    """
    data = path.read_bytes() if path.is_file() else b""
    whole = data[: data.rfind(b"\n") + 1]
    if len(whole) < len(data):
        with path.open("r+b") as file:
            file.truncate(len(whole))
    return [json.loads(line) for line in whole.split(b"\n")[:-1]]


def append_lines(path: Path, values: Iterable[Any]) -> None:
    """Writes a line for each value, at once; the file and its folder are made if need be.

    Raises:
        OutputError: They cannot be written.
    """
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="ascii") as file:
            file.write("".join(json.dumps(value) + "\n" for value in values))
