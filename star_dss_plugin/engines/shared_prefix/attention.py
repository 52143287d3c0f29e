"""Attention over keys that many rows share, without copying those keys to every row.

A row (a trunk behind the common head, or a tail behind its response's trunk) attends to two sets of
keys: a *prefix* that it shares with other rows, and its own tokens. Prefixes' keys and values are
stored once. How the attention is computed is for `Dense` or `BlockSparse` to say.

transformers calls it like any attention function, under the name `NAME`; what the rows share is in
the `Pass` that is current.
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

__all__ = ["NAME", "Attention", "KeysValues", "Pass", "Prefix", "running"]

NAME = "star_dss_shared_prefix"

KeysValues = dict[int, tuple[Tensor, Tensor]]
"""By layer: keys and values, each (rows, key-value heads, tokens, head size), rotated already."""


class Attention(Protocol):
    """A way to compute the attention of the R rows of a pass, T columns each."""

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
        """Attention of the last columns of all rows, (R, heads, columns, head size of values).

        Args:
            query: (R, heads, columns, head size).
            key: (R, key-value heads, T, head size): the rows' own.
            value: Likewise; its head size may differ.
            shared: Keys and values of each prefix, (1, key-value heads, tokens, head size).
            window: How many positions back a query sees, itself included; None for all.
            scale: Of the scores.
            softcap: Of the scores.
        """


@dataclass(frozen=True)
class Prefix:
    """What consecutive rows of a pass share.

    Attributes:
        parts: Stored keys and values, one after the other from position 0 on; each has one row.
        length: Tokens of all parts.
        depths: (rows,): how many of the first tokens each row sees.
    """

    parts: Sequence[KeysValues]
    length: int
    depths: Tensor

    def of_layer(self, layer: int) -> tuple[Tensor, Tensor]:
        """Keys and values of all parts."""
        keys, values = zip(*(part[layer] for part in self.parts), strict=True)
        return torch.cat(keys, dim=2), torch.cat(values, dim=2)


@dataclass
class Pass:
    """One forward pass over rows of T tokens.

    Attributes:
        positions: (rows, T): of each token in its own sequence.
        real: (rows, T), bool: False on padding.
        prefixes: What the rows share, in their order; empty if they start at position 0.
        kept: Where the pass's own keys and values are stored, or None.
        last_layer: The layer that only the last column of is read, or None: its queries in other
            columns are not computed, and what it returns there means nothing.
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
        """How it is computed; what all layers have in common is kept."""
        depths = [prefix.depths for prefix in self.prefixes]
        rows = [len(depth) for depth in depths]
        if self.block_sparse:
            lengths = [prefix.length for prefix in self.prefixes]
            return BlockSparse.of(self.positions, self.real, rows, depths, lengths)
        return Dense(self.positions, self.real, rows, depths)


_current: ContextVar[Pass] = ContextVar("star_dss_pass")


@contextmanager
def running(config: Any, current: Pass) -> Iterator[None]:
    """Makes a model with this config attend as `current` says; restores its own attention."""
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
    """Transformers' attention interface.

    Args:
        module: The attention layer.
        query: (rows, heads, T, head size).
        key: (rows, key-value heads, T, head size).
        value: Likewise; its head size may differ.
        attention_mask: Not used: the current pass knows what is seen.
        scaling: Of the scores.
        sliding_window: Of this layer.
        softcap: Of the scores.
        s_aux: Attention sinks, which this does not know.

    Returns:
        (rows, T, heads, head size), and no weights.
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
