"""Render and tokenize conversations with a tokenizer and its chat template."""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from transformers import PreTrainedTokenizerBase

from star_dss_plugin.data.decoding import added_tokens, special_ids, token_boundaries
from star_dss_plugin.data.requests import Message
from star_dss_plugin.data.templates.encoded import (
    Encoded,
    checked_utf8,
    common_prefix_length,
    common_text_length,
    encoded_with_offsets,
)
from star_dss_plugin.data.token_bytes import byte_offsets, is_byte_level
from star_dss_plugin.errors import DataError

__all__ = ["ChatTokenizer"]

_TAILS = 1024  # entries of `_tails` at most, each of at most `_TAIL` characters
_TAIL = 64
_PROBE = "\ue0f0{}\ue0f1"  # private-use characters, which no template treats specially


@dataclass(frozen=True, eq=False)
class ChatTokenizer:
    """A tokenizer and the chat template of its conversations.

    Attributes:
        tokenizer: The trained model's.
        chat_template: The Jinja source; None: the tokenizer's own.
        template_arguments: Template variables for every row.
        others: Other templates that a tokenized row may have been rendered with.
        read_prompt: Returns the messages of a prompt that was tokenized without a chat template
            (an instruction format, for example), or None if they are uncertain.
    """

    tokenizer: PreTrainedTokenizerBase
    chat_template: str | None = None
    template_arguments: Mapping[str, Any] = field(default_factory=dict)
    others: tuple[ChatTokenizer, ...] = ()
    read_prompt: Callable[[Sequence[int]], tuple[Message, ...] | None] | None = None

    def render(self, messages: Sequence[Mapping[str, Any]], /, **kwargs: Any) -> str:
        """Render messages with the chat template.

        Args:
            messages: At least one message.
            **kwargs: Template variables, and arguments of `apply_chat_template`.

        Raises:
            DataError: There are no messages, there is no template, or the template fails.
        """
        if not messages:
            raise DataError("The row has no messages: its list is empty. Remove the row.")
        kwargs = {"chat_template": self.chat_template, **self.template_arguments, **kwargs}
        try:
            text = self.tokenizer.apply_chat_template(
                [dict(m) for m in messages], tokenize=False, **kwargs
            )
        except Exception as error:  # a template is a program and can raise anything
            raise DataError(
                f"The chat template cannot render the row's messages: {str(error) or type(error)}"
            ) from error
        assert isinstance(text, str)
        return text

    def encode(self, text: str, *, add_special_tokens: bool = False) -> Encoded:
        """Tokenize a text, and return the tokens with their character offsets.

        Args:
            text: Any text.
            add_special_tokens: Whether the tokenizer adds its special tokens, as hosts do for
                plain texts. A rendered conversation contains them already.

        Raises:
            DataError: The text contains a lone surrogate, which no tokenizer accepts.
        """
        (found,) = self.encode_all([text], add_special_tokens=add_special_tokens)
        return found

    def encode_all(
        self, texts: Sequence[str], *, add_special_tokens: bool = False
    ) -> list[Encoded]:
        """Tokenize texts in one batch, which is faster than calling `encode` for each.

        Raises:
            DataError: A text contains a lone surrogate.
        """
        texts = [checked_utf8(text) for text in texts]
        if not self._fast:
            return [self._one(text, add_special_tokens) for text in texts]
        # The backend is called directly because the tokenizer's own call also builds model inputs.
        backend = self.tokenizer.backend_tokenizer
        if not is_byte_level(self.tokenizer):
            batch = backend.encode_batch(texts, add_special_tokens=add_special_tokens)
            made = zip(texts, batch, strict=True)
            return [encoded_with_offsets(text, found.ids, found.offsets) for text, found in made]
        # Computing offsets from the tokens' bytes is much faster than asking the backend for them.
        batch = backend.encode_batch_fast(texts, add_special_tokens=add_special_tokens)
        encoded = []
        for text, found in zip(texts, batch, strict=True):
            ids = found.ids
            places = byte_offsets(self.tokenizer, ids, text)
            if places is not None and (places[1] or [0])[-1] == len(text):
                encoded.append(Encoded(ids, *places))
            else:
                again = backend.encode(text, add_special_tokens=add_special_tokens)
                encoded.append(encoded_with_offsets(text, again.ids, again.offsets))
        return encoded

    def _one(self, text: str, add_special_tokens: bool) -> Encoded:
        """Tokenize a text through the tokenizer instead of its backend."""
        if self.tokenizer.is_fast:
            made = self.tokenizer(
                text, add_special_tokens=add_special_tokens, return_offsets_mapping=True
            )
            return encoded_with_offsets(text, list(made["input_ids"]), made["offset_mapping"])
        ids = list(self.tokenizer(text, add_special_tokens=add_special_tokens)["input_ids"])
        _, ends, _ = token_boundaries(self.tokenizer, ids)
        return Encoded(ids, [0, *ends[:-1]] if ends else [], ends)

    def shared_tokens(self, encoded: Encoded, text: str, question: str) -> int:
        """Return how many leading tokens a conversation and a rendered prompt share.

        Args:
            encoded: The tokens of `text`.
            text: The rendered conversation.
            question: The rendered prompt, usually a prefix of `text`.

        Raises:
            DataError: `question` contains a lone surrogate.
        """
        separated = self._last_separator(encoded, text, question) if self._fast else None
        if separated is None:
            return common_prefix_length(encoded.ids, self.encode(question).ids)
        n, rest = separated
        own = self._tails.get(rest)
        if own is None:
            own = self.encode(rest).ids
            if len(rest) <= _TAIL and len(self._tails) < _TAILS:
                self._tails[rest] = own
        return n + common_prefix_length(encoded.ids[n : n + len(own)], own)

    def _last_separator(self, encoded: Encoded, text: str, question: str) -> tuple[int, str] | None:
        """Find the last separator token (see `_separators`) in the common prefix of two texts.

        Both texts have the same tokens before it, so only the rest of `question` is tokenized.

        Returns:
            The separator's token index in `encoded`, and `question` from the separator on; None if
            the common prefix has no separator.
        """
        shared = len(question) if text.startswith(question) else common_text_length(text, question)
        for n in range(bisect_right(encoded.ends, shared) - 1, -1, -1):
            token = self._separators.get(encoded.ids[n])
            if token is not None and text.startswith(token, encoded.starts[n]):
                return n, question[encoded.starts[n] :]
        return None

    @cached_property
    def _separators(self) -> dict[int, str]:
        """The separators by id: added tokens that split the text wherever they are spelled.

        The text before one is tokenized independently of the text after it.
        """
        added = added_tokens(self.tokenizer)
        every = [str(token) for token in added.values()]
        return {
            i: str(token)
            for i, token in added.items()
            if not (token.normalized or token.lstrip or token.rstrip or token.single_word)
            # A token that is contained in a longer added token may be matched as the longer one.
            and sum(str(token) in other for other in every) == 1
        }

    @cached_property
    def _tails(self) -> dict[str, list[int]]:
        """Cached tokens of the text from a prompt's last separator to its end."""
        return {}

    @property
    def _fast(self) -> bool:
        """Whether the backend may be called instead of the tokenizer."""
        if not self.tokenizer.is_fast:
            return False
        backend = self.tokenizer.backend_tokenizer
        return self._direct and backend.truncation is None and backend.padding is None

    @cached_property
    def _direct(self) -> bool:
        """Whether the backend and the tokenizer return the same tokens for a test text."""
        probe = f"It's {self.tokenizer.eos_token or ''}\n\n {self.header} 3 + 3  = six, é."
        backend = self.tokenizer.backend_tokenizer
        for special in (False, True):
            made = self.tokenizer(probe, add_special_tokens=special)["input_ids"]
            if list(made) != backend.encode(probe, add_special_tokens=special).ids:
                return False
        return True

    def ids(self, text: str) -> list[int]:
        """Return a plain text's token ids, with the special tokens that the tokenizer adds.

        Raises:
            DataError: The text contains a lone surrogate.
        """
        return list(self.tokenizer(checked_utf8(text))["input_ids"])

    @cached_property
    def special(self) -> frozenset[int]:
        """Ids of the tokenizer's control tokens."""
        return special_ids(self.tokenizer)

    @cached_property
    def added(self) -> re.Pattern[str]:
        """A pattern of all added tokens that are not white space: `<|im_end|>`, `<think>`, …"""
        texts = {str(token) for token in added_tokens(self.tokenizer).values()}
        texts |= {str(token) for token in self.tokenizer.all_special_tokens}
        wanted = sorted((t for t in texts if t.strip()), key=len, reverse=True)
        return re.compile("|".join(map(re.escape, wanted)) or r"(?!)")

    @cached_property
    def control(self) -> re.Pattern[str]:
        """A pattern of all control tokens."""
        texts = map(str, self.tokenizer.convert_ids_to_tokens(sorted(self.special)))
        wanted = sorted((t for t in texts if t.strip()), key=len, reverse=True)
        return re.compile("|".join(map(re.escape, wanted)) or r"(?!)")

    @cached_property
    def source(self) -> str:
        """The Jinja source of the template; empty if there is none."""
        template = self.chat_template or self.tokenizer.chat_template
        if isinstance(template, dict):
            template = template.get("default")
        return template if isinstance(template, str) else ""

    @cached_property
    def header(self) -> str:
        r"""The generation prompt, which precedes every answer: `<|im_start|>assistant\n`.

        Empty if it cannot be determined.
        """
        question = [{"role": "user", "content": _PROBE.format(0)}]
        answer = [{"role": "assistant", "content": _PROBE.format(1)}]
        try:
            alone = self.render(question).rpartition(_PROBE.format(0))[2]
            asked = self.render(question, add_generation_prompt=True)
            talk = self.render([*question, *answer])
        except DataError:
            return ""
        asked = asked.rpartition(_PROBE.format(0))[2]
        between = talk.partition(_PROBE.format(1))[0].rpartition(_PROBE.format(0))[2]
        both = asked[: common_text_length(asked, between)]
        if asked == alone != between:  # the template ignores `add_generation_prompt`
            own = between.removeprefix(alone) if between.startswith(alone) else ""
        else:
            shared = common_text_length(alone, both)
            within = [m.start() for m in self.added.finditer(both) if m.start() < shared < m.end()]
            own = both[min([shared, *within]) :]
        if not own.strip() and not between[len(both) :].strip():
            own = both  # only the end of the user's turn precedes the answer: [/INST]
        return own if own.strip() else ""

    @cached_property
    def scaffolds(self) -> dict[str, Any]:
        """Scaffolds of conversations by their form (see `layout`)."""
        return {}
