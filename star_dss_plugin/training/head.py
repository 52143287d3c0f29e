"""Read logits at the LM head a few positions at a time, never as one (batch, seq, vocab) tensor.

A causal language model is a backbone, whose last hidden states are (batch, seq, hidden), and a
linear head. Only trained positions need logits, and only until their log-probability is known. So
for one call the head's `forward` is replaced by a function that projects hidden states in chunks
(`logprobs.py`). Because the head module itself is called, a sharded model (FSDP, DeepSpeed ZeRO-3)
gathers the head's weight for it, once per forward pass for all chunks, and again in the backward
pass.
"""

from __future__ import annotations

import contextlib
import inspect
import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from star_dss_plugin.data.columns import TOKEN_COLUMNS
from star_dss_plugin.errors import ConfigError
from star_dss_plugin.logprobs import Project

__all__ = [
    "Projection",
    "States",
    "apply_at_head",
    "apply_to_logits",
    "can_project",
    "capture_first_output",
    "causal_lm",
    "forward_inputs",
    "without_logits",
    "zero_loss",
]

logger = logging.getLogger(__name__)

T = TypeVar("T")


@dataclass(frozen=True)
class Projection:
    """Project hidden states to logits as the head of a causal language model does.

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
        """Return logits, (rows, vocab), of hidden states, (rows, hidden)."""
        logits = F.linear(rows.to(self.weight.device), self.weight, self.bias)
        if self.scale != 1:
            logits = logits * self.scale
        if self.softcap is not None:
            logits = torch.tanh(logits / self.softcap) * self.softcap
        return logits

    def detached(self) -> Projection:
        """Return the projection with the head's present weights and without gradients."""
        bias = None if self.bias is None else self.bias.detach()
        return replace(self, weight=self.weight.detach(), bias=bias)


@dataclass(frozen=True)
class States:
    """Hold hidden states with the projection that makes logits of them, or logits.

    Attributes:
        rows: Hidden states, (batch, seq, hidden), or logits, (batch, seq, vocab).
        project: Maps (n, hidden) to (n, vocab); None if `rows` are logits.
    """

    rows: Tensor
    project: Project | None = None


def forward_inputs(batch: Mapping[str, Any]) -> dict[str, Any]:
    """Return a batch without labels and STAR-DSS columns, for a forward pass without a loss."""
    columns = ("labels", "shift_labels", *TOKEN_COLUMNS)
    bare = {name: value for name, value in batch.items() if name not in columns}
    return {**bare, "use_cache": False}


@contextlib.contextmanager
def apply_at_head(
    model: nn.Module,
    function: Callable[[Tensor, Projection], T],
    *,
    condition: Callable[[Mapping[str, Any]], bool] = lambda kwargs: True,
) -> Iterator[list[T]]:
    """Apply a function to the last hidden states of each forward pass, inside the head's call.

    Args:
        model: A model for which `can_project` holds, without DDP's, FSDP1's or DeepSpeed's wrapper.
        function: Takes the last hidden states, (batch, seq, hidden), and the projection, and
            returns a tensor or a tuple of tensors.
        condition: Takes the model's keyword arguments; forward passes for which it returns False
            are left alone.

    Yields:
        A list that gets the function's result of each forward pass.
    """
    causal = causal_lm(model)
    head = causal.get_output_embeddings()
    shape = _shape_of_logits(causal.config.get_text_config())
    found: list[T] = []
    asked = [True]

    def before(_module: nn.Module, _args: Any, kwargs: dict[str, Any]) -> None:
        asked[0] = condition(kwargs)

    def after(_module: nn.Module, _args: Any, output: Any) -> None:
        if not asked[0]:
            return
        usual = head.__dict__.get("forward")
        head.forward = lambda rows: function(rows, Projection(head.weight, head.bias, *shape))
        try:
            found.append(head(output.last_hidden_state))
        finally:
            del head.__dict__["forward"]
            if usual is not None:
                head.forward = usual

    handles = [
        model.register_forward_pre_hook(before, with_kwargs=True),
        causal.base_model.register_forward_hook(after),
    ]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def apply_to_logits(
    model: nn.Module,
    batch: Mapping[str, Any],
    function: Callable[[Tensor, Projection | None], T],
    *,
    project: bool,
    call: nn.Module | None = None,
) -> T:
    """Run a model on a batch and return a function's result for its logits.

    Args:
        model: A causal language model, unwrapped.
        batch: `input_ids` and the other inputs of its forward pass; labels and scores are dropped.
        function: Called with hidden states and their projection, or with logits and None.
        project: Whether `can_project` holds for the model.
        call: The wrapped model, to be called instead of `model`; None: `model` is called.
    """
    inputs = forward_inputs(batch)
    run = model if call is None else call
    if not project:
        return function(run(**inputs).logits, None)
    with apply_at_head(model, function) as found:
        run(**inputs, logits_to_keep=1)
    return found[0]


