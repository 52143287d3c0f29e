"""What an engine computes: next-token log-probabilities of a few tokens after many prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

__all__ = ["Engine", "Weights"]


class Engine(Protocol):
    """Computes what a guard's verdict is read from."""

    def label_logprobs(
        self, groups: Sequence[Sequence[Sequence[int]]], label_ids: Sequence[int]
    ) -> list[torch.Tensor]:
        """Next-token log-probabilities after each prompt.

        Args:
            groups: Prompts as token ids, each of length >= 1, grouped by the response they are
                about: those of a group share long prefixes, all groups share the guard's policy.
            label_ids: The token ids that are asked for.

        Returns:
            For each group float32 on the CPU, shape (prompts, len(label_ids)): the log-softmax over
            the whole vocabulary at each prompt's last position, read at `label_ids`.
        """
        ...

    def close(self) -> None:
        """Frees what the engine holds; it is not used again."""
        ...


@dataclass(frozen=True)
class Weights:
    """Which weights an engine computes with.

    Attributes:
        model: Hub id or folder.
        revision: Hub revision.
        trust_remote_code: Whether code that comes with the model may run.
        dtype: Of the weights.
    """

    model: str
    revision: str | None
    trust_remote_code: bool
    dtype: torch.dtype
