"""Map scores to the weights of cross-entropy and KL for each trained token.

A *weight map* turns the STAR score of every token into the two weights of the loss (paper, Eq. 3):
the weight of cross-entropy on the target and the weight of the KL term to the reference. Each
`loss_type` of this project is a weight map; the formula of the loss is always the same.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

__all__ = [
    "WeightMap",
    "hard",
    "kl_only",
    "last_scores",
    "rejection",
    "sft",
    "star_dss",
    "static",
]


class WeightMap(Protocol):
    """Map scores to weights, token by token."""

    def __call__(
        self, scores: Tensor, last_scores: Tensor, *, kl_coef: float, threshold: float
    ) -> tuple[Tensor, Tensor]:
        """Return the cross-entropy weight and the KL weight of each token.

        Args:
            scores: Any shape, floating point: s_t, the STAR score of each token, in [0, 1].
            last_scores: Same shape: the score of the last chunk of the token's assistant turn.
            kl_coef: λ >= 0.
            threshold: τ in [0, 1]: scores below it count as unsafe.

        Returns:
            CE weights and KL weights (λ included), both of the shape and dtype of `scores`, >= 0.
        """
        ...


def star_dss(
    scores: Tensor, last_scores: Tensor, *, kl_coef: float, threshold: float
) -> tuple[Tensor, Tensor]:
    """Weight tokens by their chunk's score, the paper's method: (s_t, λ(1 − s_t))."""
    return scores, kl_coef * (1 - scores)


def hard(
    scores: Tensor, last_scores: Tensor, *, kl_coef: float, threshold: float
) -> tuple[Tensor, Tensor]:
    """Weight tokens by a threshold on their chunk's score: (1, 0) if s_t >= τ, else (0, λ)."""
    safe = (scores >= threshold).to(scores.dtype)
    return safe, kl_coef * (1 - safe)


def static(
    scores: Tensor, last_scores: Tensor, *, kl_coef: float, threshold: float
) -> tuple[Tensor, Tensor]:
    """Weight every token of a turn by the turn's last score: (s_last, λ(1 − s_last))."""
    return last_scores, kl_coef * (1 - last_scores)


def rejection(
    scores: Tensor, last_scores: Tensor, *, kl_coef: float, threshold: float
) -> tuple[Tensor, Tensor]:
    """Drop turns with s_last < τ and train on the rest, the paper's RS: (0, 0) or (1, 0)."""
    keep = (last_scores >= threshold).to(scores.dtype)
    return keep, torch.zeros_like(scores)


def kl_only(
    scores: Tensor, last_scores: Tensor, *, kl_coef: float, threshold: float
) -> tuple[Tensor, Tensor]:
    """Train every token only towards the reference: (0, λ)."""
    return torch.zeros_like(scores), torch.full_like(scores, kl_coef)


def sft(
    scores: Tensor, last_scores: Tensor, *, kl_coef: float, threshold: float
) -> tuple[Tensor, Tensor]:
    """Train every token by plain supervised finetuning: (1, 0)."""
    return torch.ones_like(scores), torch.zeros_like(scores)


def last_scores(scores: Tensor, trained: Tensor) -> Tensor:
    """Return for each token the score at the end of its response.

    Args:
        scores: (batch, seq), floating point.
        trained: (batch, seq), bool: True on trained tokens. A response is a maximal run of them.

    Returns:
        (batch, seq), dtype of `scores`: for a trained token the score of its run's last token, for
        other tokens their own score.
    """
    length = scores.shape[-1]
    positions = torch.arange(length, device=scores.device)
    ends = trained.clone()
    ends[..., :-1] &= ~trained[..., 1:]
    next_end = torch.where(ends, positions, length).flip(-1).cummin(-1).values.flip(-1)
    at_end = scores.gather(-1, next_end.clamp(max=length - 1))
    return torch.where(trained, at_end, scores)
