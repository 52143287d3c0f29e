"""Compute hidden states of SmolLM2-135M for responses, the input of the demonstration guard.

The conversation and a generation prompt are written in the model's chat format (ChatML), with its
default system message if the conversation has none. Content is tokenized apart from the format and
without control tokens: a literal `<|im_end|>` in a prompt or a response stays text.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from star_dss_plugin.data.requests import Message
from star_dss_plugin.engines.padding import padded
from star_dss_plugin.errors import DataError
from star_dss_plugin.guards.base import batches
from star_dss_plugin.smollm2 import DEFAULT_SYSTEM, load_smollm2
from star_dss_plugin.unpatched import unpatched

__all__ = [
    "LAYERS",
    "MAX_CONTEXT",
    "OVERLAP",
    "ROUND_A_TURN",
    "WINDOW",
    "Backbone",
    "ResponseTokens",
    "content_of",
]

LAYERS = (14, 16, 18)
"""The states after these blocks are read; later blocks are not run."""
MAX_CONTEXT = 2048
"""Number of conversation tokens before a response that are read; older ones are dropped."""
ROUND_A_TURN = 32
"""Upper bound on the tokens that the format adds per message, and on a default system message."""
WINDOW = 2048
"""Number of response tokens that one forward pass scores."""
OVERLAP = 1024
"""Number of response tokens before a window that are read with it."""

# Characters whose bytes SmolLM2's vocabulary lacks, and lone surrogates. Depending on the version
# of transformers they vanish, become the control token <|endoftext|>, or raise.
_UNREADABLE = re.compile("[\x04\x06\x13\x14\x16\x1d\ud800-\udfff\U00040000-\U000bffff]")


@dataclass(frozen=True)
class ResponseTokens:
    """Hold a response and its context as token ids.

    Attributes:
        context: Token ids of the conversation, with the generation prompt.
        response: Token ids of the response, shape (T,).
        char_ends: End of each of those tokens in the text of the response, in characters.
    """

    context: list[int]
    response: list[int]
    char_ends: list[int]


class Backbone:
    """Run the first blocks of SmolLM2.

    A response of any length is read in windows of `WINDOW` tokens. Each window follows the context
    and the `OVERLAP` response tokens before it; no token sees a later one.

    Args:
        device: Torch device.
        dtype: Torch dtype of the weights.
        batch_tokens: Upper bound on the tokens of one forward pass, padding included. A longer
            window runs alone.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype, batch_tokens: int) -> None:
        with unpatched():
            model, tokenizer = load_smollm2(dtype)
        self._tokenizer: Any = tokenizer
        self._model: Any = model.get_decoder()
        self._model.layers = self._model.layers[: max(LAYERS)]
        self._model.norm = torch.nn.Identity()  # otherwise the last states are normalised
        self._model.config.num_hidden_layers = max(LAYERS)
        self._model.to(device)
        self._device = device
        self._batch_tokens = batch_tokens

    def read(
        self, responses: Sequence[tuple[Sequence[Message], str]]
    ) -> list[tuple[list[int], Tensor]]:
        """Return the hidden states of responses after their contexts.

        Returns:
            For each response the end of each of its T tokens in characters, and float32 states of
            shape (T + 1, H), H over all `LAYERS`; the first row is that of the last context token.
        """
        tokens = [self.tokens(context, text) for context, text in responses]
        windows = [w for i, r in enumerate(tokens) for w in _windows(i, r)]
        states: list[list[Tensor]] = [[] for _ in tokens]
        for window, found in zip(windows, self._forward(windows), strict=True):
            states[window.response].append(found)
        return [(r.char_ends, torch.cat(s)) for r, s in zip(tokens, states, strict=True)]

    def tokens(self, context: Sequence[Message], text: str) -> ResponseTokens:
        """Return a response and its context as token ids."""
        response, char_ends = self._plain(text)
        return ResponseTokens(self._conversation(context)[0], response, char_ends)

    def truncates(self, context: Sequence[Message]) -> bool:
        """Return whether the start of a context is cut."""
        return self._conversation(context)[1]

    def _conversation(self, context: Sequence[Message]) -> tuple[list[int], bool]:
        """Return the token ids of a context and generation prompt, and whether it was cut.

        If it is too long, its oldest messages are dropped and the oldest remaining one is cut at
        its start. The format around each message stays complete.
        """
        start, end = self._tokenizer.bos_token_id, self._tokenizer.eos_token_id
        newline, _ = self._plain("\n")
        messages = list(context)
        if not messages or messages[0]["role"] != "system":
            messages.insert(0, {"role": "system", "content": DEFAULT_SYSTEM})
        turns: list[list[int]] = []
        room = MAX_CONTEXT
        for message in reversed(messages):
            head = [start, *self._plain(f"{message['role']}\n")[0]]
            content, _ = self._plain(content_of(message))
            room -= len(head) + 1 + len(newline)
            if room <= 0:
                break
            turns.append([*head, *content[-room:], end, *newline])
            room -= len(content)
        opened = [start, *self._plain("assistant\n")[0]]
        cut = len(turns) < len(messages) or room < 0
        return [i for t in reversed(turns) for i in t] + opened, cut

    def _plain(self, text: str) -> tuple[list[int], list[int]]:
        """Return the ids of text without control tokens, and the character end of each token."""
        encoded = self._tokenizer(
            _UNREADABLE.sub("\ufffd", text),  # one character for one, so that ends stay correct
            add_special_tokens=False,
            split_special_tokens=True,
            return_offsets_mapping=True,
            verbose=False,
        )
        return list(encoded["input_ids"]), [end for _, end in encoded["offset_mapping"]]

    @torch.inference_mode()
    def _forward(self, windows: Sequence[_Window]) -> list[Tensor]:
        """Return the states of each window, in the order of `windows`."""
        states = [torch.empty(0)] * len(windows)
        for batch in batches([len(w.ids) for w in windows], self._batch_tokens):
            # Padding follows the text and attention is causal, so no mask is needed.
            ids, _ = padded([windows[i].ids for i in batch], self._device)
            output = self._model(ids, use_cache=False, output_hidden_states=True)
            found = torch.cat([output.hidden_states[layer] for layer in LAYERS], dim=-1).float()
            for i, rows in zip(batch, found, strict=True):
                states[i] = rows[windows[i].start : len(windows[i].ids)].clone()
        return states


@dataclass(frozen=True)
class _Window:
    """Hold one sequence of a forward pass; its states from `start` on belong to this window."""

    response: int
    ids: list[int]
    start: int


def _windows(index: int, tokens: ResponseTokens) -> Iterator[_Window]:
    context, response = tokens.context, tokens.response
    for begin in range(0, max(len(response), 1), WINDOW):
        before = max(begin - OVERLAP, 0)
        start = len(context) + begin - before
        ids = context + response[before : begin + WINDOW]
        # The first window also holds the state of the last context token.
        yield _Window(index, ids, start if begin else start - 1)


def content_of(message: Message) -> str:
    """Return the text of a message.

    Raises:
        DataError: The content of the message is not text.
    """
    content = message.get("content")
    if content is None:  # a turn that only calls tools
        return ""
    if not isinstance(content, str):
        raise DataError(
            f"A message of role {message['role']!r} has content of type "
            f"{type(content).__name__}, but the demonstration guard reads plain text only. Give "
            "the content as a string."
        )
    return content
