"""Calibrate a guard on labelled responses with a temperature and a threshold, and evaluate both.

The method is Platt scaling (1999): P(safe) = sigmoid((logit p − logit θ) / T), fitted by maximum
likelihood. Its smoothed targets keep T above 0 for a guard that separates all rows.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from datasets import Dataset
from numpy.typing import NDArray

from star_dss_plugin.data.conversations import row_messages
from star_dss_plugin.data.requests import Message
from star_dss_plugin.data.rows import plain_rows, with_row_number
from star_dss_plugin.errors import ConfigError, DataError, GuardError
from star_dss_plugin.guards.base import Guard
from star_dss_plugin.guards.combined import NEAREST, CalibratedGuard, calibrate

__all__ = [
    "Calibration",
    "Quality",
    "calibration_quality",
    "fit_calibration",
    "fit_guard",
    "labelled_rows",
]

_BINS = 10
_FOLDS = 5
_FEWEST = 10
_Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Quality:
    """Hold metrics of scores, as probabilities and as decisions; "harmful" is the positive class.

    Attributes:
        brier: Mean squared error of P(safe); 0 is best, a constant 0.5 has 0.25.
        auroc: Probability that a safe response scores higher than a harmful one.
        f1: F1 of "harmful" for scores below 0.5.
        bins: The reliability curve: for each tenth of [0, 1] with scores, the number of scores,
            their mean, and the share of safe responses.
    """

    brier: float
    auroc: float
    f1: float
    bins: tuple[tuple[int, float, float], ...]


@dataclass(frozen=True)
class Calibration:
    """Hold a fitted temperature and threshold, and the data they were fitted on.

    Attributes:
        guard: The guard's name.
        demonstration: Whether the guard is a demonstration, which protects nobody.
        rows: The number of labelled responses.
        safe: The number of safe ones.
        temperature: T.
        threshold: θ, the raw score that becomes 0.5.
        raw: Metrics of the guard's raw scores.
        calibrated: Metrics of calibrated scores, by five-fold cross-validation.
    """

    guard: str
    demonstration: bool
    rows: int
    safe: int
    temperature: float
    threshold: float
    raw: Quality
    calibrated: Quality

    def as_dict(self) -> dict[str, Any]:
        """Return JSON values; `calibration` is meant for the guard's mapping."""
        values = asdict(self)
        return {
            "guard": self.guard,
            "demonstration_guard": self.demonstration,
            "calibration": {"temperature": self.temperature, "threshold": self.threshold},
            **{key: values[key] for key in ("rows", "safe", "raw", "calibrated")},
        }


def labelled_rows(dataset: Dataset) -> tuple[list[list[Message]], list[int]]:
    """Return conversations and their labels (1 safe, 0 harmful), without unlabelled rows.

    Raises:
        DataError: Columns are missing, a label is not 0 or 1, a row has no response, or a label has
            fewer than 10 rows.
    """
    columns = set(dataset.column_names)
    talks = "messages" in columns
    needed = {"label"} | (set() if talks else {"prompt", "response"})
    if missing := needed - columns:
        raise DataError(
            f"The labelled data lacks {', '.join(sorted(missing))} (it has "
            f"{', '.join(sorted(columns))}). Each row needs 'label' (1 safe, 0 harmful) and either "
            "'prompt' and 'response' or 'messages'."
        )
    conversations, labels = [], []
    for i, row in enumerate(plain_rows(dataset)):
        if row["label"] is None:
            continue
        if row["label"] not in (0, 1):
            raise DataError(f"the label is {row['label']!r}; use 1 (safe) or 0 (harmful).").at(
                rows=(i,)
            )
        said = (
            row
            if talks
            else {
                "messages": [
                    {"role": "user", "content": row["prompt"]},
                    {"role": "assistant", "content": row["response"]},
                ]
            }
        )
        conversation = with_row_number(i, row_messages, said) or []
        if not conversation or not conversation[-1]["content"]:
            raise DataError(
                "the row has a label and no response: its last message has no text. Remove it."
            ).at(rows=(i,))
        conversations.append(conversation)
        labels.append(int(row["label"]))
    if min(labels.count(0), labels.count(1)) < _FEWEST:
        raise DataError(
            f"The labelled data has {labels.count(1)} safe and {labels.count(0)} harmful rows. A "
            f"calibration needs {_FEWEST} of each at the very least; a few hundred are better."
        )
    return conversations, labels


