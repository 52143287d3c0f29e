"""Hold the tokens of a text with their character offsets, and compare texts and tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from star_dss_plugin.errors import DataError

__all__ = [
    "Encoded",
    "checked_utf8",
    "common_prefix_length",
    "common_text_length",
    "encoded_with_offsets",
]


@dataclass(frozen=True)
class Encoded:
    """The tokens of a text and their character offsets.

    Attributes:
        ids: Token ids.
        starts: Offset of each token's first character; never decreasing.
        ends: Offset one past each token's last character. Tokens that share a character all end
            behind it.
        exact: Whether each token's bytes are known to be exactly the characters between its
            offsets, so that no character is split between tokens.
    """

    ids: list[int]
    starts: list[int]
    ends: list[int]
    exact: bool = False


def encoded_with_offsets(text: str, ids: list[int], offsets: Sequence[tuple[int, int]]) -> Encoded:
    """Return tokens with monotonic offsets that include the white space between tokens."""
    if not ids:
        return Encoded([], [], [])
    starts, ends = map(list, zip(*offsets, strict=True))
    if starts[1:] == ends[:-1]:
        return Encoded(ids, starts, ends)
    reached = begun = 0
    for n, (start, end) in enumerate(offsets):
        # Some tokenizers exclude spaces from their offsets (GPT-2's, Llama 3's).
        if start > reached and text[reached:start].isspace():
            start = reached
        begun, reached = max(begun, start), max(reached, end)
        starts[n], ends[n] = begun, reached
    return Encoded(ids, starts, ends)


def common_text_length(one: str, two: str) -> int:
    """Return how many leading characters two texts share."""
    low, high = 0, min(len(one), len(two))
    while low < high:
        middle = (low + high + 1) // 2
        if one.startswith(two[low:middle], low):
            low = middle
        else:
            high = middle - 1
    return low


def common_prefix_length(one: Sequence[int], two: Sequence[int]) -> int:
    """Return how many leading tokens two sequences share."""
    most = min(len(one), len(two))
    return next((i for i in range(most) if one[i] != two[i]), most)


def checked_utf8(text: str) -> str:
    """Return a text unchanged after checking that it can be encoded in UTF-8.

    Raises:
        DataError: The text contains a lone surrogate, which JSON can spell and tokenizers reject.
    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        around = ascii(text[max(0, error.start - 20) : error.end + 20])
        raise DataError(
            f"The row's text has half a character (a lone surrogate), here: {around}. Remove it."
        ) from error
    return text
