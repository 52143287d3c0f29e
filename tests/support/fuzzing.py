"""What a target of hostile input is, how it is tried, and what counts as refused in words."""

import contextlib
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import datasets
from hypothesis import HealthCheck, given, settings
from hypothesis.strategies import SearchStrategy

from star_dss_plugin.errors import StarDSSError
from star_dss_plugin.plugins import Origin, load_plugins
from support.guards import WordGuard, WordsPlugin


@dataclass(frozen=True)
class Target:
    """One property.

    Attributes:
        check: Takes an input; raises if the property does not hold.
        inputs: What it is tried with.
        examples: How many of them a run of the tests tries.
        seeds: Where the fuzzer starts, if the input is bytes: it then changes the bytes themselves.
    """

    check: Callable[[Any], Any]
    inputs: SearchStrategy[Any]
    examples: int = 40
    seeds: tuple[bytes, ...] = ()


def holds(target: Target) -> None:
    """Tries the same inputs at every call; one that breaks the property is made small and shown."""
    some = settings(
        max_examples=target.examples,
        deadline=None,
        database=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
    )

    def check(one: Any) -> None:
        target.check(one)

    some(given(target.inputs)(check))()


def register_guard() -> None:
    """Makes the guard of words known by its name, as tests do."""
    if WordGuard.name not in load_plugins().names("guard"):
        load_plugins().register(WordsPlugin(), Origin("tests", "star-dss-tests", "0"))


def quiet() -> None:
    """No progress bars, and no warnings of what every other input is full of."""
    datasets.disable_progress_bars()
    logging.disable(logging.ERROR)


def refused(*named: str):
    """Errors of ours are fine, if they name what they are about."""
    return _Refused(named)


class _Refused(contextlib.AbstractContextManager):
    def __init__(self, named):
        self.named = named

    def __exit__(self, kind, error, trace):
        if not isinstance(error, StarDSSError):
            return False
        message = str(error)
        assert len(message) > 20, message
        for name in self.named:
            assert name in message, f"{name!r} is not in: {message}"
        return True
