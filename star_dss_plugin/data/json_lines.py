"""What is wrong with a JSON file of rows: line, row and field, which readers do not say.

`check_json` is the quick look before a file is read. It is there for more than the words: pyarrow
crashes on a file that holds nothing but `null`, and reads bytes that are no UTF-8 without a word.
`json_fault` is the thorough look behind a reader that has failed.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from star_dss_plugin.data.writing import writing
from star_dss_plugin.errors import DataError

__all__ = ["append_lines", "check_json", "json_fault", "read_lines"]

_SPACE = re.compile(r"\s*")
_DEPTH = 200
"""Deeper than any row of text is nested, and within Python's own limit."""


def check_json(path: Path) -> None:
    """Checks that a file holds objects, one a line or in a list, in UTF-8.

    Raises:
        DataError: It does not; the message names the file, and the line and the row if it has any.
    """
    lines = _lines(path)
    first = next(lines, None)
    if first is None:
        raise DataError(f"{path} is empty: it has no rows. Give a file with one object per line.")
    fault = _not_utf8(*first) or _no_object_here(*first)
    if first[2].startswith(b"[") or (not fault and not _is_object(first[2])):
        fault = _document_fault(path)  # a list, or objects that are written over several lines
    elif not fault:
        fault = next(
            filter(None, (_not_utf8(*line) or _no_object_here(*line) for line in lines)), ""
        )
    if fault:
        raise DataError(f"{path}: {fault} Each row must be an object with named fields, in UTF-8.")


def json_fault(path: Path) -> str:
    """What is wrong with a file that cannot be read, as one or two sentences; "" if nothing is."""
    kinds: dict[str, tuple[str, str]] = {}
    try:
        for line, row, data in _lines(path):
            where = f"row {row} (line {line})"
            try:
                value = json.loads(data, object_pairs_hook=_no_field_twice)
            except (ValueError, RecursionError) as error:
                return f"{where} is not JSON: {error}."
            if fault := _value_fault(value, "", where, kinds, 0):
                return fault
    except OSError as error:
        return f"it cannot be opened: {error}."
    return ""


def _lines(path: Path) -> Iterator[tuple[int, int, bytes]]:
    """Lines that are not blank: their number from 1, the number of the row from 0, the bytes."""
    row = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            data = (line.removeprefix(codecs.BOM_UTF8) if number == 1 else line).strip()
            if data:
                yield number, row, data
                row += 1


def _not_utf8(line: int, row: int, data: bytes) -> str:
    try:
        data.decode("utf-8")
    except UnicodeDecodeError as error:
        return f"row {row} (line {line}) is not UTF-8: {error.reason} at its byte {error.start}."
    return ""


def _no_object_here(line: int, row: int, data: bytes) -> str:
    if data.startswith(b"{"):
        return ""
    shown = data[:40].decode("utf-8", "replace")
    return f"row {row} (line {line}) begins with {shown!r}, which is not an object."


def _is_object(data: bytes) -> bool:
    try:
        return isinstance(json.loads(data), dict)
    except (ValueError, RecursionError):
        return False


def _document_fault(path: Path) -> str:
    """What is wrong with a file that is one JSON list, or objects that take several lines each."""
    values = []
    try:
        text = path.read_bytes().removeprefix(codecs.BOM_UTF8).decode("utf-8").strip()
        # Readers take integers of any length, and Python does not.
        decoder, end = json.JSONDecoder(parse_int=lambda _: 0), 0
        while end < len(text):
            value, end = decoder.raw_decode(text, end)
            values.append(value)
            end = _SPACE.match(text, end).end()  # type: ignore[union-attr]  # matches nothing too
    except (ValueError, RecursionError) as error:
        # Objects in lines, the first of which is broken? The message of that one says more.
        return json_fault(path) or f"it is not JSON: {error}."
    rows = values[0] if len(values) == 1 and isinstance(values[0], list) else values
    for row, found in enumerate(rows):
        if not isinstance(found, dict):
            return f"row {row} is {_kind(found)} and not an object."
    return "" if rows else "its list is empty, so it has no rows."


def _no_field_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(
            f"the field {next(n for n in names if names.count(n) > 1)!r} is there twice"
        )
    return found


def _value_fault(
    value: Any, field: str, where: str, kinds: dict[str, tuple[str, str]], depth: int
) -> str:
    """Half a character, too deep a nesting, or a kind of value that the field had not before."""
    named = f"field {field!r}" if field else "the row"
    if depth > _DEPTH:
        return f"{where}: its values are nested more than {_DEPTH} deep."
    if isinstance(value, str):
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as error:
            return f"{where}: {named} has half a character (a lone surrogate) at {error.start}."
    if value is not None:
        kind, earlier = kinds.setdefault(field, (_kind(value), where))
        if kind != _kind(value):
            return f"{where}: {named} is {_kind(value)}, and in {earlier} it is {kind}."
    inner: Iterator[tuple[str, Any]] = iter(())
    if isinstance(value, dict):
        inner = ((f"{field}.{name}" if field else name, one) for name, one in value.items())
    elif isinstance(value, list):
        inner = ((f"{field}[]", one) for one in value)
    return next(filter(None, (_value_fault(v, f, where, kinds, depth + 1) for f, v in inner)), "")


def _kind(value: Any) -> str:
    names = {
        type(None): "null",
        bool: "a boolean",
        int: "a number",
        float: "a number",
        str: "a text",
        list: "a list",
        dict: "an object",
    }
    return names[type(value)]


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
