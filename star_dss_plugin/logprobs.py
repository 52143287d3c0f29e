"""Log-probabilities of the tokens that are trained, and the divergence from a reference.

Positions are shifted once, here: entry t of a shifted tensor belongs to the token at t + 1, which
is predicted from position t. Untrained positions hold 0.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

__all__ = ["IGNORE_INDEX", "full_kl", "kl_estimate", "kl_slope", "token_logprobs"]

IGNORE_INDEX = -100
"""The label of tokens that are not trained, as everywhere in PyTorch."""

_ROWS_PER_CHUNK = 512
"""Vocabulary rows held in float32 at once by `full_kl`."""


def _float(x: Tensor) -> Tensor:
    """At least float32: bf16 log-probabilities are too coarse for differences of them."""
    return x if x.dtype == torch.float64 else x.float()


def token_logprobs(logits: Tensor, labels: Tensor) -> Tensor:
    """Log π(y_t | x, y_<t) of every trained token.

    Args:
        logits: (batch, seq, vocab), any floating dtype.
        labels: (batch, seq), int64, unshifted, -100 on tokens that are not trained.

    Returns:
        (batch, seq − 1), float32 (float64 for float64 logits): shifted; 0 where not trained.
    """
    targets = labels[:, 1:]
    trained = targets != IGNORE_INDEX
    rows = _float(logits[:, :-1][trained])
    picked = -F.cross_entropy(rows, targets[trained], reduction="none")
    return rows.new_zeros(targets.shape).masked_scatter(trained, picked)


def kl_estimate(logps: Tensor, ref_logps: Tensor, estimator: str) -> Tensor:
    """One-sample estimates of KL(π_θ ‖ π_ref) at the trained tokens (Schulman's k1, k2, k3).

    Args:
        logps: log π_θ(y_t), any shape.
        ref_logps: log π_ref(y_t), same shape.
        estimator: "k1" (d), "k2" (d²/2) or "k3" (e^(−d) − 1 + d), with d = logps − ref_logps.

    Returns:
        Same shape, dtype of `logps`.
    """
    d = logps - ref_logps.to(logps.dtype)
    match estimator:
        case "k1":
            return d
        case "k2":
            return d.square() / 2
        case "k3":
            return torch.expm1(-d) + d
    raise ValueError(f"{estimator!r} is not a one-sample estimator; use 'k1', 'k2' or 'k3'")


def kl_slope(logps: Tensor, ref_logps: Tensor, estimator: str) -> Tensor:
    """The derivative of `kl_estimate` with respect to `logps`; same arguments, same shape."""
    d = logps - ref_logps.to(logps.dtype)
    match estimator:
        case "k1":
            return torch.ones_like(d)
        case "k2":
            return d
        case "k3":
            return -torch.expm1(-d)
    raise ValueError(f"{estimator!r} is not a one-sample estimator; use 'k1', 'k2' or 'k3'")


def full_kl(logits: Tensor, ref_logits: Tensor, wanted: Tensor) -> Tensor:
    """KL(π_θ ‖ π_ref) over the whole vocabulary, at the positions that need it.

    Works through the positions in chunks and recomputes each chunk in the backward pass, so that
    only one chunk of (positions, vocab) is held in float32 at a time.

    Args:
        logits: (batch, seq, vocab), with gradients.
        ref_logits: (batch, seq, vocab), without.
        wanted: (batch, seq − 1), bool, shifted: where to compute it.

    Returns:
        (batch, seq − 1), float32 (float64 for float64 logits): shifted; 0 where not wanted.
    """

    def divergence(rows: Tensor, ref_rows: Tensor) -> Tensor:
        logp = F.log_softmax(_float(rows), dim=-1)
        ref_logp = F.log_softmax(_float(ref_rows), dim=-1).to(logp.dtype)
        return F.kl_div(ref_logp, logp, reduction="none", log_target=True).sum(-1)

    rows, ref_rows = logits[:, :-1][wanted], ref_logits[:, :-1][wanted].detach()
    parts = [
        checkpoint(divergence, a, b, use_reentrant=False)
        for a, b in zip(rows.split(_ROWS_PER_CHUNK), ref_rows.split(_ROWS_PER_CHUNK), strict=True)
    ]
    empty = _float(logits.new_zeros(wanted.shape))
    return empty.masked_scatter(wanted, torch.cat(parts).to(empty.dtype)) if parts else empty
