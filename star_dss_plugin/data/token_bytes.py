"""Read the bytes of each token from byte-level and byte-fallback tokenizers.

Character offsets follow from these bytes without decoding, which is much faster.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cache
from itertools import accumulate
from operator import itemgetter
from weakref import WeakKeyDictionary

from transformers import PreTrainedTokenizerBase

__all__ = ["TokenBytes", "byte_offsets", "is_byte_level", "join_bytes", "token_bytes"]

_BYTES, _BEGINS, _INSIDE = itemgetter(0), itemgetter(1), itemgetter(2)


class TokenBytes(dict[int, tuple[bytes, int, bool]]):
    """By token id: its bytes, how many characters begin in it, whether it begins within one.

    Args:
        tokenizer: The tokens' tokenizer. An id without a token raises KeyError.

    Attributes:
        byte_level: Whether each letter of a token stands for a byte (as in GPT-2).
        byte_fallback: Whether tokens are text or single bytes such as `<0x0A>` (SentencePiece).
        texts: Each token's text; UnicodeDecodeError if it contains only a part of a character.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        super().__init__()
        backend = getattr(tokenizer, "backend_tokenizer", None)
        decoder = json.loads(backend.to_str())["decoder"] if backend is not None else None
        steps = [] if decoder is None else decoder.get("decoders", [decoder])
        kinds = [step["type"] for step in steps]
        self.byte_level = kinds == ["ByteLevel"]
        replace = {"type": "Replace", "pattern": {"String": "\u2581"}, "content": " "}
        strip = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
        self.byte_fallback = kinds[:3] == ["Replace", "ByteFallback", "Fuse"] and (
            steps[0] == replace and steps[3:] in ([], [strip])
        )
        self.texts = _TokenTexts(self)
        # A reference to the tokenizer would keep its own weak key in `_tables` alive.
        self._token = backend.id_to_token if backend is not None else None

    def __missing__(self, key: int) -> tuple[bytes, int, bool]:
        token = self._token(key) if self._token is not None else None
        if token is None:
            raise KeyError(key)
        if self.byte_level:
            letters = _letters()
            try:
                found = bytes(letters[letter] for letter in token)
            except KeyError:
                found = token.encode("utf-8", "replace")
        elif len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            found = bytes.fromhex(token[3:5])
        else:
            found = token.replace("\u2581", " ").encode("utf-8", "replace")
        begins = sum(byte & 0xC0 != 0x80 for byte in found)
        inside = bool(found) and found[0] & 0xC0 == 0x80
        self[key] = found, begins, inside
        return self[key]


class _TokenTexts(dict[int, str]):
    """The text of each token that consists of whole characters, by token id."""

    def __init__(self, table: TokenBytes) -> None:
        super().__init__()
        self._table = table

    def __missing__(self, key: int) -> str:
        self[key] = self._table[key][0].decode("utf-8")
        return self[key]


_tables: WeakKeyDictionary[PreTrainedTokenizerBase, TokenBytes] = WeakKeyDictionary()


def token_bytes(tokenizer: PreTrainedTokenizerBase) -> TokenBytes:
    """Return the cached token bytes of a tokenizer."""
    table = _tables.get(tokenizer)
    if table is None:
        table = _tables[tokenizer] = TokenBytes(tokenizer)
    return table


@cache
def _letters() -> dict[str, int]:
    """Return the byte that each letter of a byte-level vocabulary stands for."""
    printed = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printed]
    return {chr(byte): byte for byte in printed} | {
        chr(256 + i): byte for i, byte in enumerate(others)
    }


def join_bytes(table: TokenBytes, ids: Sequence[int]) -> tuple[str, list[int], list[bool]] | None:
    """Join the bytes of tokens.

    Returns:
        The text; the number of characters that have begun by the end of each token; for each token
        whether it begins within a character (an empty list if no token does). None if a token's
        bytes are not known, or the joined bytes are not UTF-8.
    """
    try:
        texts = list(map(table.texts.__getitem__, ids))
        return "".join(texts), list(accumulate(map(len, texts))), []
    except (KeyError, UnicodeDecodeError):
        pass  # a token's bytes are unknown or not whole characters
    try:
        parts = list(map(table.__getitem__, ids))
        joined = b"".join(map(_BYTES, parts)).decode("utf-8")
    except (KeyError, UnicodeDecodeError):
        return None
    return joined, list(accumulate(map(_BEGINS, parts))), list(map(_INSIDE, parts))


def is_byte_level(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Return whether a tokenizer is byte-level, so that offsets follow from its tokens' bytes."""
    return token_bytes(tokenizer).byte_level


def byte_offsets(
    tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], text: str
) -> tuple[list[int], list[int], bool] | None:
    """Return the character offsets of tokens in a text that begins with them.

    Args:
        tokenizer: The tokens' tokenizer.
        ids: The tokens.
        text: The text whose beginning they may spell.

    Returns:
        Each token's start; each token's end; and whether no character is split between tokens
        (tokens that share a character all include it). None if the tokenizer is not byte-level, or
        the text does not begin with the tokens' bytes.
    """
    table = token_bytes(tokenizer)
    if not table.byte_level:
        return None
    spelled = join_bytes(table, ids)
    if spelled is None or not text.startswith(spelled[0]):
        return None
    _, ends, inside = spelled
    starts = [0, *ends[:-1]] if ends else []
    if inside:
        starts = [n - within for n, within in zip(starts, inside, strict=True)]
    return starts, ends, not inside
