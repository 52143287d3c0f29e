"""Pad token sequences to batches."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["padded"]


def padded(
    rows: Sequence[Sequence[int]], device: torch.device, *, left: bool = False
) -> tuple[Tensor, Tensor]:
    """Return padded token ids and a mask that is False on padding, both (rows, longest)."""
    longest = max(map(len, rows))
    ids = torch.zeros(len(rows), longest, dtype=torch.long, device="cpu")
    real = torch.zeros(len(rows), longest, dtype=torch.bool, device="cpu")
    for i, tokens in enumerate(rows):
        where = slice(longest - len(tokens), longest) if left else slice(0, len(tokens))
        ids[i, where] = torch.tensor(tokens, dtype=torch.long, device="cpu")
        real[i, where] = True
    return ids.to(device), real.to(device)
