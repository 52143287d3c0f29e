"""Split prompts into a head that all share, a trunk per response, and a tail per prompt.

The prompts about one response are nearly the same token sequence, and all prompts begin with the
same policy text. After the split, every distinct token is computed about once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from star_dss_plugin.engines import shared_prompts
from star_dss_plugin.engines.shared_prompts import SharedPrompts

__all__ = [
    "Tail",
    "Tree",
    "build_tree",
    "common_prefix_of_all",
    "first_batch",
    "shared_head_length",
]


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

    def prompt_length(self) -> int:
        """Return the number of tokens of the whole prompt."""
        return self.shared + len(self.tokens)


@dataclass(frozen=True)
class Tree:
    """Hold the prompts of one response as a trunk with tails.

    Attributes:
        trunk: Tokens from position 0 on; every tail continues a prefix of it.
        tails: One per distinct prompt, in descending lexicographic order of the prompts.
        row_of: For each given prompt, the index of its tail.
        distinct: Number of nodes in the prompts' trie: the fewest tokens that can be computed.
    """

    trunk: tuple[int, ...]
    tails: tuple[Tail, ...]
    row_of: tuple[int, ...]
    distinct: int


def build_tree(group: int, prompts: Sequence[Sequence[int]]) -> Tree:
    """Return the tree of one response's prompts, each with at least one token.

    Time and memory grow with the trunk and the tails, not with the prompts written out.
    """
    shared = SharedPrompts.from_prompts(prompts)
    # Descending, so that a prompt comes before its own prefixes and is preferred as the trunk.
    ordered = sorted(shared.distinct(), key=shared.sort_key, reverse=True)
    neighbours = [shared.common_prefix_length(a, b) for a, b in pairwise(ordered)]
    # The prompt that shares the most tokens with the rest leaves the fewest tokens in the tails.
    shared_tokens = _shared_tokens(neighbours)
    trunk = shared_tokens.index(max(shared_tokens))
    lengths = shared.lengths()
    tails = []
    for row, i in enumerate(ordered):
        # A prompt that is a prefix of the trunk computes its last token again, for its next-token
        # logits.
        common = min(shared.common_prefix_length(i, ordered[trunk]), lengths[i] - 1)
        tails.append(Tail(group, row, common, shared.token_slice(i, common)))
    # The trunk ends where no other prompt follows it; the rest of its own prompt becomes a tail.
    end = max((t.shared for t in tails if t.row != trunk), default=0)
    own = ordered[trunk]
    kept = min(end, lengths[own] - 1)
    tails[trunk] = Tail(group, trunk, kept, shared.token_slice(own, kept))
    row_of = {shared.pieces[i]: row for row, i in enumerate(ordered)}
    return Tree(
        shared.token_slice(own, 0, end),
        tuple(tails),
        tuple(row_of[piece] for piece in shared.pieces),
        sum(lengths[i] for i in ordered) - sum(neighbours),
    )


def _shared_tokens(neighbours: Sequence[int]) -> list[int]:
    """Return for each of n sorted sequences the sum of its common prefix lengths with the others.

    Args:
        neighbours: Common prefix length of each sequence and the next, n - 1 numbers. The common
            prefix length of two distant sequences is the minimum of those between them.
    """
    found = [0] * (len(neighbours) + 1)
    for order in (1, -1):
        # (common prefix length, number of earlier sequences) ascending; total is the sum of their
        # products.
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


def common_prefix_of_all(sequences: Sequence[tuple[int, ...]]) -> int:
    """Return the length of the common prefix of all sequences."""
    return shared_prompts.common_prefix_length(min(sequences), max(sequences))


def shared_head_length(trees: Sequence[Tree]) -> int:
    """Return how many first tokens all prompts of several trees share, tails not counted."""
    if len(trees) < 2:
        return 0
    return min(
        common_prefix_of_all([tree.trunk for tree in trees]),
        *(tail.shared for tree in trees for tail in tree.tails),
    )


def first_batch(lengths: Sequence[int], budget: int) -> int:
    """Return how many of the first items form one batch, whose size is items times longest item.

    The size is at most `budget`, unless the first item alone is larger. At most 3 % of the size, or
    64 tokens if that is more, is padding.
    """
    count = longest = total = 0
    for length in lengths:
        widest, sum_with = max(longest, length), total + length
        size = widest * (count + 1)
        if count and (size > budget or size - sum_with > max(64, 0.03 * size)):
            break
        longest, total, count = widest, sum_with, count + 1
    return count
