"""Infer the column types of JSON rows that keep every value as it was written."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

from datasets import Features, Json, List, Value

from star_dss_plugin.data.files.json_lines import JsonRow
from star_dss_plugin.errors import DataError

__all__ = ["converted_row", "features_of", "types_of"]

Type = Any
"""None (only nulls), a value of `_SCALARS`, _JSON, ("list", Type) or ("dict", {name: Type})."""

_SCALARS = {str: "string", bool: "bool", int: "int64", float: "float64", type(None): None}
_JSON = "json"
"""The type of values without a common type: each is stored as JSON text."""
_DEPTH = 16
"""Deeper values are stored as JSON text, because Arrow files have at most 64 levels."""
_FIELDS = 1000
"""Limit of columns, because every row stores a value for every column."""


def types_of(rows: Iterable[JsonRow]) -> dict[str, Type]:
    """Return the type of each field, in the order of first appearance.

    Raises:
        DataError: The rows have more than 1000 different fields.
    """
    found: dict[str, Type] = {}
    for row in rows:
        for name, value in row.value.items():
            found[name] = _common_type(found.get(name), _type(value, 0))
        if len(found) > _FIELDS:
            raise DataError(
                f"there are more than {_FIELDS} different fields up to here. Give all rows the "
                "same fields, and put what differs into one of them."
            ).at(rows=(row.number,), line=row.line)
    return found


def features_of(types: Mapping[str, Type]) -> Features:
    """Return the features of a data set with these column types."""
    return Features({name: _feature(kind) for name, kind in types.items()})


def converted_row(row: JsonRow, types: Mapping[str, Type]) -> dict[str, Any]:
    """Convert a row's values to its columns' types.

    Raises:
        DataError: A field that is stored as JSON text contains NaN or an infinity.
    """
    found = {}
    for name, kind in types.items():
        try:
            found[name] = _converted(row.value.get(name), kind)
        except ValueError as error:
            raise DataError(
                "it holds NaN or an infinity, and other kinds of values in other rows. Write null "
                "instead."
            ).at(rows=(row.number,), line=row.line, field=name) from error
    return found


def _converted(value: Any, kind: Type) -> Any:
    if value is None or kind is None:
        return None
    if kind == _JSON:
        return json.dumps(value, allow_nan=False)
    if kind == "float64":
        return float(value)
    if isinstance(kind, tuple):
        form, inner = kind
        if form == "dict":
            return {name: _converted(value[name], one) for name, one in inner.items()}
        # Most lists are long lists of tokens, which need no conversion.
        return value if inner in _UNCONVERTED else [_converted(one, inner) for one in value]
    return value


_UNCONVERTED = ("string", "bool", "int64", None)
_NUMBERS = ("int64", "float64")


def _type(value: Any, depth: int) -> Type:
    if isinstance(value, dict):
        if depth > _DEPTH or not value:
            return _JSON
        return ("dict", {name: _type(inner, depth + 1) for name, inner in value.items()})
    if isinstance(value, list):
        if depth > _DEPTH:
            return _JSON
        inner: Type = None
        kinds = set(map(type, value))
        if kinds.isdisjoint((dict, list)):
            for kind in kinds:
                inner = _common_type(inner, _SCALARS[kind])
        else:
            for one in value:
                inner = _common_type(inner, _type(one, depth + 1))
        return ("list", inner)
    return _SCALARS[type(value)]


def _common_type(one: Type, other: Type) -> Type:
    """Return the type that holds values of both types."""
    if one is None or one == other:
        return other
    if other is None:
        return one
    if one in _NUMBERS and other in _NUMBERS:
        return "float64"
    if isinstance(one, tuple) and isinstance(other, tuple) and one[0] == other[0]:
        if one[0] == "list":
            return ("list", _common_type(one[1], other[1]))
        if one[1].keys() == other[1].keys():
            return (
                "dict",
                {name: _common_type(kind, other[1][name]) for name, kind in one[1].items()},
            )
    return _JSON


def _feature(kind: Type) -> Any:
    if kind == _JSON:
        return Json()
    if isinstance(kind, tuple):
        form, inner = kind
        if form == "list":
            return List(_feature(inner))
        return {name: _feature(one) for name, one in inner.items()}
    return Value("null" if kind is None else kind)
