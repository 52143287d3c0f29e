"""The loss (paper, Eq. 3): L = 1/N · Σ_t [ a_t · CE_t + b_t · KL_t ].

A weight map (`weights.py`) computes a_t and b_t from the STAR scores; in the paper's method they
are s_t and λ(1 − s_t). N is the number of trained tokens in the whole optimizer batch, not the sum
of the weights: down-weighting a token makes the step smaller, and does not increase the weight of
other tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from star_dss_plugin.errors import ConfigError, DataError
from star_dss_plugin.logprobs import (
    IGNORE_INDEX,
    KL_ESTIMATORS,
    full_kl,
    kl_estimate,
    token_logprobs,
)
from star_dss_plugin.plugins import load_plugins
from star_dss_plugin.validation import unknown_name
from star_dss_plugin.weights import WeightMap, last_scores

__all__ = ["ShapedLoss", "Shaping", "TokenWeights", "shaped_loss", "star_dss_loss"]


@dataclass(frozen=True)
class Shaping:
    """A weight map with its parameters: computes the two weights of Eq. (3) from scores.

    Attributes:
        weight_map: Maps scores to weights.
        kl_coef: λ >= 0.
        threshold: τ in [0, 1].
    """

    weight_map: WeightMap
    kl_coef: float
    threshold: float

    @classmethod
    def named(cls, loss_type: str, *, kl_coef: float, threshold: float) -> Shaping:
        """Look up the weight map of a `loss_type`; "nll" is TRL's name for "sft".

        Raises:
            ConfigError: No weight map has this name.
        """
        name = "sft" if loss_type == "nll" else loss_type
        return cls(load_plugins().weight_map(name), kl_coef, threshold)

    def __call__(self, scores: Tensor, last_scores: Tensor) -> tuple[Tensor, Tensor]:
        """Return the CE and the KL weights for scores of any shape."""
        return self.weight_map(scores, last_scores, kl_coef=self.kl_coef, threshold=self.threshold)

    @cached_property
    def needs_scores(self) -> bool:
        """Whether the weights depend on the scores at all, so that a guard is needed."""
        ce, kl = self._on_grid()
        return bool((ce != ce[0, 0]).any() or (kl != kl[0, 0]).any())

    @cached_property
    def needs_last_scores(self) -> bool:
        """Whether weights depend on a response's last score, so that responses must be whole."""
        return any(bool((table != table[:, :1]).any()) for table in self._on_grid())

    @cached_property
    def needs_reference(self) -> bool:
        """Whether any score gives a KL weight other than 0, so that π_ref is needed."""
        _, kl = self._on_grid()
        return bool((kl != 0).any())

    def _on_grid(self) -> tuple[Tensor, Tensor]:
        """Return both weights on a grid of (score, last score) that includes points around τ."""
        tau = self.threshold
        near = torch.tensor([tau - 1e-6, tau, tau + 1e-6], dtype=torch.float64)
        points = torch.cat([torch.linspace(0, 1, 65, dtype=torch.float64), near.clamp(0, 1)])
        scores, last = torch.meshgrid(points, points, indexing="ij")
        ce, kl = self(scores.reshape(1, -1), last.reshape(1, -1))
        return ce.reshape(scores.shape), kl.reshape(scores.shape)

    def at_step(self, step: int, warmup_steps: int) -> Shaping:
        """Return the shaping of an optimizer step: λ grows from λ / n at step 0 to λ at n − 1.

        Args:
            step: Optimizer steps done so far.
            warmup_steps: n >= 0; 0: no warmup.
        """
        if not warmup_steps:
            return self
        return replace(self, kl_coef=self.kl_coef * min(1.0, (step + 1) / warmup_steps))

    def weights(self, star_scores: Tensor, labels: Tensor) -> TokenWeights:
        """Return the weights of a batch.

        Args:
            star_scores: (batch, seq), float32 or float64 in [0, 1], unshifted.
            labels: (batch, seq), int64, unshifted, -100 where not trained.

        Raises:
            DataError: The shapes differ.
        """
        if star_scores.shape != labels.shape:
            raise DataError(
                f"star_scores has shape {tuple(star_scores.shape)} and labels has "
                f"{tuple(labels.shape)}. They must have one score per token: score the data again "
                "after every step that changes its tokens (truncation, packing, padding)."
            )
        trained = labels != IGNORE_INDEX
        scores = torch.where(trained, star_scores, torch.ones_like(star_scores))
        ce, kl = self(scores, last_scores(scores, trained))
        shifted = trained[:, 1:]
        zero = torch.zeros((), dtype=scores.dtype, device=scores.device)
        return TokenWeights(
            torch.where(shifted, ce[:, 1:], zero), torch.where(shifted, kl[:, 1:], zero), shifted
        )


@dataclass(frozen=True)
class TokenWeights:
    """The weights of one batch, shifted: entry t belongs to the token at t + 1.

    Attributes:
        ce: (batch, seq − 1): weight of cross-entropy; 0 where not trained.
        kl: (batch, seq − 1): weight of the KL term, λ included; 0 where not trained.
        trained: (batch, seq − 1), bool.
    """

    ce: Tensor
    kl: Tensor
    trained: Tensor


