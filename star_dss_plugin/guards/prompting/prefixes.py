"""Tokenize all prefixes of a text at the cost of the text and a few words around each cut.

Byte-level tokenizers split a text into words (pre-tokens) with a regular expression and tokenize
each word by itself, so a prefix has the tokens of the whole text up to a few words before its end.
With other tokenizers, every prefix is tokenized from its start.
"""

from __future__ import annotations

import json
import re
import unicodedata
from bisect import bisect_right
from collections.abc import Sequence
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from star_dss_plugin.engines.shared_prompts import SharedPrompts

__all__ = ["PrefixTokenizer"]

_WORDS_BACK = 3
"""Number of words before the cut's own word that are tokenized again.

Where a word ends depends on the next character or, for white space, on the character after the run
of white space. The expressions split a run of white space into at most three words.
"""

_CHARACTERS_AT_A_TIME = 1 << 20  # of prefixes that are tokenized from their start

# Matches expressions in which a word may depend on text before it, or on distant text after it. "^"
# is an anchor unless it negates a class; "(?!\S)" is harmless, as it looks at one character.
_LOOKS_AROUND = re.compile(r"\(\?<|\(\?=|\(\?!(?!\\S\))|\\[AGbBKzZ]|(?<!\[)\^|\$")


class PrefixTokenizer:
    """Tokenize prefixes of one text, each followed by the same closing text.

    Args:
        tokenizer: A tokenizer without control tokens.

    Attributes:
        works_by_words: Whether prefixes reuse the tokens of the whole text.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        state = json.loads(tokenizer.to_str())
        # Some post-processors move a word's start offset past its leading space.
        state["post_processor"] = None
        self._tokenizer = Tokenizer.from_str(json.dumps(state))
        # An added token is split off before the text is split into words.
        self.works_by_words = not state["added_tokens"] and _works_by_words(state)
        self._normalizes = _normalizer(state) is not None
        # These bytes vanish, so offsets would no longer match the text.
        self._lost = frozenset(_lost_bytes(state["model"]))

    def __call__(self, whole: str, cuts: Sequence[int], closing: str) -> SharedPrompts:
        """Return the ids of each `whole[:cut] + closing`, as if each were tokenized alone."""
        encoding = self._tokenizer.encode(whole, add_special_tokens=False)
        if (
            not self.works_by_words
            or (self._normalizes and not unicodedata.is_normalized("NFC", whole))
            or (self._lost and not self._lost.isdisjoint(whole.encode()))
        ):
            return self._each(encoding.ids, whole, cuts, closing)
        offsets, words = encoding.offsets, encoding.word_ids
        # The start of each word: its first token and its first character.
        firsts = [i for i, word in enumerate(words) if i == 0 or word != words[i - 1]]
        characters = [offsets[i][0] for i in firsts]
        kept, rests = [], []
        for cut in cuts:
            word = bisect_right(characters, cut) - 1 - _WORDS_BACK
            token, character = (firsts[word], characters[word]) if word > 0 else (0, 0)
            kept.append(token)
            rests.append(whole[character:cut] + closing)
        tails = self._tokenizer.encode_batch_fast(rests, add_special_tokens=False)
        return SharedPrompts(encoding.ids, kept, [tail.ids for tail in tails])

    def _each(
        self, trunk: Sequence[int], whole: str, cuts: Sequence[int], closing: str
    ) -> SharedPrompts:
        """Return the ids of each prefix, tokenized from its start, a few at a time."""
        known = np.asarray(trunk, dtype=np.int64)
        kept, ends = [], []
        size = max(1, _CHARACTERS_AT_A_TIME // (len(whole) + len(closing) + 1))
        for first in range(0, len(cuts), size):
            texts = [whole[:cut] + closing for cut in cuts[first : first + size]]
            for found in self._tokenizer.encode_batch_fast(texts, add_special_tokens=False):
                ids = found.ids
                both = min(len(ids), len(known))
                other = np.flatnonzero(np.asarray(ids[:both], dtype=np.int64) != known[:both])
                kept.append(int(other[0]) if len(other) else both)
                ends.append(ids[kept[-1] :])
        return SharedPrompts(trunk, kept, ends)


def _lost_bytes(model: dict[str, Any]) -> list[int]:
    """Return the bytes that a byte-level vocabulary cannot represent and drops."""
    if model.get("unk_token") is not None:
        return []
    printed = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printed]
    spelling = {byte: chr(byte) for byte in printed}
    spelling |= {byte: chr(256 + i) for i, byte in enumerate(others)}
    return [byte for byte, char in spelling.items() if char not in model["vocab"]]


def _normalizer(state: dict[str, Any]) -> dict[str, Any] | None:
    """Return a tokenizer's normalizer; None for no normalizer or an empty sequence (GGUF files)."""
    found = state["normalizer"]
    return found if found != {"type": "Sequence", "normalizers": []} else None


def _works_by_words(state: dict[str, Any]) -> bool:
    """Return whether a tokenizer splits text into words and encodes each word by itself."""
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
    # Exactly one expression, because a second would split the words of the first.
    return (
        len(kinds) == 2
        and kinds[0]["type"] == "Split"
        and kinds[0]["behavior"] == "Isolated"
        and not kinds[0]["invert"]
        and not _LOOKS_AROUND.search(kinds[0]["pattern"].get("Regex", "^"))
    )
