"""Compute log-probabilities of trained tokens, and the divergence from a reference.

Positions are shifted only here: entry t of a shifted tensor belongs to the token at t + 1, which is
predicted from position t. Entries of untrained tokens are 0.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

__all__ = [
    "IGNORE_INDEX",
    "KL_ESTIMATORS",
    "Project",
    "full_kl",
    "kl_estimate",
    "kl_slope",
    "token_logprobs",
]

KL_ESTIMATORS = ("k1", "k2", "k3", "full")
IGNORE_INDEX = -100
"""Label of tokens that are not trained, as elsewhere in PyTorch."""

_ROWS_PER_CHUNK = 512
"""Number of positions whose distributions over the vocabulary are held in float32 at once."""

Project = Callable[[Tensor], Tensor]
"""Maps hidden states, (n, hidden), to logits, (n, vocab)."""


def _float(x: Tensor) -> Tensor:
    """Convert to float32 or wider, since differences of bf16 log-probabilities are too coarse."""
    return x if x.dtype == torch.float64 else x.float()


def token_logprobs(states: Tensor, labels: Tensor, project: Project | None = None) -> Tensor:
    """Return log π(y_t | x, y_<t) of every trained token.

    Args:
        states: Logits, (batch, seq, vocab), any floating dtype. With `project`, hidden states,
            (batch, seq, hidden), which are projected in chunks, and again in the backward pass.
        labels: (batch, seq), int64, unshifted, -100 on untrained tokens. Or (batch, seq + 1), if
            the last state predicts a token too.
        project: Maps hidden states to logits.

    Returns:
        (batch, labels − 1), float32 (float64 for float64 logits): shifted; 0 where not trained.
    """
    targets = labels[:, 1:]
    trained = targets != IGNORE_INDEX
    rows, targets_of_rows = states[:, : targets.shape[1]][trained], targets[trained]
    if project is None:
        picked = -F.cross_entropy(_float(rows), targets_of_rows, reduction="none")
    else:

        def log_probability(rows: Tensor, targets: Tensor) -> Tensor:
            return -F.cross_entropy(_float(project(rows)), targets, reduction="none")

        picked = _in_chunks(log_probability, rows, targets_of_rows)
    return picked.new_zeros(targets.shape).masked_scatter(trained, picked)


def _in_chunks(function: Callable[[Tensor, Tensor], Tensor], one: Tensor, two: Tensor) -> Tensor:
    """Apply `function` to aligned rows in chunks, holding one chunk of distributions at a time."""
    # An empty input is still one chunk, so that the result has gradients to the model.
    starts = range(0, max(len(one), 1), _ROWS_PER_CHUNK)
    chunks = [slice(start, start + _ROWS_PER_CHUNK) for start in starts]
    if not torch.is_grad_enabled():
        return torch.cat([function(one[chunk], two[chunk]) for chunk in chunks])
    return torch.cat(
        [checkpoint(function, one[chunk], two[chunk], use_reentrant=False) for chunk in chunks]
    )


def kl_estimate(logps: Tensor, ref_logps: Tensor, estimator: str) -> Tensor:
    """Return one-sample estimates of KL(π_θ ‖ π_ref) at trained tokens (Schulman's k1, k2, k3).

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
    """Return the derivative of `kl_estimate` with respect to `logps`; same arguments and shape."""
    d = logps - ref_logps.to(logps.dtype)
    match estimator:
        case "k1":
            return torch.ones_like(d)
        case "k2":
            return d
        case "k3":
            return -torch.expm1(-d)
    raise ValueError(f"{estimator!r} is not a one-sample estimator; use 'k1', 'k2' or 'k3'")


def full_kl(
    states: Tensor,
    ref_states: Tensor,
    wanted: Tensor,
    project: Project | None = None,
    ref_project: Project | None = None,
) -> Tensor:
    """Return KL(π_θ ‖ π_ref) over the whole vocabulary, at the wanted positions.

    Positions are processed in chunks, and each chunk is recomputed in the backward pass, so that
    only one chunk of (positions, vocab) is held in float32 at a time.

    Args:
        states: Logits, (batch, seq, vocab), with gradients. With `project`, hidden states.
        ref_states: The reference's logits, without gradients. With `ref_project`, its hidden
            states.
        wanted: (batch, seq − 1), bool, shifted: True where the divergence is computed. Or
            (batch, seq).
        project: Maps hidden states to logits.
        ref_project: Maps the reference's hidden states to its logits.

    Returns:
        (batch, seq − 1), float32 (float64 for float64 logits): shifted; 0 where not wanted.
    """

    def divergence(rows: Tensor, ref_rows: Tensor) -> Tensor:
        with torch.no_grad():
            ref_logits = ref_rows if ref_project is None else ref_project(ref_rows)
            ref_logp = F.log_softmax(_float(ref_logits), dim=-1)
        logits = rows if project is None else project(rows)
        logp = F.log_softmax(_float(logits), dim=-1)
        return F.kl_div(ref_logp.to(logp.dtype), logp, reduction="none", log_target=True).sum(-1)

    length = wanted.shape[1]
    rows, ref_rows = states[:, :length][wanted], ref_states[:, :length][wanted].detach()
    found = _in_chunks(divergence, rows, ref_rows)
    return found.new_zeros(wanted.shape).masked_scatter(wanted, found)
