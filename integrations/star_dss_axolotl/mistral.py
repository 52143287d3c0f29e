"""Render conversations with mistral-common (`tokenizer_use_mistral_common`), also with media."""

from __future__ import annotations

import base64
import io
import re
import wave
from collections.abc import Mapping, Sequence
from functools import cached_property
from itertools import groupby
from typing import Any

from PIL import Image
from transformers import PreTrainedTokenizerBase
from transformers.tokenization_mistral_common import MistralCommonBackend

from star_dss_plugin.data.decoding import decode, token_boundaries
from star_dss_plugin.data.templates.chat import ChatTokenizer
from star_dss_plugin.data.templates.encoded import Encoded, checked_utf8
from star_dss_plugin.errors import DataError

__all__ = ["MistralChat", "is_mistral_common"]


def is_mistral_common(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Return whether a tokenizer is mistral-common's, which has no chat template."""
    return isinstance(tokenizer, MistralCommonBackend)


class MistralChat(ChatTokenizer):
    """Render messages with a mistral-common tokenizer instead of a chat template.

    mistral-common makes tokens, not text, and opens the media of a conversation. So the media of a
    row are replaced by tiny ones, and the tokens are decoded.
    """

    def render(self, messages: Sequence[Mapping[str, Any]], /, **kwargs: Any) -> str:
        """Return the decoded tokens of messages, with one token for each image or sound.

        Raises:
            DataError: There are no messages, or mistral-common rejects them.
        """
        if not messages:
            raise DataError("The row has no messages: its list is empty. Remove the row.")
        try:
            made: Any = self.tokenizer.apply_chat_template(
                list(map(_with_media, messages)), tokenize=True, return_dict=True, **kwargs
            )
        except Exception as error:  # pydantic, mistral-common and media libraries have their own
            raise DataError(
                "Mistral's own code (mistral-common) cannot make tokens of the row's messages: "
                f"{type(error).__name__}: {error}"
            ) from error
        return decode(self.tokenizer, self._one_token_per_medium(made["input_ids"]))

    def encode_all(
        self, texts: Sequence[str], *, add_special_tokens: bool = False
    ) -> list[Encoded]:
        """Tokenize texts of `render`, with control tokens as single ids.

        Raises:
            DataError: A text holds a lone surrogate.
        """
        return [self._encoded(checked_utf8(text)) for text in texts]

    def _encoded(self, text: str) -> Encoded:
        ids: list[int] = []
        for piece in re.split(f"({self.control.pattern})", text):
            if piece in self._controls:
                ids.append(self._controls[piece])
            elif piece:
                ids += self.tokenizer.encode(piece, add_special_tokens=False)
        _, ends, _ = token_boundaries(self.tokenizer, ids)
        return Encoded(ids, [0, *ends[:-1]] if ends else [], ends)

    def _one_token_per_medium(self, ids: Sequence[int]) -> list[int]:
        """Return tokens with each medium's run of tokens reduced to its distinct tokens."""
        found: list[int] = []
        for medium, run in groupby(ids, self.media.__contains__):
            tokens = list(run)
            found += list(dict.fromkeys(tokens)) if medium else tokens
        return found

    @cached_property
    def media(self) -> frozenset[int]:
        """Ids of the tokens that stand for images and sounds."""
        backend: Any = self.tokenizer
        instruct = backend.tokenizer.instruct_tokenizer
        encoders = [instruct.image_encoder, instruct.audio_encoder]
        named = [vars(encoder.special_ids).values() for encoder in encoders if encoder is not None]
        return frozenset(token for ids in named for token in ids if token is not None)

    @cached_property
    def _controls(self) -> dict[str, int]:
        ids = sorted(self.special)
        return dict(zip(self.tokenizer.convert_ids_to_tokens(ids), ids, strict=True))


def _with_media(message: Mapping[str, Any]) -> dict[str, Any]:
    """Return a message whose media parts are replaced by tiny media."""
    content = message.get("content")
    if not isinstance(content, list):
        return dict(message)
    parts = [_SMALLEST.get(part.get("type"), part) for part in content]
    return {**message, "content": parts}


def _smallest_image() -> str:
    file = io.BytesIO()
    Image.new("RGB", (1, 1)).save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


def _smallest_sound() -> str:
    file = io.BytesIO()
    with wave.open(file, "wb") as sound:
        sound.setparams((1, 2, 16000, 0, "NONE", ""))
        sound.writeframes(bytes(3200))
    return base64.b64encode(file.getvalue()).decode()


_SMALLEST: dict[Any, dict[str, Any]] = {
    "image": {"type": "image", "base64": _smallest_image()},
    # The form that the tokenizer makes of a file's content; other forms are checked less.
    "audio": {"type": "input_audio", "input_audio": {"data": _smallest_sound(), "format": "wav"}},
}
"""The media opened instead of a row's own: one pixel, and a tenth of a second of silence."""
