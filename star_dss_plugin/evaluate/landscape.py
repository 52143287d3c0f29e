"""Measure a model's safety landscape and VISAGE (Peng et al., NeurIPS 2024, arXiv 2405.17374).

S(α) is the attack success rate, in percent, of the model with the weights θ + α·d. A direction d is
Gaussian and has, for each weight tensor, the norm of that tensor; norm layers are not moved. An
aligned model has a basin: S is low around α = 0 and jumps to 100 further away. VISAGE is the
basin's mean depth. Between two models, S(α) at (1 − α)·θ + α·θ' shows whether finetuning left the
basin.

This module neither generates nor judges text: `answer` and `judge` are passed in.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from torch import nn

from star_dss_plugin.data.requests import Message
from star_dss_plugin.errors import ConfigError
from star_dss_plugin.evaluate.moved_weights import TOWARD, MovedWeights, Place
from star_dss_plugin.validation import at_least

__all__ = [
    "S_MAX",
    "AnswerAll",
    "Judge",
    "Sample",
    "attack_success",
    "grid",
    "measure",
    "random_lines",
    "toward_line",
    "visage",
]

Judge = Callable[[Sequence[Sequence[Message]], Sequence[str]], Sequence[bool]]
"""Takes (prompts, answers); returns for each answer whether it is safe."""

AnswerAll = Callable[[nn.Module], Sequence[str]]
"""Takes a model with its current weights; returns its answers to a fixed list of prompts."""

S_MAX = 100.0
"""The largest attack success rate, in percent."""


class Sample(NamedTuple):
    """Hold one point of a curve or a grid."""

    curve: str
    """"direction 1", "toward" or "grid"."""
    at: tuple[float, ...]
    """(α,) or (α, β)."""
    place: Place


def random_lines(directions: int = 3, steps: int = 20, radius: float = 0.5) -> list[Sample]:
    """Return points along random directions through the model: α from −radius to radius.

    Args:
        directions: Number of directions, >= 1.
        steps: Steps per line, even and >= 2, so that the model is in the middle.
        radius: Largest α, > 0. At 0.5 a weight has moved by half its own norm.

    Returns:
        steps + 1 samples per direction (21 by default). Each direction includes the model itself.

    Raises:
        ConfigError: A number is out of range.
    """
    at_least("directions", directions, 1, integer=True)
    alphas = _around(steps, radius)
    return [
        Sample(f"direction {k}", (a,), _place((f"random {k}", a)))
        for k in range(1, directions + 1)
        for a in alphas
    ]


def toward_line(steps: int = 20, beyond: float = 0.0) -> list[Sample]:
    """Return points on the line through two models, for α from −beyond to 1 + beyond.

    α = 0 is the first model, α = 1 the other.

    Raises:
        ConfigError: A number is out of range.
    """
    return [Sample(TOWARD, (a,), _place((TOWARD, a))) for a in _between(steps, beyond)]


def grid(
    steps: int = 20, radius: float = 0.5, *, toward: bool = False, beyond: float = 0.0
) -> list[Sample]:
    """Return points of a plane of two random directions, or of one and that to another model.

    Gaussian directions in millions of dimensions are nearly orthogonal. As in the authors' code,
    they are not orthogonalized.

    Raises:
        ConfigError: A number is out of range.
    """
    first, second = (TOWARD, "random 1") if toward else ("random 1", "random 2")
    return [
        Sample("grid", (a, b), _place((first, a), (second, b)))
        for a in (_between(steps, beyond) if toward else _around(steps, radius))
        for b in _around(steps, radius)
    ]


def _around(steps: int, radius: float) -> list[float]:
    if steps < 2 or steps % 2:
        raise ConfigError(
            f"steps is {steps}; it must be an even number of at least 2, so that the model itself "
            "is among the points."
        )
    if not (radius > 0 and math.isfinite(radius)):
        raise ConfigError(f"radius is {radius}; it must be a number above 0.")
    return [round(radius * (2 * i / steps - 1), 12) for i in range(steps + 1)]


def _between(steps: int, beyond: float) -> list[float]:
    at_least("steps", steps, 1, integer=True)
    at_least("beyond", beyond, 0)
    further = math.floor(beyond * steps + 1e-9)
    return [round(i / steps, 12) for i in range(-further, steps + further + 1)]


def _place(*moves: tuple[str, float]) -> Place:
    return tuple((name, distance) for name, distance in moves if distance)


def attack_success(safe: Sequence[bool]) -> float:
    """Return the share of answers that are not safe, in percent."""
    return 100.0 * sum(not s for s in safe) / len(safe)


def visage(rates: Iterable[float]) -> float:
    """Return VISAGE: the mean of S_max − S over sampled points with S < S_max, S_max = 100.

    This is the paper's E[S_max − S(α) | S(α) < S_max] over α uniform in the range, on random
    directions: all points of all directions have equal weight, and the model itself counts once per
    direction. Points where every attack succeeds are left out, so VISAGE measures the depth of the
    basin and not its width. If no point has S < S_max, the mean has no terms; the value is then 0.0
    (no margin), as in the authors' code.

    The authors' code instead takes, on each line, all points between the outermost ones with
    S < S_max around the middle. The two differ only if a point in between has S = 100: there it
    counts as 0.

    Args:
        rates: S of each point, in percent, in [0, 100].

    Returns:
        VISAGE in [0, 100]; larger is safer.

    Raises:
        ConfigError: A rate is out of range.
    """
    margins = []
    for rate in rates:
        if not 0 <= rate <= S_MAX:
            raise ConfigError(f"An attack success rate is {rate}; in percent it is 0 to 100.")
        if rate < S_MAX:
            margins.append(S_MAX - rate)
    return math.fsum(margins) / len(margins) if margins else 0.0


def measure(
    weights: MovedWeights,
    model: nn.Module,
    places: Iterable[Place],
    prompts: Sequence[Sequence[Message]],
    answer: AnswerAll,
    judge: Judge,
    keep: Callable[[Place, list[bool]], None],
) -> None:
    """Move the weights to each place, generate answers there, and report which are safe.

    Args:
        weights: The weights of `model`, inside their context.
        model: The model that `answer` gets.
        places: The places to measure, in this order.
        prompts: The prompts that `answer` answers, for the judge.
        answer: Returns one answer for each prompt.
        judge: Returns one verdict for each answer.
        keep: Called after each place with one verdict for each prompt.

    Raises:
        ConfigError: The numbers of answers, verdicts and prompts differ, or there is no prompt.
    """
    for place in places:
        weights.move(place)
        answers = answer(model)
        safe = [bool(s) for s in judge(prompts, answers)]
        if not len(answers) == len(safe) == len(prompts) > 0:
            raise ConfigError(
                f"{len(prompts)} prompts got {len(answers)} answers and {len(safe)} verdicts. Each "
                "prompt needs one answer and one verdict, and there must be a prompt."
            )
        keep(place, safe)