@contextlib.contextmanager
def capture_first_output(model: nn.Module) -> Iterator[list[Any]]:
    """Yield a list that gets the output of the model's first call; it stays empty without one."""
    found: list[Any] = []

    def keep(_module: nn.Module, _args: Any, output: Any) -> None:
        if not found:
            found.append(output)

    handle = model.register_forward_hook(keep)
    try:
        yield found
    finally:
        handle.remove()


def zero_loss(output: Mapping[str, Any]) -> Tensor | float:
    """Return a zero that depends on all outputs of a model, to which FSDP1 attaches its hooks."""
    values = (value for value in output.values() if isinstance(value, Tensor))
    return sum((value.reshape(-1)[:0].sum() for value in values if value.requires_grad), 0.0)


@contextlib.contextmanager
def without_logits(model: nn.Module) -> Iterator[None]:
    """Skip logits and loss in a model's calls with labels; the loss returned is a constant zero.

    Raises:
        ConfigError: The model returns no logits, because something fuses the loss into it.
    """

    def before(_module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        kwargs = {k: v for k, v in kwargs.items() if k not in ("labels", "num_items_in_batch")}
        return args, {**kwargs, "use_cache": False, "logits_to_keep": 1}

    def after(_module: nn.Module, _args: Any, output: Any) -> Any:
        if output.logits is None:
            raise ConfigError(
                "The model's forward pass returned no logits although it was called without "
                "labels, so the loss cannot be weighted by token. Switch off what fuses the loss "
                "into the model (a kernel or a patch)."
            )
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
    """Return whether `Projection` reproduces a model's logits on a few tokens (to 1e-3).

    Args:
        model: The unwrapped model, which can be run (see `sharding.runnable`).
    """
    causal = causal_lm(model)
    backbone = getattr(causal, "base_model", causal)
    head: Any = getattr(causal, "get_output_embeddings", lambda: None)()
    # A head with an adapter, or a quantized one, computes more than one matrix product.
    plain = type(head) is nn.Linear and backbone is not causal
    if not plain or "logits_to_keep" not in inspect.signature(causal.forward).parameters:
        return False
    device = next(model.parameters()).device
    vocab = causal.config.get_text_config().vocab_size
    ids = torch.arange(1, 9, device=device).remainder(vocab)[None]
    training = model.training
    model.eval()
    try:
        with torch.no_grad(), apply_at_head(model, lambda rows, project: project(rows[0])) as found:
            logits = model(input_ids=ids, use_cache=False).logits
            same = len(found) == 1 and torch.allclose(
                found[0].float(), logits[0].float(), rtol=1e-3, atol=1e-3
            )
    except (AttributeError, TypeError, ValueError, RuntimeError) as error:
        logger.debug("The head of %s cannot be used by itself: %s", type(causal).__name__, error)
        return False
    finally:
        model.train(training)
    return same


def causal_lm(model: nn.Module) -> Any:
    """Return the language model under a PEFT wrapper."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]


def _shape_of_logits(config: Any) -> tuple[float, float | None]:
    """Return scale and soft cap of the logits from a model's configuration."""
    softcap = getattr(config, "final_logit_softcapping", None)
    for name in ("logit_scale", "output_multiplier", "lm_head_multiplier"):
        if (factor := getattr(config, name, None)) is not None:
            return float(factor), softcap
    if (divisor := getattr(config, "logits_scaling", None)) is not None:
        return 1 / float(divisor), softcap
    return 1.0, softcap
