"""Compute one block-sparse attention for all rows of a pass and all keys they may see.

FlexAttention computes only the blocks of (queries, keys) in which some query sees some key. A pass
is flattened to one long row: its queries are those of all rows in order, its keys those of the
shared prefixes followed by those of the rows. The mask compares each query's row and position with
each key's owner and position.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

__all__ = ["BlockSparse"]

BLOCK = 128
"""Queries, and keys, per block: the size that FlexAttention's kernels are made for."""

_KERNEL_OPTIONS: Any = {"FORCE_USE_FLEX_ATTENTION": True}
"""Avoid the decoding kernel, which FlexAttention picks for few queries: it has no configuration for
some numbers of queries and heads.
"""

_PADDING, _NONE = -1, -2
"""Owner of padding keys, and prefix of rows without one: they differ, so no row sees padding."""


@dataclass
class BlockSparse:
    """Compute attention by FlexAttention, as an `Attention`, in a pass over R rows of T columns.

    Rows are numbered from 0, shared prefixes from R.

    Attributes:
        positions: (R, T), position of each query in its own sequence.
        prefix: (R,), number of each row's shared prefix.
        depth: (R,), how many tokens of its prefix, from the first on, a row sees.
        owner: (keys,), row or prefix that a key belongs to; negative for padding.
        place: (keys,), position of a key in its sequence.
    """

    positions: Tensor
    prefix: Tensor
    depth: Tensor
    owner: Tensor
    place: Tensor
    _masks: dict[tuple[int, int | None], BlockMask] = field(default_factory=dict)

    @classmethod
    def from_rows(
        cls,
        positions: Tensor,
        real: Tensor,
        rows: Sequence[int],
        depths: Sequence[Tensor],
        lengths: Sequence[int],
    ) -> BlockSparse:
        """Build the attention of a pass.

        Args:
            positions: (R, T), position of each query in its own sequence.
            real: (R, T), False on padding.
            rows: Number of rows that share each prefix, in order; empty if there are no prefixes.
            depths: For each prefix, (its rows,), the number of its tokens that each row sees.
            lengths: Number of tokens of each prefix.
        """
        device, count = positions.device, len(positions)
        number = [prefix for prefix, shared_by in enumerate(rows, count) for _ in range(shared_by)]
        owner = [prefix for prefix, length in enumerate(lengths, count) for _ in range(length)]
        own = torch.arange(count, device=device)[:, None].expand_as(real)
        places = [torch.arange(length, device=device) for length in lengths]
        return cls(
            positions,
            torch.tensor(number or [_NONE] * count, device=device),
            torch.cat(list(depths)) if rows else positions.new_zeros(count),
            torch.cat([positions.new_tensor(owner), own.masked_fill(~real, _PADDING).flatten()]),
            torch.cat([*places, positions.flatten()]),
        )

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
        rows, heads, columns, size = query.shape
        if (columns, window) not in self._masks:
            self._masks[columns, window] = self._mask(columns, window)
        found: Any = _kernel(query.device.type)(
            query.transpose(0, 1).reshape(1, heads, rows * columns, size).contiguous(),
            _joined_row([keys for keys, _ in shared], key),
            _joined_row([values for _, values in shared], value),
            score_mod=None if softcap is None else _softcap_score(softcap),
            block_mask=self._masks[columns, window],
            scale=scale,
            enable_gqa=True,
            kernel_options=_KERNEL_OPTIONS,
        )
        attended: Tensor = found.view(heads, rows, columns, -1).transpose(0, 1)
        return attended

    def _mask(self, columns: int, window: int | None) -> BlockMask:
        """Return the block mask for the last columns of each row."""
        rows, keys = len(self.positions), len(self.owner)
        blocks = -(-keys // BLOCK)
        visible = self._visible_keys()
        visible = torch.nn.functional.pad(visible, (0, blocks * BLOCK - keys))
        visible = visible.view(rows, blocks, BLOCK).any(-1)
        # The row of each query; the last block is padded with queries of the last row.
        row = torch.arange(rows, device=visible.device).repeat_interleave(columns)
        padded = -(-len(row) // BLOCK) * BLOCK
        row = torch.nn.functional.pad(row, (0, padded - len(row)), value=rows - 1)
        occupied = visible[row.view(-1, BLOCK)].any(1)
        order = occupied.int().argsort(dim=-1, descending=True, stable=True)
        return BlockMask.from_kv_blocks(
            occupied.sum(-1, dtype=torch.int32)[None, None],
            order.int()[None, None],
            BLOCK_SIZE=BLOCK,
            mask_mod=_mask_function(
                torch.arange(rows, device=visible.device).repeat_interleave(columns),
                self.positions[:, -columns:].flatten(),
                self.prefix.repeat_interleave(columns),
                self.depth.repeat_interleave(columns),
                self.owner,
                self.place,
                window,
            ),
            seq_lengths=(rows * columns, keys),
        )

    def _visible_keys(self) -> Tensor:
        """Return (R, keys), bool: True where some query of a row sees a key, without a window."""
        row = torch.arange(len(self.positions), device=self.owner.device)
        shared = (self.owner == self.prefix[:, None]) & (self.place < self.depth[:, None])
        return shared | (self.owner == row[:, None])


def _joined_row(shared: Sequence[Tensor], own: Tensor) -> Tensor:
    """Join shared and own keys (or values) in one row, (1, heads, keys, head size)."""
    _, heads, _, size = own.shape
    return torch.cat([*shared, own.transpose(0, 1).reshape(1, heads, -1, size)], dim=2)


def _mask_function(
    row: Tensor,
    position: Tensor,
    prefix: Tensor,
    depth: Tensor,
    owner: Tensor,
    place: Tensor,
    window: int | None,
) -> Any:
    """Build FlexAttention's mask function from tensors of the queries (first four) and keys."""

    def mask(_b: Tensor, _h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        own = (owner[key] == row[query]) & (place[key] <= position[query])
        shared = (owner[key] == prefix[query]) & (place[key] < depth[query])
        return own | shared

    def near(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        assert window is not None
        return mask(b, h, query, key) & (place[key] > position[query] - window)

    return mask if window is None else near


def _softcap_score(softcap: float) -> Any:
    def score(score: Tensor, *_: Tensor) -> Tensor:
        return softcap * torch.tanh(score / softcap)

    return score


@functools.cache
def _kernel(device: str) -> Any:
    """Return FlexAttention's kernel, compiled on CUDA; on a CPU the dense path is faster."""
    if device != "cuda":
        return flex_attention
    from torch._dynamo import config

    # Passes differ in which dimensions have size 1, and in windows, so several kernels are
    # compiled. Exceeding the limit must be an error: the uncompiled function would allocate the
    # scores of all queries and all keys at once.
    return config.patch(recompile_limit=64, fail_on_recompile_limit_hit=True)(
        torch.compile(_attend, dynamic=True)
    )


def _attend(*args: Any, **kwargs: Any) -> Any:
    """Call FlexAttention through a function of this module.

    Recompilation limits count per compiled function, and the trained model may compile
    `flex_attention` directly.
    """
    return flex_attention(*args, **kwargs)
