"""Check option values, with one message for each kind of value."""

from __future__ import annotations

import difflib
import math
import sys
from collections.abc import Iterable
from numbers import Integral, Real
from typing import Any

from star_dss_plugin.errors import ConfigError

__all__ = ["at_least", "probability", "unknown_name"]


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
    """Return a number of a kind of `numbers`, numpy scalars included; NaN for other values."""
    return value if isinstance(value, kind) and not isinstance(value, bool) else math.nan


def unknown_name(kind: str, name: object, known: Iterable[str]) -> ConfigError:
    """Return the error for an unregistered name, with the nearest known names.

    Args:
        kind: Kind of the name, in the singular ("guard", "loss_type").
        name: The given name.
        known: All valid names.
    """
    names = sorted(known)
    near = difflib.get_close_matches(str(name), names, n=3, cutoff=0.5)
    hint = f" Did you mean {' or '.join(repr(n) for n in near)}?" if near else ""
    return ConfigError(f"Unknown {kind} {name!r}.{hint} Known: {', '.join(names)}.")
