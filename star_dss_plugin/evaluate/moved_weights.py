"""Move a model's weights along directions, and restore them bit for bit.

Directions are those of the safety landscape (Peng et al., NeurIPS 2024, arXiv 2405.17374): Gaussian
and scaled to the norm of each weight, or the line to another model.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from types import TracebackType

import torch
from torch import Tensor, nn

from star_dss_plugin.errors import ConfigError
from star_dss_plugin.models.fingerprints import is_peft

__all__ = ["TOWARD", "MovedWeights", "Place", "direction"]

Place = tuple[tuple[str, float], ...]
"""Position in weight space: distances along named directions. The model itself is `()`."""

TOWARD = "toward"
"""Name of the direction to another model; other names are random directions."""


def direction(name: str, weight: Tensor, *, seed: int, direction_name: str) -> Tensor:
    """Draw a random direction for one weight: Gaussian, with the norm of the weight.

    It is drawn on the CPU from the seed and the two names, so it is the same on every device, in
    every precision and in every order, and is not stored.

    Args:
        name: The weight's name in its model.
        weight: Any shape, floating point.
        seed: Seed of the landscape.
        direction_name: Name of the direction.

    Returns:
        Same shape, on the CPU, float32 (float64 for a float64 weight), with the Frobenius norm of
        the weight. For a weight of zeros the direction is zero.
    """
    digest = hashlib.sha256(f"{seed}\n{direction_name}\n{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))
    drawn = torch.randn(weight.shape, generator=generator).to(_precision(weight))
    length = torch.linalg.vector_norm(drawn, dtype=torch.float64)
    wanted = torch.linalg.vector_norm(weight, dtype=torch.float64).cpu()
    return drawn.mul_(float(wanted / length)) if float(length) else drawn


def _precision(weight: Tensor) -> torch.dtype:
    """Return the dtype in which moved weights are computed before one rounding to their own."""
    return torch.float64 if weight.dtype == torch.float64 else torch.float32


class MovedWeights:
    """Move a model's weights to places, and restore them when the context ends.

    Each move starts from a copy of the original weights on the CPU, so rounding does not
    accumulate. Leaving the context restores them bit for bit, also after an error or
    KeyboardInterrupt. Tied weights count as one weight. Random directions do not move norm layers
    (a name or a module class with "norm" in it); all other weights move, biases included, as in the
    authors' code.

    Args:
        model: Any module with floating-point weights; an adapter must be merged.
        seed: Seed of the random directions.
        other: A model with the same weights by name and shape, for the direction "toward".

    Raises:
        ConfigError: The weights cannot be moved, or the models differ.
    """

    def __init__(self, model: nn.Module, *, seed: int = 0, other: nn.Module | None = None) -> None:
        for one in (model, other):
            if one is not None and is_peft(one):
                raise ConfigError(
                    "The model has an unmerged adapter, and noise on the adapter is not noise on "
                    "the model. Merge it first: model.merge_and_unload()."
                )
        self._seed = seed
        self._weights = _distinct(model)
        self._fixed = _norm_weights(model)
        self._other = None if other is None else _matching(self._weights, _distinct(other))
        self._originals = {
            name: weight.detach().to("cpu", copy=True) for name, weight in self._weights.items()
        }

    def __enter__(self) -> MovedWeights:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            self.move(())
        except KeyboardInterrupt:  # a second Ctrl-C while the weights are restored
            self.move(())
            raise

    @torch.no_grad()
    def move(self, place: Place) -> None:
        """Set the model's weights to those of a place; `()` are its own, bit for bit."""
        for name, weight in self._weights.items():
            weight.copy_(self._at(name, dict(place)))

    def _at(self, name: str, moves: dict[str, float]) -> Tensor:
        """Return a weight at a place, on the CPU, in float32 or float64 before rounding."""
        original = self._originals[name]
        if not moves:
            return original
        share = moves.pop(TOWARD, None)
        moved = original.to(_precision(original))
        if share is not None:
            if self._other is None:
                raise ConfigError(f"A place is {TOWARD!r} another model, but none was given.")
            other = self._other[name].detach().to("cpu", moved.dtype)
            moved = (1 - share) * moved + share * other  # exact at 0 and at 1
        if name not in self._fixed:
            for which, distance in moves.items():
                step = direction(name, original, seed=self._seed, direction_name=which)
                moved = torch.add(moved, step, alpha=distance)
        return moved


def _distinct(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return a model's weights by the first of their names, each weight once.

    Raises:
        ConfigError: A weight is not in memory or not floating point.
    """
    found: dict[str, nn.Parameter] = {}
    seen: set[tuple[object, ...]] = set()
    for name, weight in model.named_parameters():
        if weight.is_meta or not weight.is_floating_point():
            what = "is not in memory" if weight.is_meta else f"is of type {weight.dtype}"
            raise ConfigError(
                f"The weight {name} {what}, so it cannot be moved by half its norm. Load the model "
                "completely, on one device and not quantized."
            )
        # Most tied weights are one Parameter, which named_parameters lists once; some only share
        # memory.
        memory = (weight.device, weight.data_ptr(), tuple(weight.shape), weight.stride())
        if weight.numel() and memory not in seen:
            seen.add(memory)
            found[name] = weight
    if not found:
        raise ConfigError("The model has no weights to move.")
    return found


def _norm_weights(model: nn.Module) -> set[str]:
    """Return the names of norm layers' weights.

    The layer's name may lack "norm" (GPT-2's `ln_1`), so its class counts as well.
    """
    names = set()
    for path, module in model.named_modules():
        of_norm = "norm" in type(module).__name__.lower()
        for name, _ in module.named_parameters(path, recurse=False):
            if of_norm or "norm" in name.lower():
                names.add(name)
    return names


def _matching(first: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Return the other model's weights after checking that names and shapes are equal.

    Raises:
        ConfigError: Names or shapes differ.
    """
    for name in sorted(first.keys() | other.keys()):
        shapes = [tuple(w[name].shape) if name in w else None for w in (first, other)]
        if shapes[0] != shapes[1]:
            said = ["missing" if s is None else f"of shape {s}" for s in shapes]
            raise ConfigError(
                f"There is no line between these models: the weight {name} is {said[0]} in the "
                f"first and {said[1]} in the other. Give a model and a finetuned copy of it, or "
                "two finetuned copies of one model."
            )
    return other
