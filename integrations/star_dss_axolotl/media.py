"""Axolotl's rows with images or sounds: how its collator for them reads a row."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from axolotl.utils.collators.mm_chat import MultiModalChatDataCollator
from PIL import Image

from star_dss_plugin.data.chat import ChatTokenizer
from star_dss_plugin.data.media_rows import MediaRows, media_tokens

__all__ = ["media_rows"]


def media_rows(collator: Any) -> MediaRows | None:
    """Return how a collator of Axolotl's reads rows with media; None for any other collator.

    Args:
        collator: As Axolotl made it.
    """
    if not isinstance(collator, MultiModalChatDataCollator):
        return None
    strategy = collator.processing_strategy
    processor = strategy.processor
    chat = ChatTokenizer(processor.tokenizer, strategy.chat_template or processor.chat_template)

    def conversation(row: Mapping[str, Any]) -> dict[str, Any]:
        """Return the messages that Axolotl makes of a row; no image is opened for it."""
        example = dict(row)
        for column in ("images", "image"):
            if isinstance(example.get(column), list):
                # Axolotl takes the first of them, and says so of each row that has more.
                example[column] = [_NOTHING] * min(1, len(example[column]))
        (read,) = strategy([example])
        return {"messages": read["messages"]}

    return MediaRows(chat, media_tokens(processor, chat), conversation)


_NOTHING = Image.new("RGB", (1, 1))
