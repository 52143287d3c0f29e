"""Find out how a guard's chat template strips message content, and strip content likewise."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

__all__ = ["Trim", "detect_trim"]


@dataclass(frozen=True)
class Trim:
    """Strip text as a template does.

    Attributes:
        left: Whether the beginning is stripped.
        right: Whether the end is stripped.
        characters: The characters to strip; None is white space.
    """

    left: bool = False
    right: bool = False
    characters: str | None = None

    def __call__(self, text: str) -> str:
        text = text.lstrip(self.characters) if self.left else text
        return text.rstrip(self.characters) if self.right else text

    def prefixes(self, text: str, ends: Sequence[int]) -> tuple[str, list[int]]:
        """Return the text stripped at its beginning, and the end of each stripped prefix in it.

        Args:
            text: Any text.
            ends: Ends of prefixes in characters of `text`, ascending.
        """
        shown = text.lstrip(self.characters) if self.left else text
        cuts: list[int] = []
        reached = 0
        for end in ends:
            cut = max(0, end - len(text) + len(shown))
            before, reached = reached, cut
            if self.right:
                # Only the text since the previous prefix is stripped, which keeps this linear.
                cut = before + len(shown[before:cut].rstrip(self.characters))
                if cut == before:
                    cut = cuts[-1] if cuts else 0
            cuts.append(cut)
        return shown, cuts


_TRIMS = (  # those that remove less come first
    Trim(),
    Trim(left=True, characters="\n"),
    Trim(right=True, characters="\n"),
    Trim(left=True, right=True, characters="\n"),
    Trim(left=True),
    Trim(right=True),
    Trim(left=True, right=True),
)


def detect_trim(render: Callable[[str], str], content: str) -> Trim:
    """Return how a template strips a message, found by rendering one padded with white space.

    Args:
        render: Renders a conversation in which a message has the given content.
        content: The message's words, which occur nowhere else in the conversation.
    """
    lines = "\n" * 9  # more than any template adds around a message
    padded = f"{lines}\t \n{content}\n \t{lines}"
    rendered = render(padded)
    return next((trim for trim in _TRIMS if trim(padded) in rendered), _TRIMS[-1])
