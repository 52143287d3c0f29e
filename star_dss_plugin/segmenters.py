"""Split a response into chunks (paper, section 3: a STAR score per chunk of M units).

A segmenter only proposes chunk ends. `chunk_ends` makes the proposal valid: chunks partition the
response, and none ends inside a character that is split between tokens.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from typing import Protocol

__all__ = ["Segmenter", "chunk_ends", "sentences", "tokens", "whole", "words"]


# Western punctuation inside a word (3.5) does not end a sentence; Chinese and Japanese punctuation
# needs no space after it. All quantifiers are possessive, so that matching takes linear time.
_STOP = r"[.!?]++[\"'”’)\]]*+"
_WIDE_STOP = r"[。！？][.!?。！？]*+[\"'”’」』）)\]]*+"
_SENTENCE = re.compile(rf"(?=\S)(?:[^.!?。！？\n]++|{_STOP}(?=\S))*+(?:{_WIDE_STOP}|{_STOP})?+")


class Segmenter(Protocol):
    """Propose chunk ends for one response."""

    def __call__(self, text: str, token_char_ends: Sequence[int], chunk_size: int) -> Iterable[int]:
        """Propose chunk ends for one response.

        Args:
            text: The response, the exact decoding of its tokens.
            token_char_ends: For each token, the number of characters of `text` that are complete
                after it; non-decreasing, and the last is len(text).
            chunk_size: M >= 1, the number of units per chunk.

        Returns:
            Chunk ends as numbers of tokens, in any order. Values outside [1, len(token_char_ends)]
            are dropped, and the end of the response is always added.
        """
        ...


def tokens(text: str, token_char_ends: Sequence[int], chunk_size: int) -> Iterable[int]:
    """End a chunk after every `chunk_size` trained tokens (the default)."""
    return range(chunk_size, len(token_char_ends), chunk_size)


def words(text: str, token_char_ends: Sequence[int], chunk_size: int) -> Iterable[int]:
    """End a chunk after every `chunk_size` whitespace-separated words (the authors' unit).

    Ends are computed from the words' offsets in the text.
    """
    return _every(re.finditer(r"\S+", text), token_char_ends, chunk_size)


def sentences(text: str, token_char_ends: Sequence[int], chunk_size: int) -> Iterable[int]:
    """End a chunk after every `chunk_size` sentences.

    A sentence ends at a run of .!? (with closing quotes) or at a line break.
    """
    return _every(_SENTENCE.finditer(text), token_char_ends, chunk_size)


def whole(text: str, token_char_ends: Sequence[int], chunk_size: int) -> Iterable[int]:
    """Use one chunk, and so one score, for the whole response; `chunk_size` has no effect."""
    return ()


def _every(
    units: Iterable[re.Match[str]], token_char_ends: Sequence[int], chunk_size: int
) -> list[int]:
    """Return the ends of every `chunk_size`-th unit as numbers of tokens."""
    ends = [unit.end() for unit in units][chunk_size - 1 :: chunk_size]
    return [bisect_left(token_char_ends, end) + 1 for end in ends]


def chunk_ends(proposed: Iterable[int], boundaries: Sequence[bool]) -> tuple[int, ...]:
    """Return the valid chunk ends of a segmenter's proposal.

    Args:
        proposed: Numbers of tokens, in any order.
        boundaries: For each token, whether it ends at a character's boundary.

    Returns:
        Strictly increasing numbers of tokens, of which the last is `len(boundaries)`. A proposed
        end inside a character moves to the token that completes the character. Empty for an empty
        response.
    """
    length = len(boundaries)
    legal = {end for end in proposed if 1 <= end <= length}
    if not all(boundaries):
        complete = [n for n, whole in enumerate(boundaries, 1) if whole or n == length]
        legal = {complete[bisect_left(complete, end)] for end in legal}
    if length:
        legal.add(length)
    return tuple(sorted(legal))
