"""Attention over keys that many rows share, without copying those keys to every row.

A row (a trunk behind the common head, or a tail behind its response's trunk) attends to two sets of
keys: a *prefix* that it shares with other rows, and its own tokens. The two are computed apart and
merged by their log-sum-exps, which is exactly the softmax over both. So the prefix's keys and
values are stored once, and no mask over all tokens against all tokens is ever built.

transformers calls it like any attention function, under the name `NAME`; what the rows share is in
the `Pass` that is current.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface

__all__ = ["NAME", "KeysValues", "Pass", "Prefix", "running"]

NAME = "star_dss_shared_prefix"

KeysValues = dict[int, tuple[Tensor, Tensor]]
"""By layer: keys and values, each (rows, key-value heads, tokens, head size), rotated already."""

_MATH_ELEMENTS = 1 << 26
"""Scores held at once where no fused kernel serves: 256 MB in float32."""

_SLICE_QUERIES = 512
"""Fewest queries that are given keys of their own: below, calls cost more than unseen keys."""


@dataclass(frozen=True)
class Prefix:
    """What consecutive rows of a pass share.

    Attributes:
        rows: How many rows.
        parts: Stored keys and values, one after the other from position 0 on; each has one row.
        visible: (rows, tokens of all parts), bool: which of them each row sees.
    """

    rows: int
    parts: Sequence[KeysValues]
    visible: Tensor


@dataclass(frozen=True)
class _Slice:
    """Consecutive rows of a prefix, the keys that any of them sees, and what hides the others.

    `mask` is additive, (rows, T, keys), or None where every row sees all of them.
    """

    rows: slice
    keys: slice
    mask: Tensor | None


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
    """

    positions: Tensor
    real: Tensor
    prefixes: Sequence[Prefix] = ()
    kept: KeysValues | None = None
    last_layer: int | None = None
    _masks: dict[int | None, Tensor | None] = field(default_factory=dict)
    _slices: dict[tuple[int, int | None], list[_Slice]] = field(default_factory=dict)

    def own_mask(self, window: int | None, dtype: torch.dtype) -> Tensor | None:
        """Additive (rows, 1, T, T), or None where plain causality is all there is."""
        if window not in self._masks:
            length = self.real.shape[1]
            simple = bool(self.real.all()) and (window is None or window >= length)
            self._masks[window] = None if simple else self._own_mask(window, dtype)
        return self._masks[window]

    def _own_mask(self, window: int | None, dtype: torch.dtype) -> Tensor:
        length = self.real.shape[1]
        slot = torch.arange(length, device=self.real.device)
        seen = (slot <= slot[:, None]) & self.real[:, None, :]
        if window is not None:
            seen = seen & (slot > slot[:, None] - window)
        # Padding sees itself: a softmax over nothing is not a number.
        return _additive(seen | torch.eye(length, dtype=torch.bool, device=slot.device), dtype)

    def slices(self, index: int, window: int | None, dtype: torch.dtype) -> list[_Slice]:
        """One prefix's rows, in slices that each meet little more than the keys that they see."""
        key = (index, window)
        if key not in self._slices:
            prefix = self.prefixes[index]
            first = sum(p.rows for p in self.prefixes[:index])
            step = -(-_SLICE_QUERIES // self.real.shape[1])
            self._slices[key] = [
                self._slice(prefix, first, slice(row, min(row + step, prefix.rows)), window, dtype)
                for row in range(0, prefix.rows, step)
            ]
        return self._slices[key]

    def _slice(
        self, prefix: Prefix, first: int, rows: slice, window: int | None, dtype: torch.dtype
    ) -> _Slice:
        seen = prefix.visible[rows, None, :]
        position = self.positions[first + rows.start : first + rows.stop]
        if window is not None and int(position.max()) >= window:
            slot = torch.arange(seen.shape[2], device=seen.device)
            seen = seen & (slot > position[:, :, None] - window)
        columns = seen.any(1).any(0).nonzero()
        keys = slice(int(columns[0]), int(columns[-1]) + 1) if len(columns) else slice(0, 0)
        seen = seen[..., keys]
        if bool(seen.all()):
            return _Slice(rows, keys, None)
        return _Slice(rows, keys, _additive(seen.expand(-1, self.real.shape[1], -1), dtype)[:, 0])


def _additive(seen: Tensor, dtype: torch.dtype) -> Tensor:
    """(rows, 1, …): 0 where seen, else so low that its weight is exactly 0."""
    zero = torch.zeros(seen.shape, dtype=dtype, device=seen.device)
    # Not −inf: a row that sees none of its prefix would have no log-sum-exp.
    return zero.masked_fill(~seen, torch.finfo(dtype).min)[:, None]


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
    current = _current.get()
    if current.kept is not None:
        current.kept[module.layer_idx] = (key, value)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    groups = query.shape[1] // key.shape[1]
    length = query.shape[2]
    mask = current.own_mask(sliding_window, query.dtype)
    causal = mask is None
    if module.layer_idx == current.last_layer:
        query, causal = query[:, :, -1:], False
        mask = None if mask is None else mask[:, :, -1:]
    out, lse = _attend(query, _grouped(key, groups), _grouped(value, groups), mask, scale, softcap,
                       causal=causal)  # fmt: skip
    if current.prefixes:
        found = []
        for index, (prefix, rows) in enumerate(
            zip(current.prefixes, query.split([p.rows for p in current.prefixes]), strict=True)
        ):
            stored = [part[module.layer_idx] for part in prefix.parts]
            keys, values = (torch.cat(tensors, dim=2) for tensors in zip(*stored, strict=True))
            for piece in current.slices(index, sliding_window, query.dtype):
                asked, mask = rows[piece.rows], piece.mask
                met, read = keys[:, :, piece.keys], values[:, :, piece.keys]
                found.append(_attend_shared(asked, met, read, mask, scale, softcap))
        there, there_lse = (torch.cat(parts) for parts in zip(*found, strict=True))
        share = torch.sigmoid(there_lse - lse).unsqueeze(-1)
        out = torch.lerp(out.float(), there.float(), share).to(out.dtype)
    return out.transpose(1, 2).expand(-1, length, -1, -1).contiguous(), None


AttentionInterface.register(NAME, _attention)


def _grouped(tensor: Tensor, groups: int) -> Tensor:
    return tensor if groups == 1 else tensor.repeat_interleave(groups, dim=1)


def _attend_shared(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scale: float,
    softcap: float | None,
) -> tuple[Tensor, Tensor]:
    """`_attend` of all rows to the keys of one, (1, key-value heads, keys, head size).

    The rows are queries of one long row, and each key-value head is a row with as many heads as
    share it: so nothing is copied to each row or head, and the products are large ones. A mask
    is (rows, at least T, keys).
    """
    rows, heads, length, size = query.shape
    shared = key.shape[1]
    folded = query.transpose(0, 1).reshape(shared, heads // shared, rows * length, size)
    if mask is not None:
        mask = mask[:, -length:].reshape(1, 1, rows * length, -1)
    key, value = (t.transpose(0, 1).expand(-1, heads // shared, -1, -1) for t in (key, value))
    out, lse = _attend(folded, key, value, mask, scale, softcap, causal=False)
    return (
        out.reshape(heads, rows, length, -1).transpose(0, 1),
        lse.reshape(heads, rows, length).transpose(0, 1),
    )


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scale: float,
    softcap: float | None,
    *,
    causal: bool,
) -> tuple[Tensor, Tensor]:
    """(rows, heads, T, head size) and its log-sum-exp, float32 (rows, heads, T)."""
    if key.shape[2] == 0:  # a group without a trunk; the fused kernel would divide by zero
        out = query.new_zeros(*query.shape[:-1], value.shape[-1])
        lowest = torch.finfo(torch.float32).min
        return out, torch.full(query.shape[:-1], lowest, device=query.device)
    fused = softcap is None and query.device.type == "cpu" and query.shape[-1] == value.shape[-1]
    if fused:
        # What scaled_dot_product_attention runs on a CPU, with the log-sum-exp it computes anyway.
        # Rows with stride 0 (an expanded prefix) are read in place.
        result = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            query, key, value, 0.0, causal, attn_mask=mask, scale=scale
        )
        return result[0], result[1]
    if causal:
        length = query.shape[2]
        seen = torch.ones(length, length, dtype=torch.bool, device=query.device).tril()
        mask = _additive(seen[None], query.dtype)
    per_row = query.shape[1] * query.shape[2] * key.shape[2]
    step = max(1, _MATH_ELEMENTS // max(1, per_row))
    parts = []
    for first in range(0, len(query), step):
        rows = slice(first, first + step)
        scores = torch.matmul(query[rows], key[rows].transpose(-1, -2)).float() * scale
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        if mask is not None:
            scores = scores + (mask if len(mask) == 1 else mask[rows]).float()
        lse = scores.logsumexp(-1)
        weights = (scores - lse.unsqueeze(-1)).exp().to(value.dtype)
        parts.append((torch.matmul(weights, value[rows]), lse))
    out, lse = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
    return out, lse
