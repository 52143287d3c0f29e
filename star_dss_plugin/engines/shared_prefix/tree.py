"""Split prompts into a head that all share, a trunk per response, and a tail per prompt.

The prompts about one response are nearly the same token sequence, and the prompts about all
responses begin with the same policy text. After the split, every token is computed about once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from star_dss_plugin.engines import shared_prompts
from star_dss_plugin.engines.shared_prompts import SharedPrompts

__all__ = ["Tail", "Tree", "common_length", "first_batch", "grow"]


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
    """Return the tree of one response's prompts, each with at least one token.

    Time and memory grow with the trunk and the tails, not with the prompts written out.
    """
    shared = SharedPrompts.of(prompts)
    first = {piece: i for i, piece in reversed(list(enumerate(shared.pieces)))}
    # Longer before shorter, so that a prompt is preferred as trunk to its own prefixes.
    ordered = sorted(first.values(), key=shared.order, reverse=True)
    neighbours = [shared.common(a, b) for a, b in pairwise(ordered)]
    # Fewest tokens remain if the trunk's nodes in the trie are those that most prompts visit.
    visits = _visits(neighbours)
    trunk = visits.index(max(visits))
    lengths = shared.lengths()
    tails = []
    for row, i in enumerate(ordered):
        # A prompt that ends on the trunk computes its last token again to get the next-token
        # logits.
        common = min(shared.common(i, ordered[trunk]), lengths[i] - 1)
        tails.append(Tail(group, row, common, shared.part(i, common)))
    # Beyond what other prompts share, the rest of the trunk's prompt is a tail as well.
    end = max((t.shared for t in tails if t.row != trunk), default=0)
    own = ordered[trunk]
    kept = min(end, lengths[own] - 1)
    tails[trunk] = Tail(group, trunk, kept, shared.part(own, kept))
    row_of = {shared.pieces[i]: row for row, i in enumerate(ordered)}
    return Tree(
        shared.part(own, 0, end),
        tuple(tails),
        tuple(row_of[piece] for piece in shared.pieces),
        sum(lengths[i] for i in ordered) - sum(neighbours),
    )


def _visits(neighbours: Sequence[int]) -> list[int]:
    """Return for each of n sorted sequences how many first tokens it shares with all others.

    Args:
        neighbours: How many first tokens each sequence shares with the next one, n - 1 numbers.
            Two that are further apart share the least of what lies between them.
    """
    found = [0] * (len(neighbours) + 1)
    for order in (1, -1):
        # (shared tokens, number of sequences) in ascending order, and the sum of their products.
        stack: list[tuple[int, int]] = []
        total = 0
        for i, shared in enumerate(neighbours[::order], 1):
            count = 1
            while stack and stack[-1][0] >= shared:
                more, times = stack.pop()
                total -= more * times
                count += times
            stack.append((shared, count))
            total += shared * count
            found[i if order == 1 else len(neighbours) - i] += total
    return found


def common_length(sequences: Sequence[tuple[int, ...]]) -> int:
    """Return the number of first tokens that all sequences share."""
    return shared_prompts.common_length(min(sequences), max(sequences))


def first_batch(lengths: Sequence[int], budget: int) -> int:
    """Return how many first items run together: their number times the longest is the size.

    The size is at most `budget`, unless one item alone is larger. At most 3 % of it (and 64 tokens)
    may be padding.
    """
    count = longest = total = 0
    for length in lengths:
        widest, sum_with = max(longest, length), total + length
        size = widest * (count + 1)
        if count and (size > budget or size - sum_with > max(64, 0.03 * size)):
            break
        longest, total, count = widest, sum_with, count + 1
    return count
