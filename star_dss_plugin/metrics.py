"""What is logged under `star_dss/` while it trains: sums and counts, divided once per log line."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from star_dss_plugin.loss import TokenWeights

__all__ = ["TokenMetrics"]

_SUMS = ("tokens", "score", "below", "weighted_ce", "weighted_kl", "ce_weight", "kl_weight")


class TokenMetrics:
    """Running sums over trained tokens, apart for training and evaluation.

    Logged, all as means over the trained tokens since the last log line:

    - `star_dss/mean_score`: mean s_t.
    - `star_dss/share_below_threshold`: share of tokens with s_t < τ.
    - `star_dss/ce`, `star_dss/kl`: the two parts of the loss.
    - `star_dss/kl_weight_mass`: Σ KL weights / Σ of both weights.
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
    ) -> None:
        """Adds one batch. All tensors are shifted and of shape (batch, seq − 1)."""
        with torch.no_grad():
            on = weights.trained
            kl = torch.zeros_like(logps) if kl_terms is None else kl_terms
            parts = (
                on, scores * on, (scores < threshold) & on,
                torch.where(weights.ce != 0, weights.ce * -logps, 0.0),
                torch.where(weights.kl != 0, weights.kl * kl, 0.0),
                weights.ce, weights.kl,
            )  # fmt: skip
            sums = torch.stack([p.sum(dtype=torch.float32) for p in parts])
            self._sums[mode] = sums + self._sums.get(mode, torch.zeros_like(sums))

    def pop(self, mode: str, accelerator: Any) -> dict[str, float]:
        """The means of a mode over all ranks, and starts anew; empty if nothing was added."""
        sums = self._sums.pop(mode, None)
        if sums is None:
            return {}
        if accelerator.num_processes > 1:
            sums = accelerator.reduce(sums, reduction="sum")
        value = dict(zip(_SUMS, sums.tolist(), strict=True))
        tokens = max(value["tokens"], 1.0)
        weight = value["ce_weight"] + value["kl_weight"]
        return {
            "star_dss/mean_score": value["score"] / tokens,
            "star_dss/share_below_threshold": value["below"] / tokens,
            "star_dss/ce": value["weighted_ce"] / tokens,
            "star_dss/kl": value["weighted_kl"] / tokens,
            "star_dss/kl_weight_mass": value["kl_weight"] / weight if weight else 0.0,
        }
