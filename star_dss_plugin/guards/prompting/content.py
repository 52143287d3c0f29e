"""Tokenize judged text so that it never contains a control token of the guard."""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence

from tokenizers import Encoding, Tokenizer
from transformers import PreTrainedTokenizerBase

from star_dss_plugin.engines.shared_prompts import SharedPrompts, common_prefix_length
from star_dss_plugin.errors import GuardError
from star_dss_plugin.guards.prompting.prefixes import PrefixTokenizer

__all__ = ["ContentTokenizer", "without_surrogates"]


class ContentTokenizer:
    """Tokenize with a guard's tokenizer, without its control tokens.

    Args:
        tokenizer: The guard's fast tokenizer.
        name: The guard's name, for errors.
        allowed: Ids of control tokens that content may contain.

    Attributes:
        control: Ids of the control tokens, by spelling: all added tokens except runs of white space
            (as in Gemma), which are ordinary text.

    Raises:
        GuardError: The tokenizer is not a fast one.
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
        # A post-processor would add tokens and move offsets.
        state.update(added_tokens=spaces, truncation=None, padding=None, post_processor=None)
        # A Unigram vocabulary contains the control tokens as pieces, so give them spellings that no
        # text has.
        if state["model"]["type"] == "Unigram":
            state["model"]["vocab"] = [
                ["\ue0f2" * 16 + piece if piece in self.control else piece, score]
                for piece, score in state["model"]["vocab"]
            ]
        self._plain = Tokenizer.from_str(json.dumps(state))
        self._prefixes = PrefixTokenizer(self._plain)

    def ids(self, text: str) -> list[int]:
        """Return the ids of a text.

        Raises:
            GuardError: The tokenizer turns a part of the text into a control token.
        """
        return self.ids_and_ends(text)[0]

    def ids_and_ends(self, text: str) -> tuple[list[int], list[int]]:
        """Return the ids of a text and each token's end in characters; raise like `ids`."""
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

    def prefixes(self, whole: str, cuts: Sequence[int], closing: str) -> SharedPrompts:
        """Return the ids of each `whole[:cut] + closing`, at about the cost of one `ids` call.

        Only prompts that contain a control token get their unreadable characters replaced, as when
        each is tokenized by itself.

        Raises:
            GuardError: See `ids`.
        """
        found = self._prefixes(whole, cuts, closing)
        if not (wrong := self._with_control_tokens(found)):
            return found
        # `_readable` replaces single characters, so the cuts stay valid.
        readable = self._prefixes(self._readable(whole), cuts, self._readable(closing))
        if self._with_control_tokens(readable):
            self.ids(whole + closing)  # raises the error
        # Prompts without a control token keep their ids; both kinds then share one trunk.
        same = common_prefix_length(found.trunk, readable.trunk)
        pieces = [
            piece if i in wrong else (min(same, kept), (*found.trunk[same:kept], *end))
            for i, (piece, (kept, end)) in enumerate(
                zip(readable.pieces, found.pieces, strict=True)
            )
        ]
        return SharedPrompts(readable.trunk, [n for n, _ in pieces], [end for _, end in pieces])

    def _with_control_tokens(self, prompts: SharedPrompts) -> set[int]:
        """Return the indices of the prompts that contain a control token."""
        clean = next(
            (i for i, token in enumerate(prompts.trunk) if token in self._forbidden),
            len(prompts.trunk),
        )
        return {
            i
            for i, (kept, end) in enumerate(prompts.pieces)
            if kept > clean or not self._forbidden.isdisjoint(end)
        }

    def _readable(self, text: str) -> str:
        """Replace each character that becomes a control token by "?".

        Characters that a vocabulary lacks can do so: Granite's unknown token ends a turn.
        """
        unknown = {c for c in set(text) if not self._forbidden.isdisjoint(self._encoding(c).ids)}
        return "".join("?" if char in unknown else char for char in text)

    def _encoding(self, text: str) -> Encoding:
        return self._plain.encode(text, add_special_tokens=False)


def without_surrogates(text: str) -> str:
    """Replace lone surrogates by "?": they have no UTF-8 form and cannot be tokenized."""
    return text.encode("utf-8", "replace").decode("utf-8")
