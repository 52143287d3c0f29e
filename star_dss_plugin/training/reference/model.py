"""Run the reference model π_ref: the aligned model before finetuning, frozen (paper, Eq. 3).

k1, k2 and k3 need one log-probability per token of it. These are computed once before the first
step and kept in a column, so that a step costs what a step of plain finetuning costs. `full` needs
the whole distribution at every step: a LoRA run switches its adapter off for it, other runs keep a
frozen copy.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from star_dss_plugin.errors import StarDSSError
from star_dss_plugin.training.head import Projection, apply_to_logits

__all__ = ["Reference", "adapter_off"]

T = TypeVar("T")


@dataclass
class Reference:
    """Describe how a run computes π_ref, and run it.

    Attributes:
        kind: "none"; "precomputed" (a column of log-probabilities); "adapter" (the policy with its
            adapter switched off); "copy" (the policy with a frozen copy of its trained parameters);
            or "model" (a separate frozen model).
        description: Description for the start-up line.
        model: The frozen model of kind "model"; of kind "precomputed" the named model to compute
            with, or None for the policy as it starts.
        fingerprint: Of kind "precomputed": identifies the reference's weights.
        starting: Of kind "copy": the trained parameters' values at the start, by name.
        projects: Whether its logits are computed a few positions at a time.
        is_start: Of kind "precomputed": whether the reference is the policy as it starts.
    """

    kind: str
    description: str
    model: nn.Module | None = None
    fingerprint: str | None = None
    starting: dict[str, Tensor] | None = None
    projects: bool = False
    is_start: bool = False

    @contextlib.contextmanager
    def active(self, policy: nn.Module) -> Iterator[nn.Module]:
        """Yield the reference as a module to call, in eval mode and without gradients.

        Args:
            policy: The trained model, unwrapped.
        """
        with torch.no_grad():
            if self.kind == "model":
                assert self.model is not None
                yield self.model
                return
            training = policy.training
            policy.eval()  # dropout and NEFTune noise are not part of the reference
            try:
                with self._as_it_was(policy):
                    yield policy
            finally:
                policy.train(training)

    def _as_it_was(self, policy: nn.Module) -> contextlib.AbstractContextManager[Any]:
        if self.kind == "adapter":
            return adapter_off(policy)
        assert self.starting is not None
        return _with_values(policy, self.starting)

    def run(
        self,
        policy: nn.Module,
        batch: Mapping[str, Any],
        function: Callable[[Tensor, Projection | None], T],
        *,
        call: nn.Module | None = None,
    ) -> T:
        """Run the reference on a batch without gradients, and a function on its logits.

        Args:
            policy: The trained model, unwrapped.
            batch: `input_ids` and the other inputs of the forward pass.
            function: Called with hidden states and their projection, or with logits and None.
            call: The wrapped policy if it is sharded, to be called instead of `policy`.
        """
        with self.active(policy) as model:
            wrapped = call if model is policy else None
            return apply_to_logits(model, batch, function, project=self.projects, call=wrapped)


@contextlib.contextmanager
def adapter_off(policy: nn.Module) -> Iterator[None]:
    """Switch a PEFT model's adapter off for a while, and restore every `requires_grad` afterwards.

    PEFT makes all parameters of an active adapter trainable when it switches the adapter on again.
    """
    trained = [(parameter, parameter.requires_grad) for parameter in policy.parameters()]
    try:
        with policy.disable_adapter():  # type: ignore[operator]
            yield
    finally:
        for parameter, was in trained:
            if parameter.requires_grad != was:
                parameter.requires_grad_(was)


@contextlib.contextmanager
def _with_values(policy: nn.Module, values: Mapping[str, Tensor]) -> Iterator[None]:
    """Swap the data of parameters for other values for a while; the swap copies no data.

    Raises:
        StarDSSError: A parameter became trainable after set-up, or one of `values` is gone.
    """
    parameters = dict(policy.named_parameters())
    moving = [n for n, p in parameters.items() if p.requires_grad and n not in values]
    if moving:
        raise StarDSSError(
            f"{moving[0]} and {len(moving) - 1} other parameters became trainable after STAR-DSS "
            "was set up, so their values at the start, which the reference needs, are gone. Make "
            "all of them trainable before, or set reference='precomputed'."
        )
    if gone := [name for name in values if name not in parameters]:
        raise StarDSSError(
            f"The model is another one than STAR-DSS was set up with: it lacks {gone[0]} and "
            f"{len(gone) - 1} other trained parameters, whose values at the start are the "
            "reference. Give the trainer's constructor the model that is to be trained."
        )
    held = {name: parameters[name].data for name in values}
    try:
        for name, value in values.items():
            parameter = parameters[name]
            parameter.data = value.to(parameter.device, parameter.dtype)
        torch.clear_autocast_cache()  # its keys are parameters, whatever their values
        yield
    finally:
        for name, data in held.items():
            parameters[name].data = data
        torch.clear_autocast_cache()
