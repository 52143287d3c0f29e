"""Turn tokens back into text, exactly: which characters are complete after which token."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Mapping, Sequence
from functools import cache
from itertools import accumulate
from operator import itemgetter
from typing import Any
from weakref import WeakKeyDictionary

from transformers import PreTrainedTokenizerBase

__all__ = [
    "REPLACEMENT",
    "added_tokens",
    "byte_places",
    "decode",
    "special_ids",
    "spells_bytes",
    "token_boundaries",
]

_OVERLAP = 8
"""Boundaries back from which tokens are decoded again, so that a decoder sees a token's left
neighbours (some strip the first token's leading space)."""
REPLACEMENT = "\ufffd"  # what decoders write for a character whose bytes are not all there


def decode(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    """Return the text of some tokens, special ones included, nothing tidied up."""
    text = tokenizer.decode(
        list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False
    )
    assert isinstance(text, str)
    return text


def token_boundaries(
    tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], known: str | None = None
) -> tuple[str, list[int], list[bool]]:
    """Return the text of some tokens, and how far it reaches after each of them.

    Args:
        tokenizer: Whose tokens they are.
        ids: The tokens.
        known: A text that begins with the one that these tokens were made of, if that is known.

    Returns:
        The decoded text; for each token the number of its characters that are complete after that
        token; for each token whether the text is complete there (False inside a character that is
        spread over several tokens).
    """
    if (quick := _by_bytes(tokenizer, ids, known)) is not None:
        return quick
    text, kept = _readable(tokenizer, ids)
    whole, rest = ids[:kept], len(ids) - kept
    ends, complete = _boundaries(tokenizer, whole, text, _OVERLAP)
    if whole and not (complete[-1] and ends[-1] == len(text)):
        # A decoder whose output depends on tokens further back: decode every prefix in full.
        ends, complete = _boundaries(tokenizer, whole, text, len(whole))
    return text, ends + [len(text)] * rest, complete + [True] * rest


# One decoder call for all tokens, and arithmetic on their bytes


def _by_bytes(
    tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], known: str | None
) -> tuple[str, list[int], list[bool]] | None:
    """Return what `token_boundaries` does, from the bytes that each token stands for.

    Returns:
        None if the tokenizer's tokens are not known to be bytes, or their bytes are not the text
        that it decodes.
    """
    table = _table(tokenizer)
    if not (table.of_letters or table.of_pieces):
        return None
    spelled = _spelled(table, ids)
    if spelled is None:
        return None
    joined, begun, inside = spelled
    # The bytes are checked against what they were made of, or else against the decoded whole.
    same = table.of_letters and known is not None and known.startswith(joined)
    text = joined if same else decode(tokenizer, ids)
    stripped = 0
    if text != joined:
        # Decoders of pieces leave out the space that the tokenizer put before the text.
        if not table.of_pieces or joined != " " + text:
            return None
        stripped = 1
    if stripped:
        begun = [count - 1 for count in begun]
    if not inside:
        return text, begun, [True] * len(ids)
    # A character is complete where the next token begins another one.
    complete = [not within for within in inside[1:]] + [True]
    # Until then the text reaches to the last token that completed one.
    ends = accumulate((n if whole else 0 for n, whole in zip(begun, complete, strict=True)), max)
    return text, list(ends), complete


def spells_bytes(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Return whether a tokenizer's tokens spell bytes, so that places follow from them."""
    return _table(tokenizer).of_letters


def byte_places(
    tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], text: str
) -> tuple[list[int], list[int], bool] | None:
    """Return where tokens lie in a text that begins with theirs, from their bytes alone.

    Args:
        tokenizer: Whose tokens they are.
        ids: The tokens.
        text: What they may have been made of, or the beginning of that.

    Returns:
        For each token its first character and one past its last one; tokens that share a character
        all have it. Then whether there are no such tokens. None if their bytes are not known, or
        not those that the text begins with.
    """
    table = _table(tokenizer)
    if not table.of_letters:
        return None
    spelled = _spelled(table, ids)
    if spelled is None or not text.startswith(spelled[0]):
        return None
    _, ends, inside = spelled
    starts = [0, *ends[:-1]] if ends else []
    if inside:
        starts = [n - within for n, within in zip(starts, inside, strict=True)]
    return starts, ends, not inside


