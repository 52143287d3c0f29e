"""Store prompts that share prefixes as one token sequence, and a suffix for each prompt."""

from __future__ import annotations

from collections.abc import Sequence
from typing import overload

__all__ = ["SharedPrompts", "common_prefix_length"]


class SharedPrompts(Sequence[list[int]]):
    """Hold the prompts about one response, each a prefix of a common trunk and a suffix of its own.

    A response of n chunks has n prompts, each about as long as the response. As lists they would
    take memory quadratic in its length, so a prompt is built only when it is indexed.

    Args:
        trunk: Token ids whose prefixes begin the prompts.
        kept: For each prompt the length of that prefix.
        ends: For each prompt the suffix after it.

    Attributes:
        trunk: As given, as a tuple.
        pieces: For each prompt (kept, end), with the prefix as long as possible: equal prompts have
            equal pieces.
    """

    def __init__(
        self, trunk: Sequence[int], kept: Sequence[int], ends: Sequence[Sequence[int]]
    ) -> None:
        self.trunk = tuple(trunk)
        self.pieces: list[tuple[int, tuple[int, ...]]] = []
        for count, end in zip(kept, ends, strict=True):
            more = 0
            while (
                more < len(end)
                and count + more < len(self.trunk)
                and self.trunk[count + more] == end[more]
            ):
                more += 1
            self.pieces.append((count + more, tuple(end[more:])))

    @classmethod
    def from_prompts(cls, prompts: Sequence[Sequence[int]]) -> SharedPrompts:
        """Share the prefixes of prompts given as lists; return a `SharedPrompts` as it is."""
        if isinstance(prompts, SharedPrompts):
            return prompts
        return cls(max(prompts, key=len, default=()), [0] * len(prompts), prompts)

    def surrounded(self, before: Sequence[int], after: Sequence[int]) -> SharedPrompts:
        """Return the prompts with the same tokens added before and after each."""
        return SharedPrompts(
            (*before, *self.trunk),
            [len(before) + kept for kept, _ in self.pieces],
            [(*end, *after) for _, end in self.pieces],
        )

    def __len__(self) -> int:
        return len(self.pieces)

    @overload
    def __getitem__(self, index: int) -> list[int]: ...

    @overload
    def __getitem__(self, index: slice) -> SharedPrompts: ...

    def __getitem__(self, index: int | slice) -> list[int] | SharedPrompts:
        if isinstance(index, slice):
            pieces = self.pieces[index]
            return SharedPrompts(self.trunk, [n for n, _ in pieces], [end for _, end in pieces])
        kept, end = self.pieces[index]
        return [*self.trunk[:kept], *end]

    def lengths(self) -> list[int]:
        """Return the number of tokens of each prompt."""
        return [kept + len(end) for kept, end in self.pieces]

    def distinct(self) -> list[int]:
        """Return the index of the first of each group of equal prompts, in any order."""
        first = {piece: i for i, piece in reversed(list(enumerate(self.pieces)))}
        return list(first.values())

    def token_slice(self, index: int, start: int, stop: int | None = None) -> tuple[int, ...]:
        """Return the tokens `start:stop` of one prompt, without building the whole prompt."""
        kept, end = self.pieces[index]
        stop = kept + len(end) if stop is None else stop
        own = end[max(0, start - kept) : max(0, stop - kept)]
        return self.trunk[start : min(kept, stop)] + own

    def common_prefix_length(self, one: int, other: int) -> int:
        """Return the length of the common prefix of two prompts."""
        (a, of_one), (b, of_other) = self.pieces[one], self.pieces[other]
        # If a != b, one prompt leaves the trunk at min(a, b) and the other still follows it.
        return min(a, b) if a != b else a + common_prefix_length(of_one, of_other)

    def sort_key(self, index: int) -> tuple[int, int, tuple[int, ...]]:
        """Return a key that sorts prompts in the lexicographic order of their tokens."""
        kept, end = self.pieces[index]
        if kept == len(self.trunk):
            return 1, 0, end
        # A prompt that leaves the trunk with a smaller token (or ends) sorts before it, else after
        # it; the earlier it leaves, the further from the trunk.
        return (2, -kept, end) if end and end[0] > self.trunk[kept] else (0, kept, end)


def common_prefix_length(one: Sequence[int], other: Sequence[int]) -> int:
    """Return the length of the common prefix of two sequences."""
    length, most = 0, min(len(one), len(other))
    while length < most and one[length] == other[length]:
        length += 1
    return length
