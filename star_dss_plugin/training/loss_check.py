"""Verify on one real row that the trainer trains with the shaped loss."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from star_dss_plugin.data.columns import REF_COLUMN, SCORES_COLUMN, TOKEN_COLUMNS
from star_dss_plugin.errors import StarDSSError
from star_dss_plugin.logprobs import IGNORE_INDEX
from star_dss_plugin.training.rows.even import no_rows_error
from star_dss_plugin.training.rows.shortest import shortest_row
from star_dss_plugin.training.sequence_parallel_checks import check_averaging
from star_dss_plugin.training.terms_by_definition import (
    TermsByDefinition,
    loss_not_used_error,
    reference_of,
    separate_head_error,
    terms_by_definition,
    watch_sharded_head,
)

if TYPE_CHECKING:
    from star_dss_plugin.training.state import StarDSSState
from star_dss_plugin.training.policy import policy_of
from star_dss_plugin.training.sequence_parallel import (
    fixed_length,
    pad_batch,
    sequence_parallel_group,
    sequence_parallel_size,
    slice_for_rank,
)
from star_dss_plugin.training.step import averaging_factor
from star_dss_plugin.validation import shortened

__all__ = ["check_loss"]

_MOVED = {"16 bits": 0.5, "32 bits": 0.05}
"""Largest mean difference of a row's log-probabilities, in nats, that rounding may explain.

