"""Hold prompts that begin alike in the memory of one of them and of their different ends."""

from __future__ import annotations

from collections.abc import Sequence
from typing import overload

__all__ = ["SharedPrompts", "common_length"]


class SharedPrompts(Sequence[list[int]]):
    """Prompts about one response: pieces of one trunk, each with an end of its own.

    A response of n chunks has n prompts, each about as long as the response. Written out they take
    memory that grows with the square of its length, so each is made when it is asked for.

    Args:
        trunk: Token ids that prompts begin with.
        kept: For each prompt how many first tokens of the trunk it has.
        ends: For each prompt the tokens behind those.

    Attributes:
        trunk: As given.
        pieces: For each prompt the largest number of first tokens that it shares with the trunk,
            and the tokens behind them. Equal pieces are equal prompts.
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
    def of(cls, prompts: Sequence[Sequence[int]]) -> SharedPrompts:
        """Return prompts that are written out; shared ones as they are."""
        if isinstance(prompts, SharedPrompts):
            return prompts
        return cls(max(prompts, key=len, default=()), [0] * len(prompts), prompts)

    def framed(self, before: Sequence[int], behind: Sequence[int]) -> SharedPrompts:
        """Return the same prompts with tokens before and behind each of them."""
        return SharedPrompts(
            (*before, *self.trunk),
            [len(before) + kept for kept, _ in self.pieces],
            [(*end, *behind) for _, end in self.pieces],
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

    def part(self, index: int, start: int, stop: int | None = None) -> tuple[int, ...]:
        """Return the tokens of one prompt from `start` on, up to `stop`."""
        kept, end = self.pieces[index]
        stop = kept + len(end) if stop is None else stop
        behind = end[max(0, start - kept) : max(0, stop - kept)]
        return self.trunk[start : min(kept, stop)] + behind

    def common(self, one: int, other: int) -> int:
        """Return the number of first tokens that two prompts share."""
        (a, of_one), (b, of_other) = self.pieces[one], self.pieces[other]
        # Where one leaves the trunk, the other goes on with it.
        return min(a, b) if a != b else a + common_length(of_one, of_other)

    def order(self, index: int) -> tuple[int, int, tuple[int, ...]]:
        """Return a key that sorts prompts as their tokens do."""
        kept, end = self.pieces[index]
        if kept == len(self.trunk):
            return 1, 0, end
        # It leaves the trunk downwards or upwards: the earlier, the further out.
        return (2, -kept, end) if end and end[0] > self.trunk[kept] else (0, kept, end)


def common_length(one: Sequence[int], other: Sequence[int]) -> int:
    """Return the number of first tokens that two sequences share."""
    length, most = 0, min(len(one), len(other))
    while length < most and one[length] == other[length]:
        length += 1
    return length
