"""Collect the `star_dss/` training metrics as sums and counts, divided once per log line."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from star_dss_plugin.loss import TokenWeights

__all__ = ["TokenMetrics"]

_SUMS = (
    "tokens",
    "score",
    "below",
    "ce",
    "weighted_ce",
    "weighted_kl",
    "ce_weight",
    "kl_weight",
    "safe_kl",
    "safe",
    "unsafe_kl",
    "unsafe",
    "kl_pull",
)


class TokenMetrics:
    """Hold running sums over trained tokens, separate for training and evaluation.

    The metrics are means over the trained tokens since the last log line unless noted otherwise:

    - `star_dss/mean_score`: mean s_t.
    - `star_dss/share_below_threshold`: share of tokens with s_t < τ.
    - `star_dss/ce`, `star_dss/kl`: the weighted cross-entropy and KL terms of the loss.
    - `star_dss/kl_weight_mass`: Σ KL weights / Σ (cross-entropy weights + KL weights).
    - `star_dss/ce_unweighted`: −log π_θ(y_t) of all trained tokens.
    - `star_dss/kl_unweighted`: KL_t, over the tokens with a KL weight; others have no reference.
    - `star_dss/kl_safe`, `star_dss/kl_unsafe`: KL_t, over those with s_t >= τ and with s_t < τ.
    - `star_dss/kl_gradient_share`: the KL term's share of the gradient on the trained tokens'
      log-probabilities: Σ |∂(KL term)/∂ log π_θ(y_t)| / Σ of that of both terms. The derivative of
      the cross-entropy term is its weight, that of the KL term its weight times `kl_slope`.

    A mean over no tokens is not logged.
    """

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}

    def add(
        self,
        mode: str,
        scores: Tensor,
        threshold: float,
        logps: Tensor,
        kl_terms: Tensor | None,
        weights: TokenWeights,
        kl_slopes: Tensor | None = None,
    ) -> None:
        """Add one batch. All tensors are shifted and of shape (batch, seq − 1).

        Args:
            mode: "train" or "eval".
            scores: s_t.
            threshold: τ.
            logps: log π_θ(y_t).
            kl_terms: KL_t, any value where its weight is 0; None if no token has a KL weight.
            weights: The token weights.
            kl_slopes: ∂KL_t/∂ log π_θ(y_t), any value where the weight is 0; None where KL_t is not
                a function of that one number (`kl_estimator="full"`).
        """
        with torch.no_grad():
            on, held = weights.trained, weights.kl != 0
            below = scores < threshold
            kl = torch.zeros_like(logps) if kl_terms is None else kl_terms
            if kl_slopes is None:  # no KL term, or (`full`) a slope that is not defined
                kl_slopes = torch.full_like(logps, 0.0 if kl_terms is None else torch.nan)
            parts = (
                on,
                scores * on,
                below & on,
                torch.where(on, -logps, 0.0),
                torch.where(weights.ce != 0, weights.ce * -logps, 0.0),
                torch.where(held, weights.kl * kl, 0.0),
                weights.ce,
                weights.kl,
                torch.where(held & ~below, kl, 0.0),
                held & ~below,
                torch.where(held & below, kl, 0.0),
                held & below,
                torch.where(held, weights.kl * kl_slopes.abs(), 0.0),
            )
            sums = torch.stack([p.sum(dtype=torch.float32) for p in parts])
            self._sums[mode] = sums + self._sums.get(mode, torch.zeros_like(sums))

    def drop(self, mode: str) -> None:
        """Reset the sums of a mode."""
        self._sums.pop(mode, None)

    def pop(self, mode: str, accelerator: Any) -> dict[str, float]:
        """Return the means of a mode over all ranks and reset it; empty if nothing was added."""
        sums = self._sums.pop(mode, None)
        if sums is None:
            return {}
        if accelerator.num_processes > 1:
            sums = accelerator.reduce(sums, reduction="sum")
        v = dict(zip(_SUMS, sums.tolist(), strict=True))
        tokens = max(v["tokens"], 1.0)
        weight = v["ce_weight"] + v["kl_weight"]
        logged = {
            "star_dss/mean_score": v["score"] / tokens,
            "star_dss/share_below_threshold": v["below"] / tokens,
            "star_dss/ce": v["weighted_ce"] / tokens,
            "star_dss/kl": v["weighted_kl"] / tokens,
            "star_dss/kl_weight_mass": v["kl_weight"] / weight if weight else 0.0,
            "star_dss/ce_unweighted": v["ce"] / tokens,
        }
        ratios = {
            "star_dss/kl_unweighted": (v["safe_kl"] + v["unsafe_kl"], v["safe"] + v["unsafe"]),
            "star_dss/kl_safe": (v["safe_kl"], v["safe"]),
            "star_dss/kl_unsafe": (v["unsafe_kl"], v["unsafe"]),
            "star_dss/kl_gradient_share": (v["kl_pull"], v["kl_pull"] + v["ce_weight"]),
        }
        # The comparison is False for NaN, too: the gradient share with kl_estimator="full".
        return logged | {name: part / of for name, (part, of) in ratios.items() if of > 0}
