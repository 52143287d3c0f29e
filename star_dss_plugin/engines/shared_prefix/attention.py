"""Compute attention over keys that many rows share, without copying those keys to every row.

A row (a trunk after the common head, or a tail after its response's trunk) attends to two sets of
keys: those of a *prefix* that it shares with other rows, and those of its own tokens. The keys and
values of a prefix are stored once. `Dense` and `BlockSparse` compute the attention.

transformers calls this module as an attention implementation, under the name `NAME`. The current
`Pass` holds the prefixes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import AttentionInterface

from star_dss_plugin.engines.shared_prefix.dense import Dense
from star_dss_plugin.engines.shared_prefix.flex import BlockSparse

__all__ = ["NAME", "Attention", "KeysValues", "Pass", "Prefix", "pass_running"]

NAME = "star_dss_shared_prefix"

KeysValues = dict[int, tuple[Tensor, Tensor]]
"""Maps a layer to its keys and values, each (rows, key-value heads, tokens, head size), with rotary
embedding applied.
"""


class Attention(Protocol):
    """Compute the attention of the R rows of a pass, with T columns each."""

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        shared: Sequence[tuple[Tensor, Tensor]],
        window: int | None,
        scale: float,
        softcap: float | None,
    ) -> Tensor:
        """Return the attention of all rows in the last columns of `query`.

        Args:
            query: (R, heads, columns, head size).
            key: (R, key-value heads, T, head size): the keys of the rows' own tokens.
            value: Like `key`; the head size may differ.
            shared: For each prefix, keys and values, each (1, key-value heads, tokens, head size).
            window: Number of positions that a query sees, itself included; None for all.
            scale: Factor of the attention scores.
            softcap: Bound of the tanh soft-capping of the scores; None for no capping.

        Returns:
            (R, heads, columns, head size of values).
        """


@dataclass(frozen=True)
class Prefix:
    """Hold the cached tokens that consecutive rows of a pass share.

    Attributes:
        parts: Keys and values of head and trunk, one row each, consecutive from position 0 on.
        length: Number of tokens in all parts.
        depths: (rows,), how many of these tokens, from the first on, each row sees.
    """

    parts: Sequence[KeysValues]
    length: int
    depths: Tensor

    def of_layer(self, layer: int) -> tuple[Tensor, Tensor]:
        """Return the keys and values of one layer, joined over all parts."""
        keys, values = zip(*(part[layer] for part in self.parts), strict=True)
        return torch.cat(keys, dim=2), torch.cat(values, dim=2)


@dataclass
class Pass:
    """Describe one forward pass over rows of T tokens.

    Attributes:
        positions: (rows, T), position of each token in its own sequence.
        real: (rows, T), bool: False on padding.
        prefixes: The shared prefixes in the order of their rows; empty if rows start at position 0.
        kept: Receives the keys and values of this pass, or None.
        last_layer: Index of the layer whose output is read in the last column only, or None. It
            computes no attention for other columns, where its output is undefined.
        block_sparse: Whether one block-sparse kernel computes the attention.
    """

    positions: Tensor
    real: Tensor
    prefixes: Sequence[Prefix] = ()
    kept: KeysValues | None = None
    last_layer: int | None = None
    block_sparse: bool = False

    @cached_property
    def attention(self) -> Attention:
        """Build the attention of this pass once, so that all layers share its masks."""
        depths = [prefix.depths for prefix in self.prefixes]
        rows = [len(depth) for depth in depths]
        if self.block_sparse:
            lengths = [prefix.length for prefix in self.prefixes]
            return BlockSparse.from_rows(self.positions, self.real, rows, depths, lengths)
        return Dense(self.positions, self.real, rows, depths)


_current: ContextVar[Pass] = ContextVar("star_dss_pass")


@contextmanager
def pass_running(config: Any, current: Pass) -> Iterator[None]:
    """Route a model's attention through `current` and restore its own attention afterwards."""
    own = config._attn_implementation
    token = _current.set(current)
    config._attn_implementation = NAME
    try:
        yield
    finally:
        config._attn_implementation = own
        _current.reset(token)


def _attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Compute attention with the current pass, as transformers' `AttentionInterface` requires.

    Args:
        module: The attention layer.
        query: (rows, heads, T, head size).
        key: (rows, key-value heads, T, head size).
        value: Like `key`; the head size may differ.
        attention_mask: Not used; the current pass holds the masks.
        scaling: Factor of the attention scores; None is 1 / sqrt(head size).
        sliding_window: Window of this layer, in positions.
        softcap: Bound of the tanh soft-capping of the scores.
        s_aux: Attention sinks, which are not supported.

    Returns:
        (rows, T, heads, head size), and None in place of attention weights.
    """
    if s_aux is not None:
        raise NotImplementedError("attention sinks")
    types = getattr(getattr(module, "config", None), "layer_types", None) or ()
    if sliding_window is None and "sliding_attention" in types[module.layer_idx :][:1]:
        raise NotImplementedError("a sliding window that only the mask knows")
    current = _current.get()
    layer, length = module.layer_idx, query.shape[2]
    if current.kept is not None:
        current.kept[layer] = (key, value)
    if layer == current.last_layer:
        query = query[:, :, -1:]
    shared = [prefix.of_layer(layer) for prefix in current.prefixes]
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    out = current.attention.attend(query, key, value, shared, sliding_window, scale, softcap)
    return out.transpose(1, 2).expand(-1, length, -1, -1).contiguous(), None


AttentionInterface.register(NAME, _attention)
