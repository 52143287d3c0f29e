"""Fit logistic regressions from a guard's states to its scores; choose one by cross-validation."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

__all__ = ["FOLDS", "ChosenProbe", "Linear", "Sample", "choose_probe", "features", "summaries"]

FOLDS = 5
PENALTIES = (0.1, 0.03, 0.01, 0.003, 0.001)

_Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Sample:
    """Hold the training data from one response: the prefixes that the guard has scored.

    Attributes:
        inputs: (prefixes, 2, blocks, hidden size), `summaries` of the guard's states after each
            candidate block.
        scores: (prefixes,), the guard's P(safe).
        weight: How many prefixes of the data each of these prefixes represents.
    """

    inputs: Tensor
    scores: _Floats
    weight: float


@dataclass(frozen=True)
class Linear:
    """Compute the log-odds of "safe" as a linear function of features.

    Attributes:
        weight: (features,).
        bias: Added to every log-odds.
    """

    weight: _Floats
    bias: float

    def logits(self, inputs: _Floats) -> _Floats:
        """Return log-odds, (rows,), of inputs (rows, features)."""
        found: _Floats = inputs @ self.weight + self.bias
        return found


@dataclass(frozen=True)
class ChosenProbe:
    """Hold the chosen probe and its predictions for held-out responses.

    Attributes:
        blocks: Indices, into `Sample.inputs`, of the candidate blocks that it reads.
        penalty: Weight of the squared norm in the loss.
        probe: The probe fitted on all responses.
        held_out: For each response the log-odds by a probe that was fitted without it.
    """

    blocks: tuple[int, ...]
    penalty: float
    probe: Linear
    held_out: list[_Floats]


def summaries(states: Tensor) -> Tensor:
    """Return for each prefix of a response its state and the mean of the states up to it.

    Args:
        states: (prefixes, blocks, hidden size), the states of all prefixes in order.

    Returns:
        float64, (prefixes, 2, blocks, hidden size). A row depends on no later prefix.
    """
    own = states.double()
    counts = torch.arange(1, len(own) + 1, dtype=torch.float64)
    return torch.stack([own, own.cumsum(0) / counts[:, None, None]], dim=1)


def features(inputs: Tensor) -> _Floats:
    """Flatten summaries, (prefixes, 2, blocks, size), to (prefixes, 2 · blocks · size)."""
    found: _Floats = inputs.flatten(1).numpy()
    return found


def choose_probe(samples: Sequence[Sample]) -> ChosenProbe:
    """Choose blocks and penalty by cross-validation over responses, and fit the chosen probe.

    The best choice has the smallest mean absolute difference from the guard's scores. Candidates
    are each single block and each pair of neighbouring candidate blocks.

    Args:
        samples: At least `FOLDS` responses, in an order that does not depend on that of the data.
    """
    count = samples[0].inputs.shape[2]
    candidates: list[tuple[int, ...]] = [(k,) for k in range(count)]
    candidates += [(k, k + 1) for k in range(count - 1)]
    best: tuple[float, tuple[int, ...], float, list[_Floats]] | None = None
    for blocks in candidates:
        inputs = [features(sample.inputs[:, :, list(blocks)]) for sample in samples]
        held_out: dict[float, dict[int, _Floats]] = {penalty: {} for penalty in PENALTIES}
        for fold in range(FOLDS):
            seen = [i for i in range(len(samples)) if i % FOLDS != fold]
            for penalty, probe in _fits([inputs[i] for i in seen], [samples[i] for i in seen]):
                for i in range(fold, len(samples), FOLDS):
                    held_out[penalty][i] = probe.logits(inputs[i])
        for penalty, found in held_out.items():
            logits = [found[i] for i in range(len(samples))]
            error = _error(logits, samples)
            if best is None or error < best[0]:
                best = error, blocks, penalty, logits
    assert best is not None
    _, blocks, penalty, logits = best
    inputs = [features(sample.inputs[:, :, list(blocks)]) for sample in samples]
    fits = dict(_fits(inputs, samples, down_to=penalty))
    return ChosenProbe(blocks, penalty, fits[penalty], logits)


def _error(logits: Sequence[_Floats], samples: Sequence[Sample]) -> float:
    off = [np.abs(_sigmoid(z) - s.scores) for z, s in zip(logits, samples, strict=True)]
    weights = [np.full(len(s.scores), s.weight) for s in samples]
    return float(np.average(np.concatenate(off), weights=np.concatenate(weights)))


def _sigmoid(logits: _Floats) -> _Floats:
    found: _Floats = torch.from_numpy(logits).sigmoid().numpy()
    return found


def _fits(
    inputs: Sequence[_Floats], samples: Sequence[Sample], down_to: float = 0.0
) -> Iterator[tuple[float, Linear]]:
    """Yield (penalty, probe), the largest penalty first; each fit starts from the one before.

    The loss is the cross-entropy to the guard's probabilities, plus the penalty times the squared
    norm of the weights for standardized features.
    """
    x = torch.from_numpy(np.concatenate(inputs))
    y = torch.from_numpy(np.concatenate([sample.scores for sample in samples]))
    # A response counts once, however many prefixes it has.
    counts = torch.from_numpy(np.concatenate([np.full(len(one), 1 / len(one)) for one in inputs]))
    counts = counts / counts.sum()
    mean, scale = x.mean(0), x.std(0) + 1e-6
    x = (x - mean) / scale
    weight = torch.zeros(x.shape[1], dtype=torch.float64, requires_grad=True)
    bias = torch.zeros((), dtype=torch.float64, requires_grad=True)
    for penalty in itertools.takewhile(lambda value: value >= down_to, PENALTIES):
        _minimise(x, y, counts, penalty, weight, bias)
        raw = weight.detach() / scale
        yield penalty, Linear(raw.numpy().copy(), float(bias.detach() - raw @ mean))


def _minimise(
    x: Tensor, y: Tensor, counts: Tensor, penalty: float, weight: Tensor, bias: Tensor
) -> None:
    """Minimize the penalized cross-entropy over weight and bias, in place."""
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=60, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        with torch.enable_grad():
            logits = x @ weight + bias
            value: Tensor = torch.nn.functional.binary_cross_entropy_with_logits(
                logits, y, counts, reduction="sum"
            )
            value = value + penalty * weight.square().sum()
            value.backward()
        return value

    optimizer.step(loss)
