"""Record the output of some decoder blocks, and skip the blocks above them."""

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
        GuardError: The decoder has no module list `layers`.
    """
    found = getattr(model.get_decoder(), "layers", None)
    if not isinstance(found, nn.ModuleList) or not len(found):
        raise GuardError(
            f"{type(model).__name__} keeps its blocks elsewhere than other decoders, so its states "
            "cannot be read. Use trajectory='exact'."
        )
    return found


@contextmanager
def recording(model: PreTrainedModel, indices: Sequence[int]) -> Iterator[dict[int, Tensor]]:
    """Yield a mapping that each forward pass fills: block index to output (rows, columns, size).

    Blocks above the highest wanted one do not run meanwhile, so the logits are meaningless.

    Args:
        model: A causal LM.
        indices: Block indices, from 0.
    """
    found: dict[int, Tensor] = {}
    blocks, decoder = blocks_of(model), model.get_decoder()
    with ExitStack() as stack:
        for index in indices:

            def keep(_: Any, __: Any, output: Any, index: int = index) -> None:
                found[index] = output[0] if isinstance(output, tuple) else output

            stack.callback(blocks[index].register_forward_hook(keep).remove)
        stack.callback(setattr, decoder, "layers", blocks)
        decoder.layers = blocks[: max(indices) + 1]
        yield found
