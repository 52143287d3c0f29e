"""Split prompts into a head that all share, a trunk per response, and a tail per prompt.

The prompts about one response are nearly the same token sequence, and the prompts about all
responses begin with the same policy text. After the split, every token is computed about once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = ["Tail", "Tree", "batched", "common_length", "grow", "trie"]


@dataclass(frozen=True)
class Tail:
    """Hold the tokens that one prompt computes by itself.

    Attributes:
        group: Index of the group whose trunk precedes the tail.
        row: Index among the group's distinct prompts.
        shared: Number of the prompt's first tokens that come from head and trunk.
        tokens: The remaining tokens, at least one.
    """

    group: int
    row: int
    shared: int
    tokens: tuple[int, ...]


@dataclass(frozen=True)
class Tree:
    """Hold the prompts of one response as a trunk with tails.

    Attributes:
        trunk: Tokens from position 0 on; every tail continues a prefix of it.
        tails: One per distinct prompt, in the order of their token sequences.
        row_of: For each given prompt, the index of its tail.
        distinct: Number of nodes in the prompts' trie: the fewest tokens that can be computed.
    """

    trunk: tuple[int, ...]
    tails: tuple[Tail, ...]
    row_of: tuple[int, ...]
    distinct: int


def grow(group: int, prompts: Sequence[Sequence[int]]) -> Tree:
    """Return the tree of one response's prompts, each with at least one token."""
    # Longer before shorter, so that a prompt is preferred as trunk to its own prefixes.
    ordered = sorted({tuple(p) for p in prompts}, reverse=True)
    nodes = trie(ordered)
    # Fewest tokens remain if the trunk's nodes are those that most prompts visit.
    visits = np.append(np.bincount(nodes[nodes >= 0]) - 1, 0)
    trunk = int(visits[nodes].sum(axis=1).argmax())
    common = ((nodes == nodes[trunk]) & (nodes >= 0)).sum(axis=1).tolist()
    tails = []
    for row, tokens in enumerate(ordered):
        # A prompt that ends on the trunk computes its last token again to get the next-token
        # logits.
        shared = min(common[row], len(tokens) - 1)
        tails.append(Tail(group, row, shared, tokens[shared:]))
    others = [t.shared for t in tails if t.row != trunk]
    # Beyond what other prompts share, the rest of the trunk's prompt is a tail as well.
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
    """Return a number for each prefix of n sorted sequences, shape (n, longest).

    Entry (k, i) numbers the first i + 1 tokens of sequence k. Equal numbers mean equal prefixes; -1
    marks positions past the end.
    """
    length = np.array([len(tokens) for tokens in ordered])
    real = np.arange(length.max()) < length[:, None]
    tokens = np.full(real.shape, -1)
    tokens[real] = np.concatenate(ordered)
    new = np.ones_like(real)
    new[1:] = np.logical_or.accumulate(tokens[1:] != tokens[:-1], axis=1)
    # A prefix that is not new equals that of the row above.
    nodes = np.maximum.accumulate(np.where(new, np.arange(new.size).reshape(new.shape), 0), axis=0)
    return np.where(real, nodes, -1)


def common_length(sequences: Sequence[tuple[int, ...]]) -> int:
    """Return the number of first tokens that all sequences share."""
    first, last = min(sequences), max(sequences)
    length = 0
    while length < min(len(first), len(last)) and first[length] == last[length]:
        length += 1
    return length


def batched(lengths: Sequence[int], budget: int) -> Iterator[slice]:
    """Yield consecutive runs whose padded size, number times longest, is at most `budget`.

    A run also ends where another item would make more than 3 % (and 64 tokens) of it padding.
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
