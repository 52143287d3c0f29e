"""What the demonstration guard reads: responses to hidden states of SmolLM2-135M.

The conversation and an open assistant turn are written in the model's own chat format (ChatML),
with its default system message where there is none. Content is tokenized apart from the format and
with control tokens switched off: a literal `<|im_end|>` in a prompt or a response stays text.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from star_dss_plugin.data.requests import Message
from star_dss_plugin.errors import DataError
from star_dss_plugin.guards.base import batches
from star_dss_plugin.guards.demo.smollm2 import DEFAULT_SYSTEM, load_smollm2

__all__ = [
    "LAYERS",
    "MAX_CONTEXT",
    "OVERLAP",
    "ROUND_A_TURN",
    "WINDOW",
    "Backbone",
    "Reading",
    "content_of",
]

LAYERS = (14, 16, 18)
"""The states after these blocks are read; later blocks are not run."""
MAX_CONTEXT = 2048
"""Tokens of conversation before a response that are read; what is older is dropped."""
ROUND_A_TURN = 32
"""More tokens than the format writes around a message, or in a default system message."""
WINDOW = 2048
"""Tokens of a response that one forward pass scores."""
OVERLAP = 1024
"""Tokens of the response before a window that are read along with it."""

# Characters with bytes that SmolLM2's vocabulary lacks, and lone surrogates: depending on the
# version of transformers they vanish, become the control token <|endoftext|>, or raise.
_UNREADABLE = re.compile("[\x04\x06\x13\x14\x16\x1d\ud800-\udfff\U00040000-\U000bffff]")


@dataclass(frozen=True)
class Reading:
    """A response as the guard reads it.

    Attributes:
        context: Token ids of the conversation, with the open assistant turn.
        response: Token ids of the response, T of them.
        char_ends: Where each of those ends in the text of the response.
    """

    context: list[int]
    response: list[int]
    char_ends: list[int]


class Backbone:
    """The first blocks of SmolLM2.

    A response of any length is read, in windows of `WINDOW` tokens, each after the context and the
    `OVERLAP` response tokens before it; no token sees a later one.

    Args:
        device: Where it runs.
        dtype: Of its weights.
        batch_tokens: Tokens of one forward pass, padding included. A window that is longer is
            computed alone.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype, batch_tokens: int) -> None:
        model, tokenizer = load_smollm2(dtype)
        self._tokenizer: Any = tokenizer
        self._model: Any = model.get_decoder()
        self._model.layers = self._model.layers[: max(LAYERS)]
        self._model.norm = torch.nn.Identity()  # else the last states come out normalised
        self._model.config.num_hidden_layers = max(LAYERS)
        self._model.to(device)
        self._device = device
        self._batch_tokens = batch_tokens

    def read(
        self, responses: Sequence[tuple[Sequence[Message], str]]
    ) -> list[tuple[list[int], Tensor]]:
        """Reads responses after their contexts.

        Returns:
            For each response the end of each of its T tokens in characters, and float32 states of
            shape (T + 1, H), H over all `LAYERS`, the first one that of the last context token.
        """
        readings = [self.tokens(context, text) for context, text in responses]
        windows = [w for i, r in enumerate(readings) for w in _windows(i, r)]
        states: list[list[Tensor]] = [[] for _ in readings]
        for window, found in zip(windows, self._forward(windows), strict=True):
            states[window.reading].append(found)
        return [(r.char_ends, torch.cat(s)) for r, s in zip(readings, states, strict=True)]

    def tokens(self, context: Sequence[Message], text: str) -> Reading:
        """A response and its context as token ids."""
        response, char_ends = self._plain(text)
        return Reading(self._conversation(context)[0], response, char_ends)

    def truncates(self, context: Sequence[Message]) -> bool:
        """Whether something of a context is not read."""
        return self._conversation(context)[1]

    def _conversation(self, context: Sequence[Message]) -> tuple[list[int], bool]:
        """Token ids of a context and an open turn, and whether the context was cut.

        Where it is too long, its oldest messages are dropped and the oldest one kept loses its
        start; the format around it stays whole.
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
        """Token ids of text in which nothing is a control token, and where each token ends."""
        encoded = self._tokenizer(
            _UNREADABLE.sub("\ufffd", text),  # one character for one: the ends stay right
            add_special_tokens=False,
            split_special_tokens=True,
            return_offsets_mapping=True,
            verbose=False,
        )
        return list(encoded["input_ids"]), [end for _, end in encoded["offset_mapping"]]

    @torch.inference_mode()
    def _forward(self, windows: Sequence[_Window]) -> list[Tensor]:
        """The states that belong to each window, in the order of `windows`."""
        states = [torch.empty(0)] * len(windows)
        for batch in batches([len(w.ids) for w in windows], self._batch_tokens):
            width = max(len(windows[i].ids) for i in batch)
            # Padding follows the text, and attention only looks back: no mask is needed.
            ids = [windows[i].ids + [0] * (width - len(windows[i].ids)) for i in batch]
            output = self._model(
                torch.tensor(ids, device=self._device), use_cache=False, output_hidden_states=True
            )
            found = torch.cat([output.hidden_states[layer] for layer in LAYERS], dim=-1).float()
            for i, rows in zip(batch, found, strict=True):
                states[i] = rows[windows[i].start : len(windows[i].ids)].clone()
        return states


@dataclass(frozen=True)
class _Window:
    """One sequence of a forward pass: the states from `start` on are its own."""

    reading: int
    ids: list[int]
    start: int


def _windows(index: int, reading: Reading) -> Iterator[_Window]:
    context, response = reading.context, reading.response
    for begin in range(0, max(len(response), 1), WINDOW):
        before = max(begin - OVERLAP, 0)
        start = len(context) + begin - before
        ids = context + response[before : begin + WINDOW]
        # The first window also owns the last context token.
        yield _Window(index, ids, start if begin else start - 1)


def content_of(message: Message) -> str:
    """The text of a message.

    Raises:
        DataError: Its content is not text.
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
