"""Read rows and their line numbers from JSON files, and store values as JSON lines.

A file's rows are objects: one or several per line, one over several lines, or items of one list.
Values keep their type: a string that looks like a date stays a string.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from star_dss_plugin.data.writing import writing
from star_dss_plugin.errors import DataError
from star_dss_plugin.validation import shortened

__all__ = ["JsonRow", "append_lines", "json_rows", "read_lines"]

_SPACE = re.compile(r"[ \t\r\n]*")
_NEXT = re.compile(r"[ \t\r\n]*([,\]]?)[ \t\r\n]*")
_DEPTH = 200
"""Limit of nesting, below Python's recursion limit."""
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")
"""Matches an escape that may be a lone surrogate."""
_LONG_INTEGER = re.compile(rb"[0-9]{19}")
"""Matches digits that may exceed a 64-bit integer."""
_INTEGERS = range(-(2**63), 2**63)


class JsonRow(NamedTuple):
    """One row of a JSON file.

    Attributes:
        number: The row's index, from 0.
        line: The line on which the row begins, from 1.
        value: The object; integers beyond 64 bits are floats.
    """

    number: int
    line: int
    value: dict[str, Any]


def json_rows(path: Path) -> Iterator[JsonRow]:
    """Yield the rows of a file, in order.

    A file with whole objects on each line is read line by line; any other layout is read into
    memory at once.

    Raises:
        DataError: The file is empty or not UTF-8, or a row is not an object, has a field twice,
            contains a lone surrogate or is nested too deeply. The error has the row and line.
        OSError: The file cannot be opened.
    """
    whole = False
    with path.open("rb") as file:
        number = 0
        for line, data in enumerate(file, start=1):
            text = _decoded(data, number, line).strip()
            if not text:
                continue
            if number == 0 and (text.startswith("[") or not _is_complete(text)):
                whole = True
                break
            for value, _ in _values(text, number, line, data):
                yield JsonRow(number, line, value)
                number += 1
    if whole:
        yield from _document(path.read_bytes())
    elif not number:
        raise DataError("it is empty, so it has no rows. Give a file with one object per line.")


def _document(data: bytes) -> Iterator[JsonRow]:
    """Yield the rows of a file that is one list, or has objects over several lines."""
    text = _decoded(data, 0, 0)
    start = _end(_SPACE, text, 0)
    listed = text.startswith("[", start)
    if listed and _end(_NEXT, text, start + 1, "]") == len(text):
        raise DataError("its list is empty, so it has no rows. Give one or more objects.")
    line, seen = 1, 0
    for number, (value, start) in enumerate(_values(text, 0, 1, data, listed)):
        line, seen = line + text.count("\n", seen, start), start
        yield JsonRow(number, line, value)


def _values(
    text: str, number: int, line: int, data: bytes, listed: bool = False
) -> Iterator[tuple[dict[str, Any], int]]:
    """Yield the consecutive objects in a text, and the position of each.

    Args:
        text: Decoded JSON.
        number: The index of the text's first row.
        line: The line on which the text begins.
        data: The text's bytes, or bytes that contain them; searching these for special cases is
            fast.
        listed: Whether the objects are items of a list.
    """
    decoder = json.JSONDecoder(
        object_pairs_hook=_reject_duplicate_fields,
        parse_int=_number if _LONG_INTEGER.search(data) else None,
    )
    surrogates = _SURROGATE.search(data) is not None
    end = _end(_SPACE, text, 0) + listed
    end = _end(_SPACE, text, end)
    while end < len(text):
        start, at = end, end
        try:
            value, end = decoder.raw_decode(text, start)
            _check(value, surrogates, 0)
            if not isinstance(value, dict):
                shown = shortened(text[start : start + 40])
                raise DataError(f"it begins with {shown}, which is not an object. {_WANTED}")
            after = _NEXT.match(text, end)
            assert after is not None  # the pattern also matches an empty string
            if listed and (not after[1] or (after[1] == "]") != (after.end() == len(text))):
                at, shown = end, shortened(text[end : end + 20])
                raise DataError(f"it is not JSON: the list goes on with {shown}. {_WANTED}")
        except DataError as error:
            error.at(rows=(number,), line=line + text.count("\n", 0, at))
            raise
        except (ValueError, RecursionError) as error:
            said = str(error)
            if isinstance(error, json.JSONDecodeError):
                at = error.pos
                said = f"{error.msg.removesuffix(' at')} at {shortened(text[at : at + 20])}"
            raise DataError(f"it is not JSON: {said}. {_WANTED}").at(
                rows=(number,), line=line + text.count("\n", 0, at)
            ) from error
        yield value, start
        number += 1
        end = after.end() if listed else _end(_SPACE, text, end)


