"""Logits a few positions at a time: what a step needs of them, without (batch, seq, vocab).

A causal language model is a backbone, whose last hidden states are (batch, seq, hidden), and a
linear head. Only trained positions need logits, and only until their log-probability is known, so
the model is run without its head and the head's part is done in chunks (`logprobs.py`).
"""

from __future__ import annotations

import contextlib
import inspect
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from star_dss_plugin.data.columns import TOKEN_COLUMNS
from star_dss_plugin.logprobs import Project

__all__ = [
    "Projection",
    "States",
    "can_project",
    "first_output",
    "forward_inputs",
    "hidden_states",
    "states_of",
    "without_logits",
]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Projection:
    """The head of a causal language model: hidden states to logits, as the model computes them.

    Attributes:
        weight: (vocab, hidden).
        bias: (vocab,) or None.
        scale: Factor of the logits (Cohere, Granite, Falcon-H1, …).
        softcap: c of c · tanh(logits / c) (Gemma); None: no cap.
    """

    weight: Tensor
    bias: Tensor | None
    scale: float
    softcap: float | None

    def __call__(self, rows: Tensor) -> Tensor:
        """Logits, (rows, vocab), of hidden states, (rows, hidden)."""
        logits = F.linear(rows.to(self.weight.device), self.weight, self.bias)
        if self.scale != 1:
            logits = logits * self.scale
        if self.softcap is not None:
            logits = torch.tanh(logits / self.softcap) * self.softcap
        return logits

    @classmethod
    def of(cls, model: nn.Module) -> Projection:
        """The head of an unwrapped model for which `can_project` holds."""
        causal = _causal_lm(model)
        head, config = causal.get_output_embeddings(), causal.config.get_text_config()
        return cls(head.weight, head.bias, *_shape_of_logits(config))


@dataclass(frozen=True)
class States:
    """What logits are made of: hidden states and their projection, or the logits themselves.

    Attributes:
        rows: (batch, seq, hidden) or, without a projection, (batch, seq, vocab).
        project: (n, hidden) to (n, vocab); None if the rows are logits.
    """

    rows: Tensor
    project: Project | None = None


def forward_inputs(batch: Mapping[str, Any]) -> dict[str, Any]:
    """What a model takes of a batch to return logits, and no loss."""
    columns = ("labels", *TOKEN_COLUMNS)
    bare = {name: value for name, value in batch.items() if name not in columns}
    return {**bare, "use_cache": False}


def states_of(model: nn.Module, batch: Mapping[str, Any], *, project: bool) -> States:
    """Runs an unwrapped model, whose head is then used without gradients.

    Args:
        model: A causal language model.
        batch: `input_ids` and what else its forward pass takes; labels and scores are left out.
        project: Whether `can_project` holds for it.
    """
    inputs = forward_inputs(batch)
    if not project:
        return States(model(**inputs).logits)
    with hidden_states(model) as found:
        model(**inputs, logits_to_keep=1)
    head = Projection.of(model)
    # The tensors of now: a parameter may hold the reference's values for this pass only.
    bias = None if head.bias is None else head.bias.detach()
    return States(found[0], replace(head, weight=head.weight.detach(), bias=bias))


@contextlib.contextmanager
def first_output(model: nn.Module) -> Iterator[list[Any]]:
    """Collects what a model returns when it is first called; an empty list if it never is."""
    found: list[Any] = []

    def keep(_module: nn.Module, _args: Any, output: Any) -> None:
        if not found:
            found.append(output)

    handle = model.register_forward_hook(keep)
    try:
        yield found
    finally:
        handle.remove()


@contextlib.contextmanager
def hidden_states(model: nn.Module) -> Iterator[list[Tensor]]:
    """Collects the last hidden states of each forward pass of an unwrapped model."""
    found: list[Tensor] = []

    def keep(_module: nn.Module, _args: Any, output: Any) -> None:
        found.append(output.last_hidden_state)

    handle = _causal_lm(model).base_model.register_forward_hook(keep)
    try:
        yield found
    finally:
        handle.remove()


@contextlib.contextmanager
def without_logits(model: nn.Module) -> Iterator[None]:
    """Lets a trainer call a model with labels without computing its logits and its loss.

    What it gets as the loss is a zero that has no gradient.
    """

    def before(_module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        kwargs = {k: v for k, v in kwargs.items() if k not in ("labels", "num_items_in_batch")}
        return args, {**kwargs, "use_cache": False, "logits_to_keep": 1}

    def after(_module: nn.Module, _args: Any, output: Any) -> Any:
        output["loss"] = output.logits.new_zeros(())
        return output

    handles = [
        model.register_forward_pre_hook(before, with_kwargs=True),
        model.register_forward_hook(after),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def can_project(model: nn.Module) -> bool:
    """Whether `Projection` gives the very logits of a model: tried on a few tokens.

    Args:
        model: Unwrapped.
    """
    causal = _causal_lm(model)
    backbone = getattr(causal, "base_model", causal)
    head: Any = getattr(causal, "get_output_embeddings", lambda: None)()
    # Adapters on the head, quantized and sharded heads compute something else than one product.
    plain = type(head) is nn.Linear and backbone is not causal
    if not plain or "logits_to_keep" not in inspect.signature(causal.forward).parameters:
        return False
    device = next(model.parameters()).device
    ids = torch.arange(1, 9, device=device).remainder(head.weight.shape[0])[None]
    training = model.training
    model.eval()
    try:
        with torch.no_grad(), hidden_states(model) as found:
            logits = model(input_ids=ids, use_cache=False).logits
            same = len(found) == 1 and torch.allclose(
                Projection.of(model)(found[0][0]).float(), logits[0].float(), rtol=1e-3, atol=1e-3
            )
    except (AttributeError, TypeError, ValueError, RuntimeError) as error:
        logger.debug("The head of %s cannot be used by itself: %s", type(causal).__name__, error)
        return False
    finally:
        model.train(training)
    return same


def _causal_lm(model: nn.Module) -> Any:
    """The language model under a PEFT wrapper."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]


def _shape_of_logits(config: Any) -> tuple[float, float | None]:
    """Scale and soft cap by the names that model configurations have for them."""
    softcap = getattr(config, "final_logit_softcapping", None)
    for name in ("logit_scale", "output_multiplier", "lm_head_multiplier"):
        if (factor := getattr(config, name, None)) is not None:
            return float(factor), softcap
    if (divisor := getattr(config, "logits_scaling", None)) is not None:
        return 1 / float(divisor), softcap
    return 1.0, softcap
