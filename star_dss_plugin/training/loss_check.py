"""Prove on one real batch that the shaped loss is the one in effect."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from star_dss_plugin.data.columns import REF_COLUMN, SCORES_COLUMN
from star_dss_plugin.errors import ConfigError, StarDSSError
from star_dss_plugin.logprobs import IGNORE_INDEX, kl_estimate, token_logprobs
from star_dss_plugin.training.head import Projection, States, causal_lm, from_logits

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

    Both hold the distributions of a few hundred positions at a time, as training does.

    Raises:
        StarDSSError: They differ, or the trainer's batches or outputs lack what the loss needs.
    """
    policy = trainer._policy(trainer.model)
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
    found, expected = [], []
    with torch.random.fork_rng(devices=devices), torch.no_grad():
        model.eval()
        try:
            active.metrics = type(metrics)()
            with trainer.compute_loss_context_manager():
                reference = _reference(active, trainer, batch, labels)
                with _head_watched(policy) as sharded_heads:
                    plain = _plain(active, trainer, policy, batch, reference)
                if any(sharded_heads) and not trainer._host_wants_loss_alone():
                    raise _unit_of_its_own(
                        "gives a wrong loss, with or without STAR-DSS, in trainers that read the "
                        "head's weight outside of its forward pass, as TRL's do"
                    )
                if active.reference.is_start and active.shaped == 0 == trainer.state.global_step:
                    _check_start(trainer, active, batch, plain.logps)
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
        finally:
            active.metrics = metrics
            model.train(was_training)
            _restore(trainer, host)
    scale = 1
    if trainer.args.average_tokens_across_devices:
        scale = trainer.accelerator.num_processes // trainer.get_tp_size()
    for given, shaped_loss in zip(found, expected, strict=True):
        # The auxiliary loss is a mean over each micro-batch and is not scaled.
        wanted = shaped_loss * scale + extra
        if not plain.close(given, wanted):
            raise not_in_effect(
                trainer,
                f"on one real row its compute_loss gives {given.item():.6f} where "
                f"loss_type={options.loss_type!r} gives {wanted.item():.6f}. Something replaces "
                "compute_loss or adds to it; remove it",
            )


@dataclass(frozen=True)
class _Plain:
    """What the model gives for one row, computed the plain way.

    Attributes:
        logps: (1, seq − 1): log π_θ(y_t), 0 where not trained.
        kl: (1, seq − 1): KL_t, where it is trained; None without a reference.
        half: Whether the model computes in 16 bits.
    """

    logps: Tensor
    kl: Tensor | None
    half: bool

    def close(self, one: Tensor, two: Tensor) -> bool:
        """Return whether two losses are equal up to the model's precision."""
        relative, absolute = (3e-2, 1e-2) if self.half else (1e-3, 1e-3)
        return torch.allclose(one, two, rtol=relative, atol=absolute)


_POSITIONS = 256
"""Positions whose distributions are held at once; training holds more."""


def _plain(
    active: StarDSSState,
    trainer: Any,
    policy: nn.Module,
    batch: Mapping[str, Any],
    reference: Tensor | States | None,
) -> _Plain:
    """Return log-probabilities and KL terms of a batch by their definitions."""
    labels = batch["labels"][:, 1:]
    trained = labels != IGNORE_INDEX

    def terms(rows: Tensor, project: Projection | None) -> tuple[Tensor, ...]:
        kept, targets = rows[:, :-1][trained], labels[trained]
        logps, kl = [], []
        for start in range(0, len(kept), _POSITIONS):
            part = slice(start, start + _POSITIONS)
            logits = kept[part] if project is None else project(kept[part])
            log_softmax = logits.float().log_softmax(-1)
            logps.append(log_softmax.gather(1, targets[part, None])[:, 0])
            if isinstance(reference, States):
                of_reference = project if active.reference.kind == "adapter" else reference.project
                held = reference.rows[:, :-1][trained][part]
                ref_logits = held if of_reference is None else of_reference(held)
                apart = log_softmax - ref_logits.float().log_softmax(-1)
                kl.append((log_softmax.exp() * apart).sum(-1))
        found = [
            _spread(torch.cat(values), trained) for values in ((logps, kl) if kl else (logps,))
        ]
        return *found, logits[:0].sum()  # its dtype is the model's

    *given, sample = from_logits(
        policy, batch, terms, project=active.projects, call=trainer.model_wrapped
    )
    logps = given[0]
    half = sample.dtype in (torch.bfloat16, torch.float16) or trainer.args.bf16 or trainer.args.fp16
    if logps.dtype in (torch.bfloat16, torch.float16):
        raise _unit_of_its_own("rounds log-probabilities to 16 bits")
    kl = given[1] if len(given) > 1 else None
    if isinstance(reference, Tensor):
        kl = kl_estimate(logps, reference, active.options.kl_estimator)
    return _Plain(logps, kl, half)


def _spread(values: Tensor, where: Tensor) -> Tensor:
    return values.new_zeros(where.shape).masked_scatter(where, values)


