"""Work that a forward pass does and nobody reads, and faster kernels for the rest."""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel

__all__ = ["LastLayer", "OneDnnLinear"]


@dataclass(frozen=True)
class LastLayer:
    """What of the last decoder layer can be left out where only the last column is read.

    What follows attention there, its output projection and the MLP, works on each position by
    itself; the keys and values of all columns are needed. Behind this layer the hidden states of
    the other columns mean nothing.

    Attributes:
        index: Of the layer, as its attention names it; None where nothing is left out.
        parts: Modules that need to see the last column only.
    """

    index: int | None = None
    parts: tuple[nn.Module, ...] = ()

    @classmethod
    def of(cls, model: PreTrainedModel) -> LastLayer:
        """That of a model which is built like most; for others, nothing is left out."""
        layers = getattr(model.get_decoder(), "layers", None)
        if not isinstance(layers, nn.ModuleList) or not len(layers):
            return cls()
        attention = getattr(layers[-1], "self_attn", None)
        index = getattr(attention, "layer_idx", None)
        projection, mlp = getattr(attention, "o_proj", None), getattr(layers[-1], "mlp", None)
        if index is None or projection is None or mlp is None:
            return cls()
        return cls(index, (projection, mlp))

    @contextmanager
    def only_last_column(self) -> Iterator[None]:
        """Within it, the parts see the last column; their result is added to all of them."""
        with ExitStack() as stack:
            for part in self.parts:
                stack.callback(part.register_forward_pre_hook(_last_column).remove)
            yield


def _last_column(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (inputs[0][:, -1:], *inputs[1:])


class OneDnnLinear(TorchFunctionMode):
    """Within it, float32 linear layers on an x86 CPU are computed by oneDNN.

    PyTorch gives them to MKL, which does not use all of what processors of other makers can do;
    oneDNN, which every build for these machines has too, was faster on an AMD EPYC at every size
    that was tried. Results differ by rounding. Other tensors go their usual way.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func is nn.functional.linear and _USABLE:
            served = _onednn(*args, **(kwargs or {}))
            if served is not None:
                return served
        return func(*args, **(kwargs or {}))


_USABLE = (
    platform.machine() in {"x86_64", "AMD64"}
    and torch.backends.mkldnn.is_available()
    and hasattr(torch.ops.mkldnn, "_linear_pointwise")
)


def _onednn(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor | None:
    """`torch.nn.functional.linear`, or None where it is not ours to compute."""
    plain = weight.dim() == 2 and all(
        type(tensor) in {Tensor, nn.Parameter}
        and tensor.dtype == torch.float32
        and tensor.device.type == "cpu"
        and tensor.layout == torch.strided
        for tensor in (input, weight)
    )
    wanted = torch.backends.mkldnn.enabled and not torch.is_grad_enabled()
    if not plain or not wanted or input.numel() == 0:
        return None
    found: Tensor = torch.ops.mkldnn._linear_pointwise(
        input.contiguous(), weight, bias, "none", [], ""
    )
    return found
