"""Numbers that options may be: one check and one message for each kind."""

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
    """Checks a finite number with a lower bound; switches (`yes`) are no numbers.

    Raises:
        ConfigError: It is something else.
    """
    kind, most = (Integral, sys.maxsize) if integer else (Real, sys.float_info.max)
    if not minimum <= _number(value, kind) <= most:
        what = "an integer" if integer else "a finite number"
        raise ConfigError(f"{name} is {value!r}; it must be {what} of at least {minimum}.")


def probability(name: str, value: Any) -> None:
    """Checks a number in [0, 1]; switches are no numbers.

    Raises:
        ConfigError: It is something else.
    """
    if not 0 <= _number(value, Real) <= 1:
        raise ConfigError(f"{name} is {value!r}; it must be a number in [0, 1].")


def _number(value: Any, kind: Any) -> Any:
    """A number of a kind of `numbers`, which numpy's scalars are too; NaN in place of others."""
    return value if isinstance(value, kind) and not isinstance(value, bool) else math.nan


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