@dataclass(frozen=True)
class ShapedLoss:
    """The loss and its two parts, each a scalar tensor with gradients; `loss = ce + kl`.

    Attributes:
        loss: The total, which is minimised.
        ce: 1/N Σ a_t CE_t.
        kl: 1/N Σ b_t KL_t, λ included.
    """

    loss: Tensor
    ce: Tensor
    kl: Tensor


def shaped_loss(
    logps: Tensor,
    kl_terms: Tensor | None,
    weights: TokenWeights,
    num_items_in_batch: Tensor | int | None = None,
) -> ShapedLoss:
    """Compute Eq. (3) from per-token quantities, all shifted and of shape (batch, seq − 1).

    Args:
        logps: log π_θ(y_t), with gradients.
        kl_terms: KL_t, any value where its weight is 0; None if no token has a KL weight.
        weights: The token weights.
        num_items_in_batch: N; by default the trained tokens of this batch.

    Returns:
        Scalars of the dtype of `logps`; zero, with zero gradient, if all weights are 0.
    """
    n: Tensor | int = weights.trained.sum() if num_items_in_batch is None else num_items_in_batch
    n = torch.as_tensor(n, device=logps.device).clamp(min=1)
    # where() instead of a product, because 0 · inf is NaN, and a token with weight 0 must not
    # contribute, whatever its log-probability.
    zero = logps.new_zeros(())
    ce = torch.where(weights.ce != 0, weights.ce * -logps, zero).sum() / n
    if kl_terms is None:
        kl = zero
    else:
        kl = torch.where(weights.kl != 0, weights.kl * kl_terms, zero).sum() / n
    return ShapedLoss(ce + kl, ce, kl)


def star_dss_loss(
    logits: Tensor,
    labels: Tensor,
    star_scores: Tensor,
    *,
    ref_logits: Tensor | None = None,
    ref_logps: Tensor | None = None,
    loss_type: str = "star_dss",
    kl_coef: float = 0.5,
    kl_estimator: str = "k2",
    threshold: float = 0.5,
    num_items_in_batch: Tensor | int | None = None,
) -> ShapedLoss:
    """Compute the STAR-DSS loss for a custom training loop (paper, Eq. 3).

    Args:
        logits: (batch, seq, vocab), any floating dtype, with gradients.
        labels: (batch, seq), int64, unshifted (label t is the token at t), -100: not trained.
        star_scores: (batch, seq), floating point in [0, 1], unshifted, one per token.
        ref_logits: (batch, seq, vocab) of the frozen reference on the same tokens. Needed when a
            token has a KL weight, unless `ref_logps` is given.
        ref_logps: (batch, seq), unshifted: log π_ref of each trained token, instead of
            `ref_logits`. Not sufficient for `kl_estimator="full"`.
        loss_type: A weight map: "star_dss", "hard", "static", "rejection", "kl_only", "sft" (or
            "nll"), or a plugin's.
        kl_coef: λ >= 0.
        kl_estimator: "k1", "k2", "k3" or "full".
        threshold: τ of "hard" and "rejection".
        num_items_in_batch: Trained tokens in the whole optimizer batch (over accumulation steps
            and ranks); by default those of this batch.

    Returns:
        An object with scalar tensors `loss`, `ce` and `kl`; `loss = ce + kl`.

    Raises:
        ConfigError: A name is unknown, or a reference is needed and not given.
        DataError: `star_scores` and `labels` differ in shape.
    """
    if kl_estimator not in KL_ESTIMATORS:
        raise unknown_name("kl_estimator", kl_estimator, KL_ESTIMATORS)
    scores = star_scores.to(torch.float64 if logits.dtype == torch.float64 else torch.float32)
    weights = Shaping.named(loss_type, kl_coef=kl_coef, threshold=threshold).weights(scores, labels)
    logps = token_logprobs(logits, labels)
    kl_terms = None
    if bool((weights.kl != 0).any()):
        if kl_estimator == "full":
            if ref_logits is None:
                raise _missing_reference(loss_type, "ref_logits")
            kl_terms = full_kl(logits, ref_logits, weights.kl != 0)
        else:
            if ref_logits is not None:
                shifted = token_logprobs(ref_logits, labels).detach()
            elif ref_logps is not None:
                shifted = ref_logps[:, 1:]
            else:
                raise _missing_reference(loss_type, "ref_logits or ref_logps")
            kl_terms = kl_estimate(logps, shifted, kl_estimator)
    return shaped_loss(logps, kl_terms, weights, num_items_in_batch)


def _missing_reference(loss_type: str, what: str) -> ConfigError:
    return ConfigError(
        f"loss_type {loss_type!r} gives some tokens of this batch a KL weight, but {what} was not "
        "given. Pass the frozen reference's outputs on the same tokens, or set kl_coef=0."
    )