_WANTED = "Each row must be an object with named fields."


def _end(pattern: re.Pattern[str], text: str, start: int, wanted: str = "") -> int:
    """Return the end of the match at `start`; -1 if `wanted` is set and its group differs."""
    found = pattern.match(text, start)
    assert found is not None  # these patterns also match an empty string
    return -1 if wanted and found[1] != wanted else found.end()


def _decoded(data: bytes, number: int, line: int) -> str:
    """Decode UTF-8, with or without a byte order mark.

    Args:
        data: A line, or a whole file.
        number: The index of the line's first row.
        line: The line's number; 0 for a whole file.
    """
    try:
        return data.removeprefix(codecs.BOM_UTF8 if line <= 1 else b"").decode("utf-8")
    except UnicodeDecodeError as error:
        before = data[: error.start]
        byte = error.start - before.rfind(b"\n") - 1
        raise DataError(
            f"it is not UTF-8: {error.reason} at its byte {byte}. Write the file again, in UTF-8."
        ).at(rows=(number,), line=line or before.count(b"\n") + 1) from error


def _is_complete(text: str) -> bool:
    """Return whether a line begins with a complete JSON value.

    An incomplete one is an object over several lines, or damaged.
    """
    try:
        json.JSONDecoder(parse_int=_number).raw_decode(text)
    except RecursionError:
        return True
    except ValueError:
        return False
    return True


def _number(digits: str) -> int | float:
    """Parse an integer; return a float if it exceeds 64 bits."""
    value = int(digits) if len(digits) <= 20 else None
    return value if value is not None and value in _INTEGERS else float(digits)


def _reject_duplicate_fields(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(n for n in names if names.count(n) > 1)
        raise DataError("it is there twice. Remove one of the two.").at(field=twice)
    return found


def _check(value: Any, surrogates: bool, depth: int, field: str = "") -> None:
    """Check a value's nesting and, if `surrogates`, that no string contains a lone surrogate."""
    if depth > _DEPTH:
        raise DataError(f"its values are nested more than {_DEPTH} deep. {_WANTED}")
    if isinstance(value, dict):
        for name, inner in value.items():
            _check(name, surrogates, depth, field)
            _check(inner, surrogates, depth + 1, f"{field}.{name}" if field else name)
    elif isinstance(value, list):
        if surrogates or not {dict, list}.isdisjoint(map(type, value)):
            for inner in value:
                _check(inner, surrogates, depth + 1, f"{field}[]")
    elif surrogates and isinstance(value, str):
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as error:
            raise DataError(
                f"half a character (a lone surrogate) at {error.start}. Write the text again."
            ).at(field=field.encode("utf-8", "replace").decode()) from error


def read_lines(path: Path) -> list[Any]:
    """Return the values of all complete lines; an empty list if there is no file.

    An incomplete last line, which a killed run leaves, is removed from the file.

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
    """Append one line per value in a single write; create the file and its folder if needed.

    Raises:
        OutputError: The file cannot be written.
    """
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="ascii") as file:
            file.write("".join(json.dumps(value) + "\n" for value in values))
