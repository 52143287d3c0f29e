"""Tokens of all prefixes of a text, at the price of the text and a few words around each cut.

Byte-level tokenizers cut a text into words with a regular expression and tokenize each word by
itself, so a prefix has the tokens of the whole text up to a few words before its end. Tokenizers
that are not known to work so get every prefix whole.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Sequence
from typing import Any

from tokenizers import Tokenizer

__all__ = ["PrefixTokenizer"]

_WORDS_BACK = 3
"""Words before the cut's own that are tokenized again.

What ends a word is seen in the character behind it, or, for white space, behind the run of white
space that it is part of; words cut a run into at most three.
"""

# A word that depends on what stands before it, or anywhere behind it. "^" negates a class and is an
# anchor elsewhere; "(?!\S)" looks at one character.
_LOOKS_AROUND = re.compile(r"\(\?<|\(\?=|\(\?!(?!\\S\))|\\[AGbBKzZ]|(?<!\[)\^|\$")


class PrefixTokenizer:
    """Token ids of texts that begin alike.

    Args:
        tokenizer: Without control tokens: nothing but text is ever given to it.

    Attributes:
        works_by_words: Whether prefixes are taken from the whole text's tokens.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        state = json.loads(tokenizer.to_str())
        # Some post-processors move a word's offset behind its leading space.
        state["post_processor"] = None
        self._tokenizer = Tokenizer.from_str(json.dumps(state))
        # An added token is cut out before there are words.
        self.works_by_words = not state["added_tokens"] and _works_by_words(state)
        self._normalizes = _normalizer(state) is not None
        # Without an unknown token they leave no trace, and offsets no longer say what is where.
        self._lost = frozenset(_lost_bytes(state["model"]))

    def __call__(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of each text, as if it were tokenized alone."""
        whole = max(texts, key=len)
        if (
            not self.works_by_words
            or (self._normalizes and not unicodedata.is_normalized("NFC", whole))
            or (self._lost and not self._lost.isdisjoint(whole.encode()))
        ):
            found = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
            return [encoding.ids for encoding in found]
        encoding = self._tokenizer.encode(whole, add_special_tokens=False)
        ids, offsets, words = encoding.ids, encoding.offsets, encoding.word_ids
        # Where each word begins: its first token and its first character.
        starts = [
            (i, offsets[i][0]) for i, word in enumerate(words) if i == 0 or word != words[i - 1]
        ]
        kept, rests, word = [], [], 0
        for text in texts:
            shared = _common_length(text, whole)
            # Neighbours in `texts` share about as much: the search begins at the last one's word.
            while word > 0 and starts[word][1] > shared:
                word -= 1
            while word + 1 < len(starts) and starts[word + 1][1] <= shared:
                word += 1
            token, character = starts[max(0, word - _WORDS_BACK)] if starts else (0, 0)
            kept.append(token)
            rests.append(text[character:])
        tails = self._tokenizer.encode_batch_fast(rests, add_special_tokens=False)
        return [ids[:token] + tail.ids for token, tail in zip(kept, tails, strict=True)]


def _common_length(one: str, two: str) -> int:
    """How many first characters two texts share."""
    low, high = 0, min(len(one), len(two))
    while low < high:
        middle = (low + high + 1) // 2
        if one[low:middle] == two[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def _lost_bytes(model: dict[str, Any]) -> list[int]:
    """The bytes that a byte-level vocabulary cannot spell and drops."""
    if model.get("unk_token") is not None:
        return []
    printed = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printed]
    spelling = {byte: chr(byte) for byte in printed}
    spelling |= {byte: chr(256 + i) for i, byte in enumerate(others)}
    return [byte for byte, char in spelling.items() if char not in model["vocab"]]


def _normalizer(state: dict[str, Any]) -> dict[str, Any] | None:
    """A tokenizer's normalizer; an empty sequence of them, as in GGUF files, is none."""
    found = state["normalizer"]
    return found if found != {"type": "Sequence", "normalizers": []} else None


def _works_by_words(state: dict[str, Any]) -> bool:
    """Whether a tokenizer cuts text into words from left to right, each tokenized by itself."""
    normalizer, model = _normalizer(state), state["model"]
    if normalizer is not None and normalizer["type"] != "NFC":
        return False
    if model["type"] != "BPE" or model.get("dropout"):
        return False
    step = state["pre_tokenizer"] or {"type": "none"}
    kinds = step["pretokenizers"] if step["type"] == "Sequence" else [step]
    if kinds[-1]["type"] != "ByteLevel" or kinds[-1]["add_prefix_space"]:
        return False
    if kinds[-1].get("use_regex", True):
        return all(k["type"] == "Digits" and k["individual_digits"] for k in kinds[:-1])
    # One expression only: the words of a second one would not be those of the first.
    return (
        len(kinds) == 2
        and kinds[0]["type"] == "Split"
        and kinds[0]["behavior"] == "Isolated"
        and not kinds[0]["invert"]
        and not _LOOKS_AROUND.search(kinds[0]["pattern"].get("Regex", "^"))
    )
