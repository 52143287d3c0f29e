"""Leave out last-layer work whose output is not read, and run float32 linear layers by oneDNN."""

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
    """Restrict the last decoder layer to the last column, where only that column is read.

    After attention, the output projection and the MLP work on each position by itself. The keys and
    values of all columns are still computed. The layer's output in other columns is undefined.

    Attributes:
        index: `layer_idx` of the layer's attention; None if the whole layer runs.
        parts: Modules that run on the last column only.
    """

    index: int | None = None
    parts: tuple[nn.Module, ...] = ()

    @classmethod
    def from_model(cls, model: PreTrainedModel) -> LastLayer:
        """Find projection and MLP in a model's last layer; without them, the whole layer runs."""
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
        """Run the parts on the last column only; their result is broadcast to all columns."""
        with ExitStack() as stack:
            for part in self.parts:
                stack.callback(part.register_forward_pre_hook(_last_column).remove)
            yield


def _last_column(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (inputs[0][:, -1:], *inputs[1:])


class OneDnnLinear(TorchFunctionMode):
    """Compute float32 linear layers on x86 CPUs with oneDNN while active.

    PyTorch uses MKL for them, which does not use all instructions of other makers' processors.
    oneDNN, which every x86 build of PyTorch includes, was faster on an AMD EPYC at every size that
    was tried. Results differ by rounding. Other tensors take PyTorch's usual path.
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
    """Compute `torch.nn.functional.linear` by oneDNN; return None for unsupported tensors."""
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
