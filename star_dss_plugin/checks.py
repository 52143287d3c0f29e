"""Numbers that options may be: one check and one message for each kind."""

from __future__ import annotations

import sys
from typing import Any

from star_dss_plugin.errors import ConfigError

__all__ = ["at_least", "probability"]


def at_least(name: str, value: Any, minimum: float, *, integer: bool = False) -> None:
    """Checks a finite number with a lower bound; switches (`yes`) are no numbers.

    Raises:
        ConfigError: It is something else.
    """
    kinds, most = (int, sys.maxsize) if integer else ((int, float), sys.float_info.max)
    if isinstance(value, bool) or not isinstance(value, kinds) or not minimum <= value <= most:
        what = "an integer" if integer else "a finite number"
        raise ConfigError(f"{name} is {value!r}; it must be {what} of at least {minimum}.")


def probability(name: str, value: object) -> None:
    """Checks a number in [0, 1]; switches are no numbers.

    Raises:
        ConfigError: It is something else.
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
        raise ConfigError(f"{name} is {value!r}; it must be a number in [0, 1].")
