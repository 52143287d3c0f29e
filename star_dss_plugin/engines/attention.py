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


@dataclass
class Pass:
    """One forward pass over rows of T tokens.

    Attributes:
        positions: (rows, T): of each token in its own sequence.
        real: (rows, T), bool: False on padding.
        prefixes: What the rows share, in their order; empty if they start at position 0.
        kept: Where the pass's own keys and values are stored, or None.
    """

    positions: Tensor
    real: Tensor
    prefixes: Sequence[Prefix] = ()
    kept: KeysValues | None = None
    _masks: dict[tuple[str, int, int | None], Tensor | None] = field(default_factory=dict)

    def own_mask(self, window: int | None, dtype: torch.dtype) -> Tensor | None:
        """Additive (rows, 1, T, T), or None where plain causality is all there is."""
        key = ("own", 0, window)
        if key not in self._masks:
            length = self.real.shape[1]
            simple = bool(self.real.all()) and (window is None or window >= length)
            self._masks[key] = None if simple else self._own_mask(window, dtype)
        return self._masks[key]

    def _own_mask(self, window: int | None, dtype: torch.dtype) -> Tensor:
        length = self.real.shape[1]
        slot = torch.arange(length, device=self.real.device)
        seen = (slot <= slot[:, None]) & self.real[:, None, :]
        if window is not None:
            seen = seen & (slot > slot[:, None] - window)
        # Padding sees itself: a softmax over nothing is not a number.
        return _additive(seen | torch.eye(length, dtype=torch.bool, device=slot.device), dtype)

    def prefix_mask(self, index: int, window: int | None, dtype: torch.dtype) -> Tensor | None:
        """Additive (rows, 1, 1 or T, tokens) of one prefix, or None where all of it is seen."""
        key = ("prefix", index, window)
        if key not in self._masks:
            first = sum(p.rows for p in self.prefixes[:index])
            prefix = self.prefixes[index]
            seen = prefix.visible[:, None, :]
            position = self.positions[first : first + prefix.rows]
            if window is not None and int(position.max()) >= window:
                slot = torch.arange(seen.shape[2], device=seen.device)
                seen = seen & (slot > position[:, :, None] - window)
            self._masks[key] = None if bool(seen.all()) else _additive(seen, dtype)
        return self._masks[key]


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
    mask = current.own_mask(sliding_window, query.dtype)
    out, lse = _attend(query, _grouped(key, groups), _grouped(value, groups), mask, scale, softcap,
                       causal=mask is None)  # fmt: skip
    if current.prefixes:
        found = []
        for index, (prefix, rows) in enumerate(
            zip(current.prefixes, query.split([p.rows for p in current.prefixes]), strict=True)
        ):
            stored = [part[module.layer_idx] for part in prefix.parts]
            keys, values = (
                _grouped(torch.cat(tensors, dim=2), groups).expand(prefix.rows, -1, -1, -1)
                for tensors in zip(*stored, strict=True)
            )
            mask = current.prefix_mask(index, sliding_window, query.dtype)
            found.append(_attend(rows, keys, values, mask, scale, softcap, causal=False))
        there, there_lse = (torch.cat(parts) for parts in zip(*found, strict=True))
        share = torch.sigmoid(there_lse - lse).unsqueeze(-1)
        out = torch.lerp(out.float(), there.float(), share).to(out.dtype)
    return out.transpose(1, 2).contiguous(), None


AttentionInterface.register(NAME, _attention)


def _grouped(tensor: Tensor, groups: int) -> Tensor:
    return tensor if groups == 1 else tensor.repeat_interleave(groups, dim=1)


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
