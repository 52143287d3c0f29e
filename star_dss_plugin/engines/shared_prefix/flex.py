"""One block-sparse attention for all rows of a pass and all keys they may see.

FlexAttention computes only the blocks of (queries, keys) in which somebody sees something. To it a
pass is one long row: the queries of all rows one after the other, and as keys the shared prefixes'
and then the rows' own. Who owns a key, and its position, say who sees it.
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
"""Queries, and keys, of a block: what FlexAttention's kernels are made for."""

_KERNEL_OPTIONS: Any = {"FORCE_USE_FLEX_ATTENTION": True}
"""Not the kernel for decoding, which a pass of few queries would get: for some numbers of them and
of heads it has no configuration."""

_PADDING, _NONE = -1, -2
"""In place of the owner of a key, and of the prefix of a row: nobody's, and none."""


@dataclass
class BlockSparse:
    """See `Attention`: who sees what in a pass over R rows of T columns.

    Rows are numbered from 0, shared prefixes from R.

    Attributes:
        positions: (R, T): of each query in its own sequence.
        prefix: (R,): the number of each row's shared prefix.
        depth: (R,): how many of its prefix's first tokens a row sees.
        owner: (keys,): the row or prefix that a key belongs to; negative for padding.
        place: (keys,): the position of a key in its sequence.
    """

    positions: Tensor
    prefix: Tensor
    depth: Tensor
    owner: Tensor
    place: Tensor
    _masks: dict[tuple[int, int | None], BlockMask] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        positions: Tensor,
        real: Tensor,
        rows: Sequence[int],
        depths: Sequence[Tensor],
        lengths: Sequence[int],
    ) -> BlockSparse:
        """That of a pass.

        Args:
            positions: (R, T).
            real: (R, T), False on padding.
            rows: How many rows share each prefix, in their order; of none, there are no prefixes.
            depths: For each prefix, (its rows,): how many of its tokens they see.
            lengths: How many tokens each prefix has.
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
            _in_one_row([keys for keys, _ in shared], key),
            _in_one_row([values for _, values in shared], value),
            score_mod=None if softcap is None else _capped(softcap),
            block_mask=self._masks[columns, window],
            scale=scale,
            enable_gqa=True,
            kernel_options=_KERNEL_OPTIONS,
        )
        attended: Tensor = found.view(heads, rows, columns, -1).transpose(0, 1)
        return attended

    def _mask(self, columns: int, window: int | None) -> BlockMask:
        """For the last columns of each row: the blocks somebody sees something of, and what."""
        rows, keys = len(self.positions), len(self.owner)
        blocks = -(-keys // BLOCK)
        met = self._met_by_rows()
        met = torch.nn.functional.pad(met, (0, blocks * BLOCK - keys))
        met = met.view(rows, blocks, BLOCK).any(-1)
        # The rows that the queries of a block belong to; those past the end see no more.
        row = torch.arange(rows, device=met.device).repeat_interleave(columns)
        padded = -(-len(row) // BLOCK) * BLOCK
        row = torch.nn.functional.pad(row, (0, padded - len(row)), value=rows - 1)
        occupied = met[row.view(-1, BLOCK)].any(1)
        order = occupied.int().argsort(dim=-1, descending=True, stable=True)
        return BlockMask.from_kv_blocks(
            occupied.sum(-1, dtype=torch.int32)[None, None],
            order.int()[None, None],
            BLOCK_SIZE=BLOCK,
            mask_mod=_sees(
                torch.arange(rows, device=met.device).repeat_interleave(columns),
                self.positions[:, -columns:].flatten(),
                self.prefix.repeat_interleave(columns),
                self.depth.repeat_interleave(columns),
                self.owner,
                self.place,
                window,
            ),
            seq_lengths=(rows * columns, keys),
        )

    def _met_by_rows(self) -> Tensor:
        """(R, keys), bool: what any query of a row may see, windows aside."""
        row = torch.arange(len(self.positions), device=self.owner.device)
        shared = (self.owner == self.prefix[:, None]) & (self.place < self.depth[:, None])
        return shared | (self.owner == row[:, None])


def _in_one_row(shared: Sequence[Tensor], own: Tensor) -> Tensor:
    """(1, heads, keys, head size)."""
    _, heads, _, size = own.shape
    return torch.cat([*shared, own.transpose(0, 1).reshape(1, heads, -1, size)], dim=2)


def _sees(
    row: Tensor,
    position: Tensor,
    prefix: Tensor,
    depth: Tensor,
    owner: Tensor,
    place: Tensor,
    window: int | None,
) -> Any:
    """FlexAttention's mask: the first four describe queries, the next two keys."""

    def mask(_b: Tensor, _h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        own = (owner[key] == row[query]) & (place[key] <= position[query])
        shared = (owner[key] == prefix[query]) & (place[key] < depth[query])
        return own | shared

    def near(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        assert window is not None
        return mask(b, h, query, key) & (place[key] > position[query] - window)

    return mask if window is None else near


def _capped(softcap: float) -> Any:
    def score(score: Tensor, *_: Tensor) -> Tensor:
        return softcap * torch.tanh(score / softcap)

    return score


@functools.cache
def _kernel(device: str) -> Any:
    """Compiled where that makes one kernel of it; a CPU has better ones."""
    if device != "cuda":
        return flex_attention
    from torch._dynamo import config

    # Passes differ in what is 1, and in windows. One kernel too many must be an error: without a
    # kernel of its own, a pass would hold the scores of all queries and all keys at once.
    return config.patch(recompile_limit=64, fail_on_recompile_limit_hit=True)(
        torch.compile(_attend, dynamic=True)
    )


def _attend(*args: Any, **kwargs: Any) -> Any:
    """A function of our own: what is compiled counts against the limit that all who compile
    FlexAttention itself share, the model that is trained among them.
    """
    return flex_attention(*args, **kwargs)