By the model's precision. With SmolLM2 other padding moved them by 6e-6 on average in 32 bits, in 16
bits by 0.06 on average and by up to 0.3 for one token, and a row may have only one.
"""


def check_loss(trainer: Any, active: StarDSSState, dataloader: Any) -> None:
    """Compare the trainer's loss with Eq. (3) computed from the logits, on one real row.

    The row gets three made-up lists of scores, one after the other. Both computations hold the
    logits of a few hundred positions at a time, as training does. All processes must call this.

    Args:
        trainer: The trainer, whose model is wrapped for training.
        active: The trainer's `star_dss_state`.
        dataloader: The training data loader.

    Raises:
        StarDSSError: The losses differ, or the trainer's batches or outputs lack what the loss
            needs.
    """
    policy = policy_of(trainer, trainer.model)
    own = active.stream_of(trainer.train_dataset)
    size = sequence_parallel_size(trainer.accelerator)
    loader = dataloader.dl if size > 1 else dataloader  # without DeepSpeed's, which splits batches
    fixed = fixed_length(trainer.accelerator)
    row = shortest_row(
        loader.dataset,
        active.options.stream_buffer,
        iter if own is None else own.iterate,
        beyond=fixed // size if fixed else 0,
    )
    there = active.ranks.gather(row is not None)
    if row is None or not all(there):
        if any(there):
            raise no_rows_error(there.index(False), "train")
        raise StarDSSError("No row has a trained token: every label is -100. Check the data.")
    try:
        batch = loader.collate_fn([row])
    except StarDSSError:
        raise
    except Exception as error:  # a data collator may raise anything
        raise loss_not_used_error(
            trainer,
            f"its data collator makes no batch of a row that was prepared "
            f"({type(error).__name__}: {shortened(str(error))}). If the data collator was replaced "
            "after STAR-DSS was set up, give it to the trainer's constructor",
        ) from error
    if SCORES_COLUMN not in batch:
        raise loss_not_used_error(
            trainer,
            f"its batches have no {SCORES_COLUMN!r} (they have {sorted(batch)}). The data "
            "collator or the data set was replaced after STAR-DSS was set up; give them to the "
            "trainer's constructor",
        )
    if size > 1:  # all processes take rank 0's row: of a stream each may have read another
        batch = active.ranks.gather(batch)[0]
    batch = trainer._prepare_inputs(batch)
    if size > 1:  # a part that is padding alone would test nothing
        kept = -(-int(batch["attention_mask"].sum()) // size) * size
        batch = {n: c[:, :kept] if isinstance(c, Tensor) else c for n, c in batch.items()}
    labels = batch["labels"]
    model, options = trainer.model_wrapped, active.options
    trained = int((labels[:, 1:] != IGNORE_INDEX).sum())
    was_training, metrics = model.training, active.metrics
    host = _snapshot(trainer)
    devices = [labels.device.index or 0] if labels.is_cuda else []
    found, expected, in_parts = [], [], []
    with torch.random.fork_rng(devices=devices), torch.no_grad():
        model.eval()
        try:
            active.metrics = type(metrics)()
            with trainer.compute_loss_context_manager():
                reference = reference_of(active, trainer, batch, labels)
                with watch_sharded_head(policy) as sharded_heads:
                    plain = terms_by_definition(active, trainer, policy, batch, reference)
                # With tensor parallelism the head is sharded, too, but its logits are complete.
                gathered = active.ranks.tp_size > 1 or not any(sharded_heads)
                if not gathered and not trainer.host_leaves_logits_alone():
                    raise separate_head_error(
                        "gives a wrong loss, with or without STAR-DSS, in trainers that read the "
                        "head's weight outside of its forward pass, as TRL's do"
                    )
                if active.reference.is_start and active.shaped == 0 == trainer.state.global_step:
                    _check_start(trainer, active, batch, plain)
                extra = _base_beyond_cross_entropy(trainer, active, policy, batch, plain)
                for probe in _probes(labels):
                    scored = {**batch, SCORES_COLUMN: probe}
                    loss = trainer.compute_loss(model, scored, num_items_in_batch=trained)
                    found.append(loss.float())
                    weights = active.shaping.weights(probe, labels)
                    terms = torch.where(weights.ce != 0, weights.ce * -plain.logps, 0.0)
                    if plain.kl is not None:
                        terms = terms + torch.where(weights.kl != 0, weights.kl * plain.kl, 0.0)
                    expected.append(terms.sum().float() / trained)
                    if size > 1:
                        whole_row = scored if fixed is None else pad_batch(scored, fixed)
                        in_parts.append(_loss_in_parts(trainer, active, whole_row, trained, size))
        finally:
            active.metrics = metrics
            model.train(was_training)
            _restore(trainer, host)
    scale = averaging_factor(trainer, part=False)
    for given, shaped_loss in zip(found, expected, strict=True):
        # The auxiliary loss is a mean over each micro-batch, so it is not scaled.
        wanted = shaped_loss * scale + extra
        if not plain.close(given, wanted):
            raise loss_not_used_error(
                trainer,
                f"on one real row its compute_loss gives {given.item():.6f} where "
                f"loss_type={options.loss_type!r} gives {wanted.item():.6f}. Something replaces "
                "compute_loss or adds to it; remove it",
            )
    if size > 1:
        check_averaging(trainer.model_wrapped)
    for given, shaped_loss in zip(in_parts, expected, strict=False):
        shaped_loss = shaped_loss + extra * size / averaging_factor(trainer, part=True)
        if not plain.close(given, shaped_loss):
            raise loss_not_used_error(
                trainer,
                f"one real row that is cut into {size} parts (sp_size) has a loss of "
                f"{given.item():.6f}, and {shaped_loss.item():.6f} as a whole, so its attention "
                "does not exchange the parts correctly. Set sp_attn_implementation to the "
                "attention that the model and its reference use (sdpa), or sp_size=1",
            )


def _loss_in_parts(
    trainer: Any, active: StarDSSState, batch: Mapping[str, Any], trained: int, size: int
) -> Tensor:
    """Return the loss of a row that the sequence-parallel group computes in parts."""
    part = slice_for_rank(batch, size, torch.distributed.get_rank(sequence_parallel_group()))
    rows = int(trainer.args.train_batch_size)  # Ulysses' attention is set up for full batches
    part = {name: column.repeat(rows, 1) for name, column in part.items()}
    mine = trainer.compute_loss(trainer.model_wrapped, part, num_items_in_batch=trained * rows)
    losses = active.ranks.gather(float(mine) / averaging_factor(trainer, part=True))
    groups = len(losses) // size  # each group computes this same row
    return torch.as_tensor(sum(losses) / groups, device=part["input_ids"].device)


_WINDOW = 512
"""Tokens of a long row on which the host's own loss, which holds all their logits, is checked."""


