"""Cut off messages what a guard's chat template cuts off them, at the ends."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

__all__ = ["Trim", "trim_of"]


@dataclass(frozen=True)
class Trim:
    """What a template cuts off a message.

    Attributes:
        left: Whether at its beginning.
        right: Whether at its end.
        characters: What is cut off; None: white space.
    """

    left: bool = False
    right: bool = False
    characters: str | None = None

    def __call__(self, text: str) -> str:
        text = text.lstrip(self.characters) if self.left else text
        return text.rstrip(self.characters) if self.right else text

    def prefixes(self, text: str, ends: Sequence[int]) -> tuple[str, list[int]]:
        """Return a text cut at its beginning, and where each of its prefixes ends in that.

        Args:
            text: Any text.
            ends: Of prefixes in characters of `text`, ascending.
        """
        shown = text.lstrip(self.characters) if self.left else text
        cuts: list[int] = []
        reached = 0
        for end in ends:
            cut = max(0, end - len(text) + len(shown))
            before, reached = reached, cut
            if self.right:
                # What lies before the previous prefix's end was looked at with that.
                cut = before + len(shown[before:cut].rstrip(self.characters))
                if cut == before:
                    cut = cuts[-1] if cuts else 0
            cuts.append(cut)
        return shown, cuts


_TRIMS = (  # in the order of how much they remove
    Trim(),
    Trim(left=True, characters="\n"),
    Trim(right=True, characters="\n"),
    Trim(left=True, right=True, characters="\n"),
    Trim(left=True),
    Trim(right=True),
    Trim(left=True, right=True),
)


def trim_of(shown: Callable[[str], str], words: str) -> Trim:
    """Return the trimming of a message, tried on one with white space around its words.

    Args:
        shown: Returns what the template makes of a conversation with a message of this content.
        words: Words that stand nowhere else in the conversation.
    """
    lines = "\n" * 9  # more than any template adds around a message
    padded = f"{lines}\t \n{words}\n \t{lines}"
    rendered = shown(padded)
    return next((trim for trim in _TRIMS if trim(padded) in rendered), _TRIMS[-1])
