"""Build the inputs of forward passes whose rows continue cached prefixes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby

import torch
from torch import Tensor

from star_dss_plugin.engines.padding import padded
from star_dss_plugin.engines.shared_prefix.attention import KeysValues, Pass, Prefix
from star_dss_plugin.engines.shared_prefix.tree import Tail

__all__ = ["first_tokens", "rows_after", "tails_after"]


def rows_after(
    rows: Sequence[Sequence[int]],
    head_length: int,
    head: KeysValues,
    device: torch.device,
    kept: KeysValues | None = None,
) -> tuple[Tensor, Pass]:
    """Return token ids, (rows, longest), and the pass of rows that all follow one head.

    Args:
        rows: Token ids after the head.
        head_length: Number of the head's tokens.
        head: The head's keys and values; empty if there is no head.
        device: The model's device.
        kept: Receives the keys and values of the rows.
    """
    ids, real = padded(rows, device)
    positions = (head_length + torch.arange(ids.shape[1], device=device)).expand_as(ids)
    depths = torch.full((len(rows),), head_length, device=device)
    prefixes = [Prefix([head], head_length, depths)] if head else []
    return ids, Pass(positions, real, prefixes, kept)


def tails_after(
    batch: Sequence[Tail],
    head_length: int,
    head: KeysValues,
    trunks: Mapping[int, KeysValues],
    device: torch.device,
) -> tuple[Tensor, Pass]:
    """Return token ids, (tails, longest), and the pass of tails that follow head and trunk.

    Tails are padded on the left, so that all end in the last column.

    Args:
        batch: Tails; those of one group are adjacent.
        head_length: Number of the head's tokens.
        head: The head's keys and values; empty if there is no head.
        trunks: For each group the keys and values of its trunk after the head.
        device: The model's device.
    """
    ids, real = padded([tail.tokens for tail in batch], device, left=True)
    shared = torch.tensor([[tail.shared] for tail in batch], device=device)
    column = torch.arange(ids.shape[1], device=device)
    # Padding is masked, but learned position embeddings have no negative index.
    positions = (shared + column - ids.shape[1] + real.sum(1, keepdim=True)).clamp(min=0)
    prefixes: list[Prefix] = []
    if any(tail.shared for tail in batch):
        first = 0
        for group, of_group in groupby(batch, key=lambda tail: tail.group):
            depths = [tail.shared for tail in of_group]
            parts = [head] if head else []
            if trunk := trunks[group]:
                parts.append(first_tokens(trunk, max(depths) - head_length))
            rows = slice(first, first + len(depths))
            prefixes.append(Prefix(parts, max(depths), shared[rows, 0]))
            first += len(depths)
    return ids, Pass(positions, real, prefixes)


def first_tokens(part: KeysValues, tokens: int, row: int = 0) -> KeysValues:
    """Return views of the keys and values of the first `tokens` tokens of one row."""
    rows = slice(row, row + 1)
    return {layer: (k[rows, :, :tokens], v[rows, :, :tokens]) for layer, (k, v) in part.items()}
