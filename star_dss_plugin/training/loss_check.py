"""Prove on one real batch that the shaped loss is the one in effect."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from star_dss_plugin.data.columns import REF_COLUMN, SCORES_COLUMN
from star_dss_plugin.errors import StarDSSError
from star_dss_plugin.logprobs import IGNORE_INDEX, token_logprobs
from star_dss_plugin.loss import star_dss_loss
from star_dss_plugin.training.head import forward_inputs

if TYPE_CHECKING:
    from star_dss_plugin.training.state import StarDSSState

__all__ = ["check_loss", "not_in_effect"]

_MOVED = 0.5
"""Nats: more than rounding moves log-probabilities in any precision, less than other weights do."""


def not_in_effect(trainer: Any, why: str) -> StarDSSError:
    """Return the error for a trainer that would train with another loss, and why."""
    return StarDSSError(
        f"Training was stopped before the weights changed: the STAR-DSS loss is not the one that "
        f"{type(trainer).__name__} would train with: {why}."
    )


def check_loss(trainer: Any, active: StarDSSState, dataloader: Any) -> None:
    """Compare the trainer's loss with the plain computation, on one real row.

    Raises:
        StarDSSError: They differ, or the trainer's batches or outputs lack what the loss needs.
    """
    row = _shortest_row(dataloader.dataset)
    batch = dataloader.collate_fn([row])
    if SCORES_COLUMN not in batch:
        raise not_in_effect(
            trainer,
            f"its batches have no {SCORES_COLUMN!r} (they have {sorted(batch)}). The data "
            "collator or the data set was replaced after STAR-DSS was set up; give them to the "
            "trainer's constructor",
        )
    batch = trainer._prepare_inputs(batch)
    labels = batch["labels"]
    model, options = trainer.model_wrapped, active.options
    trained = int((labels[:, 1:] != IGNORE_INDEX).sum())
    was_training, metrics = model.training, active.metrics
    host = _snapshot(trainer)
    devices = [labels.device.index or 0] if labels.is_cuda else []
    shaping: dict[str, Any] = {
        "kl_coef": options.kl_coef,
        "kl_estimator": options.kl_estimator,
        "threshold": options.threshold,
        "num_items_in_batch": trained,
    }
    found, expected = [], []
    with torch.random.fork_rng(devices=devices), torch.no_grad():
        model.eval()
        try:
            active.metrics = type(metrics)()
            with trainer.compute_loss_context_manager():
                logits = model(**forward_inputs(batch)).logits
                if logits is None:
                    raise not_in_effect(
                        trainer,
                        "its model returns no logits to weigh. Switch off what fuses the "
                        "loss into the model (a kernel or a patch)",
                    )
                reference = _reference(active, trainer, batch, labels)
                plain = star_dss_loss(
                    logits, labels, torch.ones_like(labels).float(), loss_type="sft", **shaping
                ).loss
                if active.reference.is_start and active.shaped == 0 == trainer.state.global_step:
                    _check_start(trainer, active, batch, logits)
                base = trainer.base_loss(model, batch)
                for probe in _probes(labels):
                    scored = {**batch, SCORES_COLUMN: probe}
                    loss = trainer.compute_loss(model, scored, num_items_in_batch=trained)
                    found.append(loss.float())
                    shaped = star_dss_loss(
                        logits, labels, probe, loss_type=options.loss_type, **reference, **shaping
                    )
                    expected.append(shaped.loss.float())
        finally:
            active.metrics = metrics
            model.train(was_training)
            _restore(trainer, host)
    half = logits.dtype in (torch.bfloat16, torch.float16) or trainer.args.bf16 or trainer.args.fp16
    relative, absolute = (3e-2, 1e-2) if half else (1e-3, 1e-3)

    def close(a: Tensor, b: Tensor) -> bool:
        return torch.allclose(a, b, rtol=relative, atol=absolute)

    extra = base.float() - plain.float()
    if not _has_auxiliary_loss(trainer):
        if not close(base.float(), plain.float()):
            raise not_in_effect(
                trainer,
                f"it has a loss of its own ({base.item():.6f} on one real row, where "
                f"cross-entropy is {plain.item():.6f}), which STAR-DSS would replace. Use a "
                "trainer, and a loss_type of its own, that train with cross-entropy",
            )
        extra = torch.zeros_like(extra)
    scale = 1
    if trainer.args.average_tokens_across_devices:
        scale = trainer.accelerator.num_processes // trainer.get_tp_size()
    for given, shaped_loss in zip(found, expected, strict=True):
        # The auxiliary loss is a mean over each micro-batch and is not scaled.
        wanted = shaped_loss * scale + extra
        if not close(given, wanted):
            raise not_in_effect(
                trainer,
                f"on one real row its compute_loss gives {given.item():.6f} where "
                f"loss_type={options.loss_type!r} gives {wanted.item():.6f}. Something replaces "
                "compute_loss or adds to it; remove it",
            )


def _check_start(
    trainer: Any, active: StarDSSState, batch: Mapping[str, Any], logits: Tensor
) -> None:
    """That the model is still the one whose log-probabilities are the reference."""
    labels = batch["labels"]
    weights = active.shaping.weights(batch[SCORES_COLUMN].float(), labels)
    held = weights.kl != 0
    apart = (token_logprobs(logits, labels) - batch[REF_COLUMN][:, 1:])[held].abs().sum()
    mean = float(apart) / max(1, int(held.sum()))
    if mean > _MOVED:
        raise not_in_effect(
            trainer,
            "its model is not the one that the reference was made of when STAR-DSS was "
            f"set up (log-probabilities of one row are {mean:.2f} apart on average). Load weights "
            "and adapters before that",
        )


def _probes(labels: Tensor) -> list[Tensor]:
    """Made-up scores, (batch, seq) each: real ones may all be 1, which is plain finetuning.

    Mixed scores, their opposites (so that no response ends safely in both), and all unsafe.
    """
    pattern = torch.tensor([0.0, 1.0, 0.75, 0.25], device=labels.device)
    mixed = pattern.repeat(labels.shape[1] // 4 + 1)[: labels.shape[1]].expand(labels.shape)
    return [mixed, 1 - mixed, torch.zeros_like(mixed)]


def _has_auxiliary_loss(trainer: Any) -> bool:
    """Whether the model is a mixture of experts whose load-balancing loss is part of the loss."""
    config = trainer._policy(trainer.model).config.get_text_config()
    return bool(getattr(config, "output_router_logits", False))


def _shortest_row(dataset: Any) -> Mapping[str, Any]:
    """A row with trained tokens, of the first few the shortest: the check wants little memory.

    A row without any would prove nothing.
    """
    rows = (dataset[i] for i in range(len(dataset)))
    trained = (r for r in rows if any(label != IGNORE_INDEX for label in r["labels"][1:]))
    found = list(itertools.islice(trained, 32))
    if not found:
        raise StarDSSError("No row has a trained token: every label is -100. Check the data.")
    return min(found, key=lambda r: len(r["input_ids"]))


def _reference(
    active: StarDSSState, trainer: Any, batch: Mapping[str, Any], labels: Tensor
) -> dict[str, Any]:
    kind = active.reference.kind
    if kind == "none":
        return {}
    if kind == "precomputed":
        if REF_COLUMN not in batch:
            raise not_in_effect(
                trainer,
                f"its batches have no {REF_COLUMN!r}, the reference's log-probabilities. "
                "The data set was replaced after STAR-DSS was set up; give it to the trainer's "
                "constructor",
            )
        return {"ref_logps": batch[REF_COLUMN]}
    with trainer.accelerator.autocast():
        policy = trainer._policy(trainer.model)
        with active.reference.active(policy) as model:
            logits = model(**forward_inputs(batch)).logits
    if active.options.kl_estimator == "full":
        return {"ref_logits": logits}
    logps = token_logprobs(logits, labels)
    return {"ref_logps": torch.cat([logps.new_zeros(len(logps), 1), logps], dim=1)}


_STEPS = "current_gradient_accumulation_steps"


def _snapshot(trainer: Any) -> Any:
    """What the check must leave as it was: TRL's running metrics, the accumulation in progress."""
    steps = trainer.__dict__.get(_STEPS)
    trainer.current_gradient_accumulation_steps = 1  # the check is one batch
    metrics = getattr(trainer, "_metrics", None)
    if metrics is None:
        return steps, None, 0
    kept = {mode: {k: list(v) for k, v in values.items()} for mode, values in metrics.items()}
    return steps, kept, trainer._total_train_tokens


def _restore(trainer: Any, snapshot: Any) -> None:
    steps, kept, tokens = snapshot
    trainer.__dict__.pop(_STEPS)
    if steps is not None:
        trainer.current_gradient_accumulation_steps = steps
    if kept is None:
        return
    trainer._total_train_tokens = tokens
    for mode, values in trainer._metrics.items():
        values.clear()
        values.update(kept[mode])