def _spelled(table: _Bytes, ids: Sequence[int]) -> tuple[str, list[int], list[bool]] | None:
    """Return what tokens spell.

    Returns:
        The text; how many characters of it begin up to the end of each token; for each token
        whether a character goes on in it that has begun before, empty if that is true of none.
        None if they are not tokens of bytes, or the bytes no text.
    """
    try:
        texts = list(map(table.texts.__getitem__, ids))
        return "".join(texts), list(accumulate(map(len, texts))), []
    except (KeyError, UnicodeDecodeError):
        pass  # a token is none of bytes, or has a part of a character
    try:
        parts = list(map(table.__getitem__, ids))
        joined = b"".join(map(_BYTES, parts)).decode("utf-8")
    except (KeyError, UnicodeDecodeError):
        return None
    return joined, list(accumulate(map(_BEGINS, parts))), list(map(_INSIDE, parts))


_BYTES, _BEGINS, _INSIDE = itemgetter(0), itemgetter(1), itemgetter(2)


class _Bytes(dict[int, tuple[bytes, int, bool]]):
    """The bytes of each token, how many characters begin in them, and whether one goes on in them.

    Args:
        tokenizer: Whose tokens they are. A missing key is an id that is no token of bytes.

    Attributes:
        of_letters: Whether tokens spell bytes as letters (GPT-2's way).
        of_pieces: Whether tokens are pieces of text, and single bytes `<0x0A>` (SentencePiece's).
        texts: What each token spells; a token with a part of a character is a UnicodeDecodeError.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        super().__init__()
        backend = getattr(tokenizer, "backend_tokenizer", None)
        decoder = json.loads(backend.to_str())["decoder"] if backend is not None else None
        steps = [] if decoder is None else decoder.get("decoders", [decoder])
        kinds = [step["type"] for step in steps]
        self.of_letters = kinds == ["ByteLevel"]
        replace = {"type": "Replace", "pattern": {"String": "\u2581"}, "content": " "}
        strip = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
        self.of_pieces = kinds[:3] == ["Replace", "ByteFallback", "Fuse"] and (
            steps[0] == replace and steps[3:] in ([], [strip])
        )
        self.texts = _Texts(self)
        # Not the tokenizer itself, which would keep itself in the table of tables.
        self._token = backend.id_to_token if backend is not None else None

    def __missing__(self, key: int) -> tuple[bytes, int, bool]:
        token = self._token(key) if self._token is not None else None
        if token is None:
            raise KeyError(key)
        if self.of_letters:
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


class _Texts(dict[int, str]):
    """The whole characters that each token spells, by the bytes of the tokens."""

    def __init__(self, table: _Bytes) -> None:
        super().__init__()
        self._table = table

    def __missing__(self, key: int) -> str:
        self[key] = self._table[key][0].decode("utf-8")
        return self[key]


_tables: WeakKeyDictionary[PreTrainedTokenizerBase, _Bytes] = WeakKeyDictionary()


def _table(tokenizer: PreTrainedTokenizerBase) -> _Bytes:
    """Return the bytes of a tokenizer's tokens, which are looked up once."""
    table = _tables.get(tokenizer)
    if table is None:
        table = _tables[tokenizer] = _Bytes(tokenizer)
    return table


@cache
def _letters() -> dict[str, int]:
    """Return the byte that each letter of a byte-level vocabulary spells."""
    printed = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printed]
    return {chr(byte): byte for byte in printed} | {
        chr(256 + i): byte for i, byte in enumerate(others)
    }


# Decoding windows of tokens: for any tokenizer


def _readable(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> tuple[str, int]:
    """Return the text of some tokens, and how many of them it takes.

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
    """Return whether a window ends inside a U+FFFD that the text itself holds.

    Its first byte looks like all of it, and the text does not grow with the other two.
    """
    later = range(n + 1, min(n + 2, len(ids)) + 1)
    return window.endswith(REPLACEMENT) and any(
        decode(tokenizer, ids[start:end]) == window for end in later
    )


def added_tokens(tokenizer: PreTrainedTokenizerBase) -> Mapping[int, Any]:
    """Return the tokens that were added to a tokenizer's vocabulary, by id.

    Tokenizers of mistral-common add none: their control tokens are part of the vocabulary.
    """
    added: Any = tokenizer.added_tokens_decoder  # mistral-common's: a method, not implemented
    return added if isinstance(added, Mapping) else {}


def special_ids(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Return the ids of the tokenizer's control tokens."""
    added = added_tokens(tokenizer)
    return frozenset(tokenizer.all_special_ids) | {i for i, t in added.items() if t.special}
