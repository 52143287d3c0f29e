"""Axolotl's rows with images or sounds: how its collator for them reads a row."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from axolotl.loaders import load_processor
from axolotl.processing_strategies import ProcessingStrategy, get_processing_strategy
from axolotl.utils.chat_templates import get_chat_template_from_config
from axolotl.utils.collators.mm_chat import MultiModalChatDataCollator
from PIL import Image

from star_dss_axolotl.mistral import MistralChat, is_mistrals
from star_dss_plugin.data.media_rows import MediaRows, media_tokens
from star_dss_plugin.data.templates.chat import ChatTokenizer

__all__ = ["media_rows", "rows_of", "strategy_of"]


def media_rows(collator: Any) -> MediaRows | None:
    """Return how a collator of Axolotl's reads rows with media; None for any other collator.

    Args:
        collator: As Axolotl made it.
    """
    if not isinstance(collator, MultiModalChatDataCollator):
        return None
    return rows_of(collator.processing_strategy)


def strategy_of(cfg: Any, tokenizer: Any) -> ProcessingStrategy:
    """Return how the collator of a configuration would read rows, before there is a collator.

    Args:
        cfg: Axolotl's configuration, validated.
        tokenizer: The model's, as Axolotl loads it.
    """
    template = get_chat_template_from_config(cfg, tokenizer=tokenizer)
    fields = dict.fromkeys(d["field_messages"] for d in cfg.datasets if d.get("field_messages"))
    return get_processing_strategy(
        load_processor(cfg, tokenizer),
        template,
        cfg.chat_template,
        role_boundaries_override=cfg.role_boundaries or None,
        field_messages=list(fields) or None,
        model_type=cfg.model_config_type,
    )


def rows_of(strategy: ProcessingStrategy) -> MediaRows:
    """Return how Axolotl's collator reads rows with media, given its processing strategy."""
    processor = strategy.processor
    chat: ChatTokenizer
    if is_mistrals(processor.tokenizer):
        chat = mistrals = MistralChat(processor.tokenizer)
        media = mistrals.media
    else:
        chat = ChatTokenizer(processor.tokenizer, strategy.chat_template or processor.chat_template)
        media = media_tokens(processor, chat)

    def conversation(row: Mapping[str, Any]) -> dict[str, Any]:
        """Return the messages that Axolotl makes of a row; no image is opened for it."""
        example = dict(row)
        for column in ("images", "image"):
            if isinstance(example.get(column), list):
                # Axolotl takes the first of them, and says so of each row that has more.
                example[column] = [_NOTHING] * min(1, len(example[column]))
        (read,) = strategy([example])
        return {"messages": read["messages"]}

    return MediaRows(chat, media, conversation, kinds=_KINDS)


_KINDS = ("image", "video", "audio")
"""What transformers' `apply_chat_template`, which Axolotl's collator calls, opens."""

_NOTHING = Image.new("RGB", (1, 1))