def fit_guard(
    guard: Guard, conversations: Sequence[Sequence[Message]], labels: Sequence[int]
) -> tuple[Calibration, list[float]]:
    """Calibrate a guard on whole responses.

    Args:
        guard: The guard, not calibrated.
        conversations: Messages, of which the last is the response.
        labels: 1 safe, 0 harmful.

    Returns:
        The calibration, and the guard's raw scores.

    Raises:
        ConfigError: The guard is calibrated already.
        GuardError: The guard's scores do not rise with safety on these rows.
    """
    if isinstance(guard, CalibratedGuard):
        # The fit would be on top of the first calibration, and a mapping holds only one.
        raise ConfigError(
            "The guard's mapping has a 'calibration' already. Leave it out: the fitted numbers "
            "replace it."
        )
    scores = guard.score(conversations)
    temperature, threshold = fit_calibration(scores, labels)
    held_out = np.empty(len(labels))
    # Every fifth row of each label, so that all folds have both labels without a random draw.
    order = sorted(range(len(labels)), key=lambda i: labels[i])
    for fold in range(_FOLDS):
        outside = order[fold::_FOLDS]
        inside = sorted(set(order) - set(outside))
        numbers = fit_calibration([scores[i] for i in inside], [labels[i] for i in inside])
        held_out[outside] = [calibrate(scores[i], *numbers) for i in outside]
    made = Calibration(
        guard.name,
        guard.demonstration,
        len(labels),
        sum(labels),
        temperature,
        threshold,
        calibration_quality(scores, labels),
        calibration_quality(held_out.tolist(), labels),
    )
    return made, scores


def fit_calibration(scores: Sequence[float], labels: Sequence[int]) -> tuple[float, float]:
    """Fit T and θ by maximum likelihood, with Newton's method on a convex loss.

    Args:
        scores: P(safe) in [0, 1].
        labels: 1 safe, 0 harmful; both occur.

    Raises:
        GuardError: The scores do not rise with safety, or hardly depend on it.
    """
    clipped = np.clip(np.asarray(scores, dtype=np.float64), NEAREST, 1 - NEAREST)
    x = np.log(clipped / (1 - clipped))
    y = np.asarray(labels)
    safe, harmful = int(y.sum()), int((1 - y).sum())
    target = np.where(y == 1, (safe + 1) / (safe + 2), 1 / (harmful + 2))
    design = np.stack([x, np.ones_like(x)], axis=1)

    def loss(parameters: _Floats) -> float:
        logits = design @ parameters
        return float((np.logaddexp(0, logits) - target * logits).sum())

    found = np.array([1.0, 0.0])
    for _ in range(100):
        p = 1 / (1 + np.exp(-design @ found))
        gradient = design.T @ (p - target)
        curvature = (design * (p * (1 - p))[:, None]).T @ design + 1e-9 * np.eye(2)
        step = np.linalg.solve(curvature, gradient)
        while loss(found - step) > loss(found) and np.abs(step).max() > 1e-12:
            step /= 2
        found = found - step
        if np.abs(step).max() < 1e-10:
            break
    slope, intercept = found
    if slope <= 1e-6 or np.ptp(x) == 0:
        raise GuardError(
            "The guard's scores do not rise with safety on the labelled rows, so no calibration "
            "helps: check that 1 means safe in them, or use another guard."
        )
    offset = float(intercept / slope)
    if abs(offset) >= math.log(1 / NEAREST):
        raise GuardError(
            f"The guard's scores say little about the labelled rows ({safe} safe, {harmful} "
            "harmful): no score that it can give would become 0.5, and all would become nearly "
            "the share of safe rows. Label more of the rarer kind, or use another guard."
        )
    return float(1 / slope), 1 / (1 + math.exp(offset))


def calibration_quality(scores: Sequence[float], labels: Sequence[int]) -> Quality:
    """Return Brier score, AUROC, F1 and reliability of P(safe); labels are 1 safe, 0 harmful."""
    p, y = np.asarray(scores, dtype=np.float64), np.asarray(labels)
    # Equal scores get their mean rank, so that ties count half.
    _, inverse, counts = np.unique(p, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[inverse]
    safe, harmful = int((y == 1).sum()), int((y == 0).sum())
    auroc = (ranks[y == 1].sum() - safe * (safe + 1) / 2) / (safe * harmful)
    found, right = p < 0.5, (p < 0.5) & (y == 0)
    bins = np.minimum((p * _BINS).astype(int), _BINS - 1)
    return Quality(
        brier=float(((p - y) ** 2).mean()),
        auroc=float(auroc),
        f1=float(2 * right.sum() / max(1, found.sum() + harmful)),
        bins=tuple(
            (int(own.sum()), float(p[own].mean()), float(y[own].mean()))
            for own in (bins == k for k in range(_BINS))
            if own.any()
        ),
    )
