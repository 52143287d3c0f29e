"""Decode tokens into text, with the number of complete characters after each token."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any

from transformers import PreTrainedTokenizerBase

from star_dss_plugin.data.token_bytes import join_bytes, token_bytes

__all__ = [
    "REPLACEMENT",
    "added_tokens",
    "decode",
    "special_ids",
    "token_boundaries",
]

_OVERLAP = 8
"""How many boundaries before a token its decoding window begins, so that the decoder sees the
token's left neighbours (some decoders strip the first token's leading space)."""
REPLACEMENT = "\ufffd"  # decoders write it for incomplete UTF-8


def decode(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    """Decode tokens, special ones included, without cleaning up spaces."""
    text = tokenizer.decode(
        list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False
    )
    assert isinstance(text, str)
    return text


def token_boundaries(
    tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], known: str | None = None
) -> tuple[str, list[int], list[bool]]:
    """Decode tokens, and return how much of the text is complete after each of them.

    Args:
        tokenizer: The tokens' tokenizer.
        ids: The tokens.
        known: A text that begins with the text that was tokenized, if known; a shortcut.

    Returns:
        The decoded text; for each token the number of characters of the text that are complete
        after that token; for each token whether it ends at a character's boundary (False if the
        next token continues the same character).
    """
    if (quick := _by_bytes(tokenizer, ids, known)) is not None:
        return quick
    text, kept = _readable(tokenizer, ids)
    whole, rest = ids[:kept], len(ids) - kept
    ends, complete = _boundaries(tokenizer, whole, text, _OVERLAP)
    if whole and not (complete[-1] and ends[-1] == len(text)):
        # The decoder's output depends on tokens further back: decode every prefix in full.
        ends, complete = _boundaries(tokenizer, whole, text, len(whole))
    return text, ends + [len(text)] * rest, complete + [True] * rest


# Fast path: one decoder call for all tokens, and positions from their bytes


def _by_bytes(
    tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], known: str | None
) -> tuple[str, list[int], list[bool]] | None:
    """Compute `token_boundaries` from each token's bytes.

    Returns:
        None if the tokens' bytes are not known, or differ from the decoded text.
    """
    table = token_bytes(tokenizer)
    if not (table.byte_level or table.byte_fallback):
        return None
    spelled = join_bytes(table, ids)
    if spelled is None:
        return None
    joined, begun, inside = spelled
    # The bytes are checked against the known text, or else against the decoded text.
    same = table.byte_level and known is not None and known.startswith(joined)
    text = joined if same else decode(tokenizer, ids)
    stripped = 0
    if text != joined:
        # SentencePiece decoders drop the space that the tokenizer put before the text.
        if not table.byte_fallback or joined != " " + text:
            return None
        stripped = 1
    if stripped:
        begun = [count - 1 for count in begun]
    if not inside:
        return text, begun, [True] * len(ids)
    # A token ends at a boundary if the next token begins a new character.
    complete = [not within for within in inside[1:]] + [True]
    # Elsewhere the complete text ends at the last boundary before.
    ends = accumulate((n if whole else 0 for n, whole in zip(begun, complete, strict=True)), max)
    return text, list(ends), complete


# Slow path for any tokenizer: decoding windows of tokens


def _readable(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> tuple[str, int]:
    """Return the text of tokens, without an incomplete last character that spoils earlier text.

    Truncation may leave only the first bytes of a character, and byte-fallback decoders then
    replace all bytes before it too.

    Returns:
        The text, and the number of leading tokens that it decodes.
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
    """Compute `token_boundaries` of a decoded text by decoding a window for each token.

    Args:
        tokenizer: The tokens' tokenizer.
        ids: The tokens.
        text: Their text.
        overlap: How many boundaries before a token its window begins.
    """
    ends: list[int] = []
    complete: list[bool] = []
    chars, seen = 0, ""  # up to the last boundary: characters, text of the window
    # A window begins at a boundary because a byte-fallback decoder that begins within a character
    # replaces all the bytes that follow.
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
    """Return whether a window ends inside a U+FFFD that the text itself contains.

    Its first byte decodes to U+FFFD already, so the text does not grow with the other two.
    """
    later = range(n + 1, min(n + 2, len(ids)) + 1)
    return window.endswith(REPLACEMENT) and any(
        decode(tokenizer, ids[start:end]) == window for end in later
    )


def added_tokens(tokenizer: PreTrainedTokenizerBase) -> Mapping[int, Any]:
    """Return a tokenizer's added tokens by id.

    mistral-common's tokenizers have none: their control tokens are part of the vocabulary.
    """
    added: Any = tokenizer.added_tokens_decoder  # mistral-common's: a method, not implemented
    return added if isinstance(added, Mapping) else {}


def special_ids(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Return the ids of the tokenizer's control tokens."""
    added = added_tokens(tokenizer)
    return frozenset(tokenizer.all_special_ids) | {i for i, t in added.items() if t.special}
