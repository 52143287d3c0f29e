"""Compute a batch's reference log-probabilities and KL terms, for the loss of Eq. (3)."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers import Trainer

from star_dss_plugin.data.columns import REF_COLUMN
from star_dss_plugin.errors import StarDSSError
from star_dss_plugin.logprobs import IGNORE_INDEX, full_kl, kl_estimate, kl_slope, token_logprobs
from star_dss_plugin.loss import TokenWeights
from star_dss_plugin.training.head import Projection, States
from star_dss_plugin.training.policy import policy_of
from star_dss_plugin.training.state import StarDSSState

__all__ = ["compute_kl_terms", "reference_of_batch"]


def reference_of_batch(
    trainer: Trainer,
    active: StarDSSState,
    model: nn.Module,
    inputs: dict[str, Any],
    labels: Tensor,
    ref_logps: Tensor | None,
    weights: TokenWeights,
) -> Tensor | States | None:
    """Return the reference's log π_ref(y_t), (batch, seq − 1), or with `full` its `States`.

    None without a reference, and if no token of the batch has a KL weight (unless the reference is
    precomputed, or other ranks wait for this forward pass).
    """
    kind, held = active.reference.kind, weights.kl != 0
    if kind == "precomputed":
        if ref_logps is None:
            raise StarDSSError(
                f"A batch came without {REF_COLUMN!r}, the reference's log-probabilities. "
                "Give the data set to the trainer's constructor, before training starts."
            )
        return ref_logps[:, 1:]
    if kind == "none":
        if bool(held.any()):
            raise StarDSSError(
                f"loss_type {active.options.loss_type!r} gave a token a KL weight although it was "
                "found to need no reference. The weight map must depend on its arguments alone."
            )
        return None
    # Every rank must run a forward pass that communicates, even if it needs no result.
    if not (active.sharded or active.ranks.collective) and not bool(held.any()):
        return None

    def function(rows: Tensor, project: Projection | None) -> Any:
        if active.needs_distributions:
            return States(rows, project.detached() if project else None)
        wanted = labels.clone()
        wanted[:, 1:][~held] = IGNORE_INDEX
        return token_logprobs(rows, wanted, project)

    with trainer.accelerator.autocast():
        call = model if active.sharded else None
        policy = policy_of(trainer, model)
        found: Tensor | States = active.reference.run(policy, inputs, function, call=call)
        return found


def compute_kl_terms(
    active: StarDSSState,
    logps: Tensor,
    rows: Tensor | None,
    project: Projection | None,
    ref: Tensor | States | None,
    weights: TokenWeights,
) -> tuple[Tensor, ...]:
    """Return (KL_t,) for `full`, (KL_t, slope) for the estimators, () without a reference.

    The slope is the derivative of KL_t by log π_θ(y_t).
    """
    if ref is None:
        return ()
    if isinstance(ref, States):
        assert rows is not None
        ref_project = ref.project
        if active.reference.kind == "adapter" and project is not None:
            ref_project = project  # the same head, gathered here if it is sharded
        return (full_kl(rows, ref.rows, weights.kl != 0, project, ref_project),)
    estimator = active.options.kl_estimator
    return kl_estimate(logps, ref, estimator), kl_slope(logps.detach(), ref, estimator)
