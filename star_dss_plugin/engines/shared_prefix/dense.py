"""Compute attention with matrix products and PyTorch's fused kernels.

Attention to a row's own keys and attention to the shared keys are computed separately and merged by
their log-sum-exps, which equals one softmax over both. So shared keys and values are read in place,
and no mask of all prompts against all tokens is built.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

__all__ = ["Dense"]

_MATH_ELEMENTS = 1 << 26
"""Attention scores held at once where no fused kernel applies: 256 MB in float32."""

_SLICE_QUERIES = 512
"""Fewest queries per slice of a prefix's rows: smaller slices mask fewer keys in more calls."""


@dataclass(frozen=True)
class _Slice:
    """Hold some consecutive rows of a prefix, the range of keys that they see, and their mask.

    `mask` is additive, (rows, T, keys), or None if every row sees all keys of the range.
    """

    rows: slice
    keys: slice
    mask: Tensor | None


@dataclass
class Dense:
    """Compute attention by fused kernels, as an `Attention`.

    Attributes:
        positions: (R, T), position of each token in its own sequence.
        real: (R, T), bool: False on padding.
        rows: Number of rows that share each prefix, in order.
        depths: For each prefix, (its rows,), the number of its tokens that each row sees.
    """

    positions: Tensor
    real: Tensor
    rows: Sequence[int]
    depths: Sequence[Tensor]
    _masks: dict[int | None, Tensor | None] = field(default_factory=dict)
    _slices: dict[tuple[int, int | None], list[_Slice]] = field(default_factory=dict)

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
        """See `Attention.attend`."""
        groups = query.shape[1] // key.shape[1]
        mask = self._own_mask(window, query.dtype)
        causal = mask is None and query.shape[2] == key.shape[2]
        if mask is not None:
            mask = mask[:, :, -query.shape[2] :]
        out, lse = _attend(
            query,
            _grouped(key, groups),
            _grouped(value, groups),
            mask,
            scale,
            softcap,
            causal=causal,
        )
        if not shared:
            return out
        found = []
        for index, (queries, (keys, values)) in enumerate(
            zip(query.split(list(self.rows)), shared, strict=True)
        ):
            for part in self._slices_of(index, window, query.dtype):
                seen = keys[:, :, part.keys], values[:, :, part.keys]
                found.append(_attend_shared(queries[part.rows], *seen, part.mask, scale, softcap))
        shared_out, shared_lse = (torch.cat(parts) for parts in zip(*found, strict=True))
        share = torch.sigmoid(shared_lse - lse).unsqueeze(-1)
        return torch.lerp(out.to(lse.dtype), shared_out.to(lse.dtype), share).to(out.dtype)

    def _own_mask(self, window: int | None, dtype: torch.dtype) -> Tensor | None:
        """Return the additive mask (rows, 1, T, T) of own tokens; None if causality suffices."""
        if window not in self._masks:
            length = self.real.shape[1]
            simple = bool(self.real.all()) and (window is None or window >= length)
            self._masks[window] = None if simple else self._causal_mask(window, dtype)
        return self._masks[window]

    def _causal_mask(self, window: int | None, dtype: torch.dtype) -> Tensor:
        length = self.real.shape[1]
        slot = torch.arange(length, device=self.real.device)
        seen = (slot <= slot[:, None]) & self.real[:, None, :]
        if window is not None:
            seen = seen & (slot > slot[:, None] - window)
        # Padding sees itself, because a softmax over no keys is NaN.
        return _additive(seen | torch.eye(length, dtype=torch.bool, device=slot.device), dtype)

    def _slices_of(self, index: int, window: int | None, dtype: torch.dtype) -> list[_Slice]:
        """Split one prefix's rows into slices, so that few keys of each slice are masked."""
        key = (index, window)
        if key not in self._slices:
            rows = self.rows[index]
            step = -(-_SLICE_QUERIES // self.real.shape[1])
            self._slices[key] = [
                self._slice(index, slice(row, min(row + step, rows)), window, dtype)
                for row in range(0, rows, step)
            ]
        return self._slices[key]

    def _slice(self, index: int, rows: slice, window: int | None, dtype: torch.dtype) -> _Slice:
        depths, first = self.depths[index][rows], sum(self.rows[:index])
        slot = torch.arange(int(depths.max()), device=depths.device)
        seen = (slot < depths[:, None])[:, None, :]
        position = self.positions[first + rows.start : first + rows.stop]
        if window is not None and int(position.max()) >= window:
            seen = seen & (slot > position[:, :, None] - window)
        columns = seen.any(1).any(0).nonzero()
        keys = slice(int(columns[0]), int(columns[-1]) + 1) if len(columns) else slice(0, 0)
        seen = seen[..., keys]
        if bool(seen.all()):
            return _Slice(rows, keys, None)
        return _Slice(rows, keys, _additive(seen.expand(-1, self.real.shape[1], -1), dtype)[:, 0])


def _additive(seen: Tensor, dtype: torch.dtype) -> Tensor:
    """Return an additive mask (rows, 1, …): 0 where seen, the dtype's minimum elsewhere."""
    zero = torch.zeros(seen.shape, dtype=dtype, device=seen.device)
    # Not −inf: the log-sum-exp of a row that sees nothing of its prefix would not be finite.
    return zero.masked_fill(~seen, torch.finfo(dtype).min)[:, None]


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
    """Return `_attend` of all rows to one row of keys, (1, key-value heads, keys, head size).

    The queries of all rows are joined to one long row. Key-value heads become the batch dimension,
    with the query heads that share each. So no key is copied per row or head, and the matrix
    products are large. A mask has shape (rows, at least T, keys).
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
    """Return attention and log-sum-exp.

    Shapes: (rows, heads, T, head size) and (rows, heads, T). The log-sum-exp is float32 or wider.
    """
    precision = torch.promote_types(query.dtype, torch.float32)
    if key.shape[2] == 0:  # rows that see no shared key; the fused kernel would divide by zero
        out = query.new_zeros(*query.shape[:-1], value.shape[-1])
        lowest = torch.finfo(torch.float32).min
        return out, out.new_full(query.shape[:-1], lowest, dtype=precision)
    fused = softcap is None and query.device.type == "cpu" and query.shape[-1] == value.shape[-1]
    if fused:
        # The kernel behind scaled_dot_product_attention on a CPU, which also returns the
        # log-sum-exp. Rows with stride 0 (an expanded prefix) are read in place.
        result = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            query, key, value, 0.0, causal, attn_mask=mask, scale=scale
        )
        return result[0], result[1]
    length, keys = query.shape[2], key.shape[2]
    if causal:
        seen = torch.ones(length, length, dtype=torch.bool, device=query.device).tril()
        mask = _additive(seen[None], query.dtype)
    columns = max(1, _MATH_ELEMENTS // (query.shape[1] * keys))
    step = max(1, columns // length)
    out = value.new_empty(*query.shape[:-1], value.shape[-1])
    lse = query.new_empty(query.shape[:-1], dtype=precision)
    for first, start in itertools.product(
        range(0, len(query), step), range(0, length, min(columns, length))
    ):
        rows, queries = slice(first, first + step), slice(start, start + columns)
        scores = torch.matmul(query[rows, :, queries], key[rows].transpose(-1, -2))
        scores = scores.to(precision) * scale
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        if mask is not None:
            scores = scores + (mask if len(mask) == 1 else mask[rows])[:, :, queries]
        lse[rows, :, queries] = scores.logsumexp(-1)
        weights = (scores - lse[rows, :, queries].unsqueeze(-1)).exp().to(value.dtype)
        out[rows, :, queries] = torch.matmul(weights, value[rows])
    return out, lse
