"""What there is to compute: a head that all prompts share, a trunk per response, a tail per prompt.

The prompts about one response are nearly the same token sequence, and the prompts about all
responses begin with the same policy text. Cut there, every token is computed about once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = ["Tail", "Tree", "batched", "common_length", "grow", "trie"]


@dataclass(frozen=True)
class Tail:
    """What one prompt computes for itself.

    Attributes:
        group: Which trunk it hangs on.
        row: Which of the group's distinct prompts it is.
        shared: How many of its first tokens it takes from head and trunk.
        tokens: The others, at least one.
    """

    group: int
    row: int
    shared: int
    tokens: tuple[int, ...]


@dataclass(frozen=True)
class Tree:
    """The prompts of one response.

    Attributes:
        trunk: Tokens from position 0 on; every tail takes a prefix of it.
        tails: One per distinct prompt, in the order of their token sequences.
        row_of: For each prompt that was given, its tail.
        distinct: Nodes of the trie of the prompts: the fewest tokens that can be computed.
    """

    trunk: tuple[int, ...]
    tails: tuple[Tail, ...]
    row_of: tuple[int, ...]
    distinct: int


def grow(group: int, prompts: Sequence[Sequence[int]]) -> Tree:
    """The tree of one response's prompts, each with at least one token."""
    # Longer before shorter, so that a trunk is preferred to its own prefixes.
    ordered = sorted({tuple(p) for p in prompts}, reverse=True)
    nodes = trie(ordered)
    # The fewest tokens are left when the trunk's nodes are those that most prompts visit.
    visits = np.append(np.bincount(nodes[nodes >= 0]) - 1, 0)
    trunk = int(visits[nodes].sum(axis=1).argmax())
    common = ((nodes == nodes[trunk]) & (nodes >= 0)).sum(axis=1).tolist()
    tails = []
    for row, tokens in enumerate(ordered):
        # A prompt that ends on the trunk computes its last token again, to read what follows it.
        shared = min(common[row], len(tokens) - 1)
        tails.append(Tail(group, row, shared, tokens[shared:]))
    others = [t.shared for t in tails if t.row != trunk]
    # Beyond what the others share, the trunk is a tail like theirs.
    end = max(others, default=0)
    own = ordered[trunk]
    tails[trunk] = Tail(group, trunk, min(end, len(own) - 1), own[min(end, len(own) - 1) :])
    index = {tokens: row for row, tokens in enumerate(ordered)}
    return Tree(
        own[:end],
        tuple(tails),
        tuple(index[tuple(p)] for p in prompts),
        int(np.unique(nodes[nodes >= 0]).size),
    )


def trie(ordered: Sequence[tuple[int, ...]]) -> NDArray[np.int64]:
    """Shape (n, longest): a number for the first i + 1 tokens of each of n sorted sequences.

    Equal numbers mean equal prefixes; -1 is past the end.
    """
    length = np.array([len(tokens) for tokens in ordered])
    real = np.arange(length.max()) < length[:, None]
    tokens = np.full(real.shape, -1)
    tokens[real] = np.concatenate(ordered)
    new = np.ones_like(real)
    new[1:] = np.logical_or.accumulate(tokens[1:] != tokens[:-1], axis=1)
    # A prefix that is not new is the one of the row above.
    nodes = np.maximum.accumulate(np.where(new, np.arange(new.size).reshape(new.shape), 0), axis=0)
    return np.where(real, nodes, -1)


def common_length(sequences: Sequence[tuple[int, ...]]) -> int:
    """How many first tokens all sequences share."""
    first, last = min(sequences), max(sequences)
    length = 0
    while length < min(len(first), len(last)) and first[length] == last[length]:
        length += 1
    return length


def batched(lengths: Sequence[int], budget: int) -> Iterator[slice]:
    """Consecutive runs whose padded size, number times longest, is at most `budget`.

    A run also ends where one more would make more than 3 % (and 64 tokens) of it padding.
    """
    start = 0
    while start < len(lengths):
        end, longest, total = start, 0, 0
        while end < len(lengths):
            widest, sum_with = max(longest, lengths[end]), total + lengths[end]
            padded = widest * (end - start + 1)
            if end > start and (padded > budget or padded - sum_with > max(64, 0.03 * padded)):
                break
            longest, total, end = widest, sum_with, end + 1
        yield slice(start, end)
        start = end
