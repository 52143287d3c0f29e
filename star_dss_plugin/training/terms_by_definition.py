"""Compute log-probabilities and KL terms of one row by their definitions, for the loss check."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from star_dss_plugin.data.columns import REF_COLUMN
from star_dss_plugin.errors import ConfigError, StarDSSError
from star_dss_plugin.logprobs import IGNORE_INDEX, kl_estimate, token_logprobs
from star_dss_plugin.training.head import Projection, States, apply_to_logits, causal_lm
from star_dss_plugin.training.policy import policy_of

if TYPE_CHECKING:
    from star_dss_plugin.training.state import StarDSSState

__all__ = [
    "TermsByDefinition",
    "loss_not_used_error",
    "reference_of",
    "separate_head_error",
    "terms_by_definition",
    "watch_sharded_head",
]


def loss_not_used_error(trainer: Any, reason: str) -> StarDSSError:
    """Return the error for a trainer that would train with another loss, and why."""
    return StarDSSError(
        f"Training was stopped before the weights changed: the STAR-DSS loss is not the one that "
        f"{type(trainer).__name__} would train with: {reason}."
    )


@dataclass(frozen=True)
class TermsByDefinition:
    """Hold log-probabilities and KL terms of one row, computed by their definitions.

    Attributes:
        logps: log π_θ(y_t), (1, seq − 1), 0 where not trained.
        kl: KL_t, (1, seq − 1), meaningful where trained; None without a reference.
        half: Whether the model computes in 16 bits.
    """

    logps: Tensor
    kl: Tensor | None
    half: bool

    def close(self, one: Tensor, two: Tensor) -> bool:
        """Return whether two losses are equal up to the model's rounding."""
        relative, absolute = (3e-2, 1e-2) if self.half else (1e-3, 1e-3)
        return torch.allclose(one, two, rtol=relative, atol=absolute)


_POSITIONS = 256
"""Positions whose logits are held at once, fewer than in training."""


def terms_by_definition(
    active: StarDSSState,
    trainer: Any,
    policy: nn.Module,
    batch: Mapping[str, Any],
    reference: Tensor | States | None,
) -> TermsByDefinition:
    """Return log-probabilities and KL terms of a batch by their definitions.

    Args:
        active: The trainer's `star_dss_state`.
        trainer: The trainer.
        policy: The trained model, unwrapped.
        batch: One row.
        reference: Of `reference_of`; None: no KL terms.

    Raises:
        ConfigError: FSDP2 shards the LM head as a unit of its own, which rounds to 16 bits.
    """
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

    *given, sample = apply_to_logits(
        policy, batch, terms, project=active.projects, call=trainer.model_wrapped
    )
    logps = given[0]
    half = sample.dtype in (torch.bfloat16, torch.float16) or trainer.args.bf16 or trainer.args.fp16
    if logps.dtype in (torch.bfloat16, torch.float16):
        raise separate_head_error("rounds log-probabilities to 16 bits")
    kl = given[1] if len(given) > 1 else None
    if isinstance(reference, Tensor):
        kl = kl_estimate(logps, reference, active.options.kl_estimator)
    return TermsByDefinition(logps, kl, half)


def _spread(values: Tensor, where: Tensor) -> Tensor:
    return values.new_zeros(where.shape).masked_scatter(where, values)


def reference_of(
    active: StarDSSState, trainer: Any, batch: Mapping[str, Any], labels: Tensor
) -> Tensor | States | None:
    """Return log π_ref(y_t), (1, seq − 1), or with `full` the reference's `States`.

    Raises:
        StarDSSError: The reference is precomputed, and the batch lacks its column.
    """
    kind = active.reference.kind
    if kind == "none":
        return None
    if kind == "precomputed":
        if REF_COLUMN not in batch:
            raise loss_not_used_error(
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
        policy = policy_of(trainer, trainer.model)
        found: Tensor | States = active.reference.run(policy, batch, function, call=call)
        return found


@contextlib.contextmanager
def watch_sharded_head(policy: nn.Module) -> Iterator[list[bool]]:
    """Yield a list that gets, after each run of the backbone, whether the head is still sharded.

    It is if FSDP2 wraps the head as a unit of its own.
    """
    causal, found = causal_lm(policy), []
    head = getattr(causal, "get_output_embeddings", lambda: None)()

    def keep(*_: Any) -> None:
        found.append(isinstance(getattr(head, "weight", None), DTensor))

    handle = getattr(causal, "base_model", causal).register_forward_hook(keep)
    try:
        yield found
    finally:
        handle.remove()


def separate_head_error(reason: str) -> ConfigError:
    """Return the error for an LM head that is an FSDP2 unit of its own; `reason`: what fails."""
    return ConfigError(
        f"The model's head (lm_head) is an FSDP2 unit of its own, which {reason}. Let "
        "fsdp_transformer_layer_cls_to_wrap name the decoder layer alone, in place of a "
        "size-based policy or of more classes."
    )
