"""Tokens of text that is judged: whatever it says, none of them is a control token of the guard."""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence

from tokenizers import Encoding, Tokenizer
from transformers import PreTrainedTokenizerBase

from star_dss_plugin.errors import GuardError
from star_dss_plugin.guards.prompting.prefixes import PrefixTokenizer

__all__ = ["ContentTokenizer", "without_surrogates"]


class ContentTokenizer:
    """A guard's tokenizer that knows no control tokens.

    Args:
        tokenizer: The guard's fast tokenizer.
        name: The guard's name, for errors.
        allowed: Ids that content may become all the same.

    Attributes:
        control: The control tokens' ids by spelling. All added tokens are, but for runs of white
            space (Gemma's): those are ordinary text.

    Raises:
        GuardError: It is a slow tokenizer.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, name: str, allowed: Collection[int] = ()
    ) -> None:
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise GuardError(
                f"Guard {name!r} has a slow tokenizer ({type(tokenizer).__name__}), whose control "
                "tokens cannot be switched off in the text that is judged. Use a guard with a fast "
                "tokenizer (tokenizer.json)."
            )
        self._name = name
        added = {str(token): i for i, token in tokenizer.added_tokens_decoder.items()}
        self.control = {token: i for token, i in added.items() if token.strip(" \t\r\n▁")}
        self._forbidden = frozenset(self.control.values()) - frozenset(allowed)
        state = json.loads(backend.to_str())
        spaces = [t for t in state["added_tokens"] if t["content"] not in self.control]
        # Post-processors add tokens, and move where tokens end.
        state.update(added_tokens=spaces, truncation=None, padding=None, post_processor=None)
        if state["model"]["type"] == "Unigram":  # its vocabulary spells the control tokens out
            state["model"]["vocab"] = [
                ["\ue0f2" * 16 + piece if piece in self.control else piece, score]
                for piece, score in state["model"]["vocab"]
            ]
        self._plain = Tokenizer.from_str(json.dumps(state))
        self._prefixes = PrefixTokenizer(self._plain)

    def ids(self, text: str) -> list[int]:
        """The ids of a text.

        Raises:
            GuardError: Some of it became a control token.
        """
        return self.ids_and_ends(text)[0]

    def ids_and_ends(self, text: str) -> tuple[list[int], list[int]]:
        """The ids of a text, and where each of its tokens ends; raises what `ids` raises."""
        encoding = self._encoding(text)
        if not self._forbidden.isdisjoint(encoding.ids):
            encoding = self._encoding(self._readable(text))
        if not self._forbidden.isdisjoint(encoding.ids):
            raise GuardError(
                f"Text to be judged became a control token of guard {self._name!r} "
                f"({sorted(self._forbidden.intersection(encoding.ids))}). This guard's tokenizer "
                "cannot keep content apart; use another guard."
            )
        return encoding.ids, [end for _, end in encoding.offsets]

    def ids_of_all(self, texts: Sequence[str]) -> list[list[int]]:
        """`ids` of texts that begin alike."""
        return [
            ids if self._forbidden.isdisjoint(ids) else self.ids(text)
            for text, ids in zip(texts, self._prefixes(texts), strict=True)
        ]

    def _readable(self, text: str) -> str:
        """Text without the characters that the vocabulary lacks: "?" for each of them.

        Such a character may become a control token: Granite's unknown token ends a turn.
        """
        unknown = {c for c in set(text) if not self._forbidden.isdisjoint(self._encoding(c).ids)}
        return "".join("?" if char in unknown else char for char in text)

    def _encoding(self, text: str) -> Encoding:
        return self._plain.encode(text, add_special_tokens=False)


def without_surrogates(text: str) -> str:
    """Text that can be tokenized: a lone surrogate is no character and has no UTF-8 form."""
    return text.encode("utf-8", "replace").decode("utf-8")
