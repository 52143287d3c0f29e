"""From tokens back to text, exactly: which characters are complete after which token."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

__all__ = ["REPLACEMENT", "decode", "special_ids", "token_boundaries"]

_OVERLAP = 8
"""Boundaries back from which tokens are decoded again, so that a decoder sees a token's left
neighbours (some strip the first token's leading space)."""
REPLACEMENT = "\ufffd"  # what decoders write for a character whose bytes are not all there


def decode(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    """The text of some tokens, special ones included, nothing tidied up."""
    text = tokenizer.decode(
        list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False
    )
    assert isinstance(text, str)
    return text


def token_boundaries(
    tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]
) -> tuple[str, list[int], list[bool]]:
    """The text of some tokens, and how far it reaches after each of them.

    Returns:
        The decoded text; for each token the number of its characters that are complete after that
        token; for each token whether the text is complete there (False inside a character that is
        spread over several tokens).
    """
    text, kept = _readable(tokenizer, ids)
    whole, rest = ids[:kept], len(ids) - kept
    ends, complete = _boundaries(tokenizer, whole, text, _OVERLAP)
    if whole and not (complete[-1] and ends[-1] == len(text)):
        # A decoder whose output depends on tokens further back: decode every prefix in full.
        ends, complete = _boundaries(tokenizer, whole, text, len(whole))
    return text, ends + [len(text)] * rest, complete + [True] * rest


def _readable(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> tuple[str, int]:
    """The text of some tokens, and how many of them it takes.

    All of them, but for this: truncation may leave the first bytes of a character, for which
    decoders that fall back to bytes give up on all the bytes before it too. Those are left out.
    """
    text = decode(tokenizer, ids)
    if text.endswith(REPLACEMENT):
        for kept in range(len(ids) - 1, max(0, len(ids) - 4), -1):
            shorter = decode(tokenizer, ids[:kept])
            if not shorter.endswith(REPLACEMENT):
                return (text, len(ids)) if text.startswith(shorter) else (shorter, kept)
    return text, len(ids)


def _boundaries(
    tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], text: str, overlap: int
) -> tuple[list[int], list[bool]]:
    ends: list[int] = []
    complete: list[bool] = []
    chars, seen = 0, ""  # up to the last boundary: characters, text of the window
    # A window begins at a boundary: where bytes are tokens, a decoder that meets the second half of
    # a character gives up on all bytes behind it too.
    starts = deque([0], maxlen=overlap + 1)
    for n in range(1, len(ids) + 1):
        start = starts[0]
        window = decode(tokenizer, ids[start:n])
        piece = window[len(seen) :]
        at_boundary = (
            window.startswith(seen)
            and text.startswith(piece, chars)
            and not _cuts_replacement(tokenizer, ids, start, n, window)
        )
        if at_boundary:
            chars += len(piece)
            starts.append(n)
            seen = window if starts[0] == start else decode(tokenizer, ids[starts[0] : n])
        ends.append(chars)
        complete.append(at_boundary)
    return ends, complete


def _cuts_replacement(
    tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], start: int, n: int, window: str
) -> bool:
    """Whether a window ends inside a U+FFFD that the text itself holds.

    Its first byte looks like all of it, and the text does not grow with the other two.
    """
    later = range(n + 1, min(n + 2, len(ids)) + 1)
    return window.endswith(REPLACEMENT) and any(
        decode(tokenizer, ids[start:end]) == window for end in later
    )


def special_ids(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Return the ids of the tokenizer's control tokens."""
    named = frozenset(tokenizer.all_special_ids)
    added: Any = tokenizer.added_tokens_decoder
    if not isinstance(added, Mapping):  # mistral-common has a method that is not implemented:
        return named  # all of its control tokens have names
    return named | {i for i, token in added.items() if token.special}