def _base_beyond_cross_entropy(
    trainer: Any,
    active: StarDSSState,
    policy: nn.Module,
    batch: Mapping[str, Any],
    plain: TermsByDefinition,
) -> Tensor:
    """Return the base class's loss minus cross-entropy: the auxiliary loss of experts, or 0.

    Raises:
        StarDSSError: The model has no auxiliary loss, and the base class's loss is not
            cross-entropy.
    """
    auxiliary = _has_auxiliary_loss(trainer)
    length = batch["labels"].shape[1]
    text_only = set(batch) <= {"input_ids", "labels", "attention_mask", *TOKEN_COLUMNS}
    if trainer.host_leaves_logits_alone() and length > _WINDOW and text_only and not auxiliary:
        first = int((batch["labels"][0, 1:] != IGNORE_INDEX).nonzero()[0])
        part = slice(first, first + _WINDOW)
        batch = {name: batch[name][:1, part] for name in ("input_ids", "labels")}
        batch["attention_mask"] = torch.ones_like(batch["input_ids"])
        plain = terms_by_definition(active, trainer, policy, batch, None)
    base: Tensor = trainer.base_loss(trainer.model_wrapped, batch).float()
    trained = (batch["labels"][:, 1:] != IGNORE_INDEX).sum()
    cross_entropy: Tensor = -plain.logps.sum().float() / trained
    if auxiliary:
        return base - cross_entropy
    if not plain.close(base, cross_entropy):
        raise loss_not_used_error(
            trainer,
            f"it has a loss of its own ({base.item():.6f} on one real row, where "
            f"cross-entropy is {cross_entropy.item():.6f}), which STAR-DSS would replace. Use a "
            "trainer, and a loss_type of its own, that train with cross-entropy",
        )
    return torch.zeros_like(base)


def _check_start(
    trainer: Any, active: StarDSSState, batch: Mapping[str, Any], plain: TermsByDefinition
) -> None:
    """Check that the model still gives the precomputed reference's log-probabilities.

    Raises:
        StarDSSError: Their mean difference on the row is more than rounding explains.
    """
    labels = batch["labels"]
    weights = active.shaping.weights(batch[SCORES_COLUMN].float(), labels)
    held = weights.kl != 0
    apart = (plain.logps - batch[REF_COLUMN][:, 1:])[held].abs().sum()
    mean = float(apart) / max(1, int(held.sum()))
    if mean > _MOVED["16 bits" if plain.half else "32 bits"]:
        raise loss_not_used_error(
            trainer,
            "its model is not the one that the reference was made of when STAR-DSS was "
            f"set up (log-probabilities of one row are {mean:.2f} apart on average). Load weights "
            "and adapters before that",
        )


def _probes(labels: Tensor) -> list[Tensor]:
    """Return three lists of made-up scores, (batch, seq) each.

    Real scores may all be 1, with which the shaped loss is plain finetuning's. These are mixed
    scores; 1 minus these, so that each response ends safe in one list and unsafe in the other; and
    zeros.
    """
    pattern = torch.tensor([0.0, 1.0, 0.75, 0.25], device=labels.device)
    mixed = pattern.repeat(labels.shape[1] // 4 + 1)[: labels.shape[1]].expand(labels.shape)
    return [mixed, 1 - mixed, torch.zeros_like(mixed)]


def _has_auxiliary_loss(trainer: Any) -> bool:
    """Return whether the model's loss includes a load-balancing loss (mixture of experts)."""
    config = policy_of(trainer, trainer.model).config.get_text_config()
    return bool(getattr(config, "output_router_logits", False))


_STEPS = "current_gradient_accumulation_steps"


def _snapshot(trainer: Any) -> Any:
    """Save the trainer's state that the check changes: TRL's metrics, the accumulation steps."""
    steps = trainer.__dict__.get(_STEPS)
    trainer.current_gradient_accumulation_steps = 1  # the check is one batch
    metrics = getattr(trainer, "_metrics", None)
    if metrics is None:
        return steps, None, 0
    kept = {mode: {k: list(v) for k, v in values.items()} for mode, values in metrics.items()}
    return steps, kept, trainer._total_train_tokens


def _restore(trainer: Any, snapshot: Any) -> None:
    """Put the state that `_snapshot` saved back."""
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
