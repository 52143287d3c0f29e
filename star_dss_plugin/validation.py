"""Check option values and optional packages, with consistent error messages."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import json
import math
import sys
from collections.abc import Iterable
from numbers import Integral, Real
from pathlib import Path
from typing import Any

from star_dss_plugin.errors import ConfigError

__all__ = [
    "at_least",
    "check_reserved_name",
    "json_mapping",
    "nearest",
    "probability",
    "require",
    "shortened",
    "unknown_name",
]


def at_least(name: str, value: Any, minimum: float, *, integer: bool = False) -> None:
    """Check a finite number with a lower bound; booleans (`yes` in YAML) are rejected.

    Raises:
        ConfigError: The value is not such a number.
    """
    kind, most = (Integral, sys.maxsize) if integer else (Real, sys.float_info.max)
    if not minimum <= _number(value, kind) <= most:
        what = "an integer" if integer else "a finite number"
        raise ConfigError(f"{name} is {value!r}; it must be {what} of at least {minimum}.")


def probability(name: str, value: Any) -> None:
    """Check a number in [0, 1]; booleans are rejected.

    Raises:
        ConfigError: The value is not such a number.
    """
    if not 0 <= _number(value, Real) <= 1:
        raise ConfigError(f"{name} is {value!r}; it must be a number in [0, 1].")


def _number(value: Any, kind: Any) -> Any:
    """Return a number of this kind (numpy scalars included) unchanged; NaN for other values."""
    return value if isinstance(value, kind) and not isinstance(value, bool) else math.nan


def unknown_name(kind: str, name: object, known: Iterable[str]) -> ConfigError:
    """Return the error for an unregistered name, with the nearest known names.

    Args:
        kind: What the name names, in the singular ("guard", "loss_type").
        name: The given name.
        known: All valid names.
    """
    names = sorted(known)
    near = nearest(str(name), names)
    hint = f" Did you mean {' or '.join(map(repr, near))}?" if near else ""
    return ConfigError(f"Unknown {kind} {name!r}.{hint} Known: {', '.join(names)}.")


def nearest(name: str, known: Iterable[str], *, limit: int = 3) -> list[str]:
    """Return the known names that a misspelt one may have meant, the most similar first.

    Args:
        name: The given name.
        known: All valid names.
        limit: Largest number of returned names, >= 1.
    """
    return difflib.get_close_matches(name, list(known), n=limit, cutoff=0.5)


def check_reserved_name(name: str, meaning: str) -> None:
    """Check that no file or folder has a reserved name such as "demo".

    Args:
        name: The reserved name.
        meaning: What the name stands for, in a few words.

    Raises:
        ConfigError: A file or folder has this name, so the name is ambiguous.
    """
    if Path(name).exists():
        raise ConfigError(
            f"{name!r} is {meaning}, and there is a file or folder of this name here. Write "
            f"./{name} for that one; for {meaning}, start from another folder, or rename it."
        )


def require(
    module: str, extra: str, feature: str, *, alternative: str = "", load: bool = False
) -> None:
    """Check that an optional package is installed.

    Args:
        module: Name of the needed module.
        extra: Extra of star-dss-plugin that installs it.
        feature: Feature that needs it, the subject of the message.
        alternative: A sentence on what works without it.
        load: Whether to import it as a further check, which may take many seconds.

    Raises:
        ConfigError: The module is not installed, or cannot be imported.
    """
    try:
        if load:
            importlib.import_module(module)
            return
        if importlib.util.find_spec(module) is not None:
            return
        why = "which is not installed"
    except (ImportError, ValueError) as error:  # ValueError: its __spec__ in sys.modules is None
        why = f"which cannot be imported ({error})"
    install = f"Install it with: pip install 'star-dss-plugin[{extra}]'"
    raise ConfigError(
        f"{feature} needs {module}, {why}. {install}{alternative and '. ' + alternative}"
    )


def shortened(value: Any) -> str:
    """Return a value's `repr` for messages, truncated to 60 characters.

    A `repr` has no line breaks and no control characters.
    """
    text = repr(value)
    return text if len(text) <= 60 else text[:60] + "…"


def json_mapping(name: str, value: Any) -> Any:
    """Parse an option that is a mapping and may be given as JSON; other values stay as they are.

    Raises:
        ConfigError: The value is a string that is not JSON. The message does not show it, because
            it may contain a key.
    """
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{name} is not valid JSON: {error}.") from error
