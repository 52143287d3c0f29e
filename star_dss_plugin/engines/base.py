"""Define the interface of engines: next-token log-probabilities of label tokens after prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

__all__ = ["Engine", "Weights"]


class Engine(Protocol):
    """Compute the label log-probabilities from which a guard's verdict is read."""

    def label_logprobs(
        self, groups: Sequence[Sequence[Sequence[int]]], label_ids: Sequence[int]
    ) -> list[torch.Tensor]:
        """Return the next-token log-probabilities of the labels after each prompt.

        Args:
            groups: Prompts as token ids, each of length >= 1, grouped by the response that they are
                about. Prompts of one group share long prefixes; all groups share the guard's
                policy.
            label_ids: Token ids of the labels.

        Returns:
            Per group a float32 tensor on the CPU, shape (prompts, len(label_ids)): the log-softmax
            over the whole vocabulary at each prompt's last position, read at `label_ids`.
        """
        ...

    def close(self) -> None:
        """Free the memory and connections of the engine. It cannot be used afterwards."""
        ...


@dataclass(frozen=True)
class Weights:
    """Name the weights that an engine loads.

    Attributes:
        model: Hugging Face Hub id or folder.
        revision: Hub revision; None is the default branch.
        trust_remote_code: Whether code that comes with the model may run.
        dtype: Torch dtype that the weights are loaded in.
    """

    model: str
    revision: str | None
    trust_remote_code: bool
    dtype: torch.dtype
