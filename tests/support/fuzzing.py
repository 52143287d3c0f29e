"""Fuzz targets: what they are, how they are run, and which errors count as a readable refusal."""

import contextlib
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import datasets
from hypothesis import HealthCheck, given, settings
from hypothesis.strategies import SearchStrategy

from star_dss_plugin.errors import StarDSSError


@dataclass(frozen=True)
class Target:
    """Describe a property and its inputs.

    Attributes:
        check: Takes an input; raises if the property does not hold.
        inputs: The hypothesis strategy for inputs.
        examples: The number of inputs in a run of the tests.
        seeds: The fuzzer's first inputs, if inputs are bytes; it mutates these bytes.
    """

    check: Callable[[Any], Any]
    inputs: SearchStrategy[Any]
    examples: int = 40
    seeds: tuple[bytes, ...] = ()


def check_target(target: Target) -> None:
    """Try a target's inputs, the same at every call; hypothesis shrinks an input that fails."""
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


def quiet() -> None:
    """Turn off progress bars and the warnings that every other input would cause."""
    datasets.disable_progress_bars()
    logging.disable(logging.ERROR)


def refused(*named: str):
    """Accept a StarDSSError whose message has all of the given names."""
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
