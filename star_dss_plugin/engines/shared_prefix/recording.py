"""Record hidden states behind some blocks of a decoder, and leave out the blocks above them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from star_dss_plugin.errors import GuardError

__all__ = ["blocks_of", "recording"]


def blocks_of(model: PreTrainedModel) -> nn.ModuleList:
    """Return a decoder's blocks, in the order in which they run.

    Raises:
        GuardError: The model has no such list.
    """
    found = getattr(model.get_decoder(), "layers", None)
    if not isinstance(found, nn.ModuleList) or not len(found):
        raise GuardError(
            f"{type(model).__name__} keeps its blocks elsewhere than other decoders, so its states "
            "cannot be read. Use trajectory='exact'."
        )
    return found


@contextmanager
def recording(model: PreTrainedModel, wanted: Sequence[int]) -> Iterator[dict[int, Tensor]]:
    """Fill a mapping with the states behind blocks, (rows, columns, size), in each pass.

    Blocks above the last wanted one do not run meanwhile, so logits mean nothing.

    Args:
        model: A causal LM.
        wanted: Numbers of blocks, from 0.
    """
    found: dict[int, Tensor] = {}
    blocks, decoder = blocks_of(model), model.get_decoder()
    with ExitStack() as stack:
        for index in wanted:

            def keep(_: Any, __: Any, output: Any, index: int = index) -> None:
                found[index] = output[0] if isinstance(output, tuple) else output

            stack.callback(blocks[index].register_forward_hook(keep).remove)
        stack.callback(setattr, decoder, "layers", blocks)
        decoder.layers = blocks[: max(wanted) + 1]
        yield found
