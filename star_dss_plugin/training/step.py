"""Compute the loss of Eq. (3) for a batch: the reference's pass, the host's forward pass, the sum.

The host's own `compute_loss` runs the policy. Its logits are read during that forward pass, at the
call of the LM head (`head.py`), and the loss that it returns is replaced.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn
from transformers import Trainer

from star_dss_plugin.data.columns import REF_COLUMN, SCORES_COLUMN, TOKEN_COLUMNS
from star_dss_plugin.errors import ConfigError, StarDSSError
from star_dss_plugin.logprobs import token_logprobs
from star_dss_plugin.loss import shaped_loss
from star_dss_plugin.training.head import (
    Projection,
    apply_at_head,
    capture_first_output,
    forward_inputs,
    without_logits,
    zero_loss,
)
from star_dss_plugin.training.kl_terms import compute_kl_terms, reference_of_batch
from star_dss_plugin.training.policy import mode_of, policy_of
from star_dss_plugin.training.sequence_parallel import (
    balancing_over_group,
    exchanging_in_eval,
    is_part,
    sequence_parallel_size,
    unshifted,
)
from star_dss_plugin.training.state import StarDSSState

__all__ = ["averaging_factor", "shaped_step"]


def shaped_step(
    trainer: Trainer,
    active: StarDSSState,
    model: nn.Module,
    inputs: Mapping[str, Any],
    host_loss: Callable[..., Any],
    *,
    logits_unread: bool,
    return_outputs: bool,
    num_items_in_batch: Tensor | int | None,
) -> Any:
    """Return the shaped loss of a batch, as a Trainer's `compute_loss` does, and log its terms.

    Args:
        trainer: The trainer.
        active: The trainer's `star_dss_state`.
        model: The model as the trainer has wrapped it.
        inputs: The batch, with `labels`, `star_scores` and, for a precomputed reference,
            `ref_logps`; or with their shifted columns if the batch holds parts of rows.
        host_loss: `compute_loss` of the trainer's base class.
        logits_unread: Whether `host_loss` reads no logits.
        return_outputs: Whether to return (loss, outputs of the model) instead of the loss.
        num_items_in_batch: Trained tokens of the optimizer batch, by which the loss is divided;
            None: those of this batch.

    Raises:
        StarDSSError: The batch or the host's forward pass lacks what the loss needs.
    """
    part = is_part(inputs)
    if part and num_items_in_batch is None:
        raise StarDSSError(
            "A batch of parts of rows (sp_size) came without the number of trained tokens of all "
            "processes. Use a trainer that counts them in get_batch_samples, as transformers does."
        )
    given = unshifted(inputs) if part else inputs
    scores, ref_logps = given.get(SCORES_COLUMN), given.get(REF_COLUMN)
    labels = given.get("labels")
    # transformers asks Liger's fused loss for skip_logits.
    inputs = {k: v for k, v in inputs.items() if k not in (*TOKEN_COLUMNS, "skip_logits")}
    if scores is None or labels is None:
        raise StarDSSError(
            f"A batch came without {SCORES_COLUMN!r} or 'labels' (it has {sorted(inputs)}). "
            "Something replaced the data set or the data collator after STAR-DSS was set up; "
            "give them to the trainer's constructor."
        )
    if part:
        inputs["labels"] = inputs["shift_labels"]
    mode = mode_of(trainer)
    shaping = active.shaping
    if mode == "train":  # evaluations use the full λ, so that they can be compared over steps
        shaping = shaping.at_step(trainer.state.global_step, active.options.kl_warmup_steps)
    weights = shaping.weights(_checked(scores), labels)
    # Before the policy's forward pass: gradient checkpointing would recompute that pass wrongly if
    # an adapter were switched off between it and the backward pass.
    with exchanging_in_eval(trainer.model) if part else contextlib.nullcontext():
        ref = reference_of_batch(trainer, active, model, inputs, labels, ref_logps, weights)

    def terms(rows: Tensor, project: Projection | None) -> tuple[Tensor, ...]:
        with trainer.accelerator.autocast():  # as the model applies its own head
            logps = token_logprobs(rows, labels, project)
            return logps, *compute_kl_terms(active, logps, rows, project, ref, weights)

    with contextlib.ExitStack() as stack:
        if part:
            stack.enter_context(exchanging_in_eval(trainer.model))
            stack.enter_context(balancing_over_group(trainer.model))
        result, outputs, found = _forward(
            trainer, active, model, inputs, host_loss, logits_unread, return_outputs, terms
        )
    if found is None:
        logps = _fused_logps(outputs, labels)
        found = logps, *compute_kl_terms(active, logps, None, None, ref, weights)
    logps = found[0]
    kl_terms = found[1] if len(found) > 1 else None
    slopes = found[2] if len(found) > 2 else None
    loss = shaped_loss(logps, kl_terms, weights, num_items_in_batch).loss
    active.metrics.add(
        mode,
        scores[:, 1:],
        active.options.threshold,
        logps.detach(),
        kl_terms,
        weights,
        slopes,
    )
    active.shaped += mode == "train"
    if num_items_in_batch is not None:
        loss = loss * averaging_factor(trainer, part=part)
    loss = _with_auxiliary_loss(trainer, loss, outputs, num_items_in_batch)
    if active.sharded:
        loss = loss + zero_loss(outputs)
    return (loss, result[1]) if return_outputs else loss


def averaging_factor(trainer: Any, *, part: bool) -> int:
    """Return the factor that undoes the averaging of gradients over processes.

    It is the number of processes whose trained tokens are counted together in
    `num_items_in_batch`: their losses must be summed, and DDP, FSDP and DeepSpeed average.

    Args:
        trainer: The trainer. With `average_tokens_across_devices` it counts the tokens of all
            processes, else those of one process or one sequence-parallel group.
        part: Whether the batch holds parts of rows (sequence parallelism).
    """
    if trainer.args.average_tokens_across_devices:
        return int(trainer.accelerator.num_processes // trainer.get_tp_size())
    return sequence_parallel_size(trainer.accelerator) if part else 1


def _checked(scores: Tensor) -> Tensor:
    """Return a batch's scores as float32.

    Raises:
        StarDSSError: A score is outside [0, 1].
    """
    inside = (scores >= 0) & (scores <= 1)
    if not bool(inside.all()):
        raise StarDSSError(
            f"A batch has a star_score of {float(scores[~inside][0])}, which is no probability in "
            "[0, 1]. Something changed the scores after they were checked at set-up: give data "
            "sets and collator to the trainer's constructor, and leave star_scores as it is."
        )
    return scores.float()


def _forward(
    trainer: Trainer,
    active: StarDSSState,
    model: nn.Module,
    inputs: dict[str, Any],
    host_loss: Callable[..., Any],
    logits_unread: bool,
    return_outputs: bool,
    terms: Callable[[Tensor, Projection | None], tuple[Tensor, ...]],
) -> tuple[Any, Any, tuple[Tensor, ...] | None]:
    """Return `host_loss`'s result, the policy's outputs, and `terms` of the policy's logits.

    The terms are None if the outputs hold log-probabilities from a fused LM head instead.
    """
    policy = policy_of(trainer, model)
    read = return_outputs and not active.outputs_unread
    alone = active.projects and logits_unread and not read

    def reads_at_head(kwargs: Mapping[str, Any]) -> bool:
        """Return whether to read logits at the head, because the outputs will not hold them all."""
        lacking = active.sharded or bool(kwargs.get("fused_lm_head"))
        return alone or (active.needs_distributions and lacking)

    with contextlib.ExitStack() as stack:
        captured = stack.enter_context(capture_first_output(model))
        found: list[tuple[Tensor, ...]] = []
        if active.projects:
            found = stack.enter_context(apply_at_head(policy, terms, condition=reads_at_head))
        if alone:
            stack.enter_context(without_logits(model))
        result = host_loss(model, dict(inputs), return_outputs=return_outputs)
    if not captured:
        raise StarDSSError(
            f"{type(trainer).__mro__[1].__name__}.compute_loss did not call the model, so there "
            "is no output to shape. Use a trainer whose compute_loss runs the model it gets."
        )
    if found:
        return result, captured[0], found[0]
    logits = getattr(captured[0], "logits", None)
    if logits is not None and logits.shape[:2] == inputs["labels"].shape:
        return result, captured[0], terms(logits, None)
    if active.needs_distributions:  # a second forward pass: the host's made no logits
        call = model if active.sharded else policy
        return result, captured[0], terms(call(**forward_inputs(inputs)).logits, None)
    return result, captured[0], None


def _fused_logps(outputs: Any, labels: Tensor) -> Tensor:
    """Return log π_θ(y_t), (batch, seq − 1), from the outputs of a fused LM head."""
    fused = getattr(outputs, "log_probs", None)
    if isinstance(fused, Tensor) and fused.shape == labels[:, 1:].shape:
        return fused.float()
    raise ConfigError(
        "The model's forward pass returned neither per-token log-probabilities nor logits "
        "for every token, so the loss cannot be weighted by token. Switch off what fuses the loss "
        "into the model: cut_cross_entropy, or the kernel's own patch."
    )


def _with_auxiliary_loss(
    trainer: Trainer, loss: Tensor, outputs: Any, num_items_in_batch: Tensor | int | None
) -> Tensor:
    """Add the load-balancing loss of a mixture-of-experts model."""
    auxiliary = getattr(outputs, "aux_loss", None)
    if auxiliary is None:
        return loss
    assert trainer.model is not None
    config = policy_of(trainer, trainer.model).config.get_text_config()
    coefficient = getattr(trainer, "router_aux_loss_coef", None)
    if coefficient is None:
        coefficient = getattr(config, "router_aux_loss_coef", 0.0)
    steps = 1
    if num_items_in_batch is not None:
        # The Trainer sets it in its training loop, after the check of the loss.
        steps = getattr(trainer, "current_gradient_accumulation_steps", 1)
    shaped: Tensor = loss + coefficient * auxiliary / steps
    return shaped