@contextlib.contextmanager
def _head_watched(policy: nn.Module) -> Iterator[list[bool]]:
    """Collect whether the head's weight is sharded when the backbone has been run."""
    causal, found = causal_lm(policy), []
    head = getattr(causal, "get_output_embeddings", lambda: None)()

    def keep(*_: Any) -> None:
        found.append(isinstance(getattr(head, "weight", None), DTensor))

    handle = getattr(causal, "base_model", causal).register_forward_hook(keep)
    try:
        yield found
    finally:
        handle.remove()


def _unit_of_its_own(why: str) -> ConfigError:
    return ConfigError(
        f"The model's head (lm_head) is an FSDP2 unit of its own, which {why}. Let "
        "fsdp_transformer_layer_cls_to_wrap name the decoder layer alone, in place of a "
        "size-based policy or of more classes."
    )


_WINDOW = 512
"""Tokens of a row on which the model's own loss, which needs all their logits, is looked at."""


def _base_beyond_cross_entropy(
    trainer: Any, active: StarDSSState, policy: nn.Module, batch: Mapping[str, Any], plain: _Plain
) -> Tensor:
    """Return what the base class's loss has beside cross-entropy: an auxiliary loss, or 0.

    Raises:
        StarDSSError: It is another loss.
    """
    auxiliary = _has_auxiliary_loss(trainer)
    length = batch["labels"].shape[1]
    if trainer._host_wants_loss_alone() and length > _WINDOW and not auxiliary:
        first = int((batch["labels"][0, 1:] != IGNORE_INDEX).nonzero()[0])
        part = slice(first, first + _WINDOW)
        batch = {name: batch[name][:1, part] for name in ("input_ids", "labels")}
        batch["attention_mask"] = torch.ones_like(batch["input_ids"])
        plain = _plain(active, trainer, policy, batch, None)
    base: Tensor = trainer.base_loss(trainer.model_wrapped, batch).float()
    trained = (batch["labels"][:, 1:] != IGNORE_INDEX).sum()
    cross_entropy: Tensor = -plain.logps.sum().float() / trained
    if auxiliary:
        return base - cross_entropy
    if not plain.close(base, cross_entropy):
        raise not_in_effect(
            trainer,
            f"it has a loss of its own ({base.item():.6f} on one real row, where "
            f"cross-entropy is {cross_entropy.item():.6f}), which STAR-DSS would replace. Use a "
            "trainer, and a loss_type of its own, that train with cross-entropy",
        )
    return torch.zeros_like(base)


def _check_start(
    trainer: Any, active: StarDSSState, batch: Mapping[str, Any], logps: Tensor
) -> None:
    """Check that the model is still the one whose log-probabilities are the reference."""
    labels = batch["labels"]
    weights = active.shaping.weights(batch[SCORES_COLUMN].float(), labels)
    held = weights.kl != 0
    apart = (logps - batch[REF_COLUMN][:, 1:])[held].abs().sum()
    mean = float(apart) / max(1, int(held.sum()))
    if mean > _MOVED:
        raise not_in_effect(
            trainer,
            "its model is not the one that the reference was made of when STAR-DSS was "
            f"set up (log-probabilities of one row are {mean:.2f} apart on average). Load weights "
            "and adapters before that",
        )


def _probes(labels: Tensor) -> list[Tensor]:
    """Return made-up scores, (batch, seq) each: real ones may all be 1, which is plain finetuning.

    Mixed scores, their opposites (so that no response ends safely in both), and all unsafe.
    """
    pattern = torch.tensor([0.0, 1.0, 0.75, 0.25], device=labels.device)
    mixed = pattern.repeat(labels.shape[1] // 4 + 1)[: labels.shape[1]].expand(labels.shape)
    return [mixed, 1 - mixed, torch.zeros_like(mixed)]


def _has_auxiliary_loss(trainer: Any) -> bool:
    """Return whether a load-balancing loss (mixture of experts) is part of the model's loss."""
    config = trainer._policy(trainer.model).config.get_text_config()
    return bool(getattr(config, "output_router_logits", False))


def _shortest_row(dataset: Any) -> Mapping[str, Any]:
    """Return the shortest of the first few rows with trained tokens: it takes the least memory.

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
) -> Tensor | States | None:
    """Return log π_ref, (1, seq − 1), or what the reference's distributions are made of."""
    kind = active.reference.kind
    if kind == "none":
        return None
    if kind == "precomputed":
        if REF_COLUMN not in batch:
            raise not_in_effect(
                trainer,
                f"its batches have no {REF_COLUMN!r}, the reference's log-probabilities. "
                "The data set was replaced after STAR-DSS was set up; give it to the trainer's "
                "constructor",
            )
        column: Tensor = batch[REF_COLUMN]
        return column[:, 1:]

    def function(rows: Tensor, project: Projection | None) -> Any:
        if active.needs_distributions:
            return States(rows, project.detached() if project else None)
        return token_logprobs(rows, labels, project)

    with trainer.accelerator.autocast():
        call = trainer.model_wrapped if active.sharded else None
        policy = trainer._policy(trainer.model)
        found: Tensor | States = active.reference.run(policy, batch, function, call=call)
        return found


_STEPS = "current_gradient_accumulation_steps"


def _snapshot(trainer: Any) -> Any:
    """Return what the check must leave as it was: TRL's metrics, the accumulation in progress."""
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
