"""Read rows with images, videos or sounds as Axolotl's multimodal collator reads them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from axolotl.loaders import load_processor
from axolotl.processing_strategies import ProcessingStrategy, get_processing_strategy
from axolotl.utils.chat_templates import get_chat_template_from_config
from axolotl.utils.collators.mm_chat import MultiModalChatDataCollator
from PIL import Image

from star_dss_axolotl.mistral import MistralChat, is_mistral_common
from star_dss_plugin.data.media_rows import MediaRows, media_tokens
from star_dss_plugin.data.templates.chat import ChatTokenizer

__all__ = ["make_media_rows", "media_rows", "strategy_of"]


def media_rows(collator: Any) -> MediaRows | None:
    """Return the reader of rows for Axolotl's multimodal collator; None for any other collator.

    Args:
        collator: The data collator that Axolotl made.
    """
    if not isinstance(collator, MultiModalChatDataCollator):
        return None
    return make_media_rows(collator.processing_strategy)


def strategy_of(cfg: Any, tokenizer: Any) -> ProcessingStrategy:
    """Return the processing strategy with which a configuration's collator would read rows.

    Args:
        cfg: Axolotl's validated configuration.
        tokenizer: The model's tokenizer, as Axolotl loads it.
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


def make_media_rows(strategy: ProcessingStrategy) -> MediaRows:
    """Return the reader of rows for a processing strategy of Axolotl's multimodal collator."""
    processor = strategy.processor
    chat: ChatTokenizer
    if is_mistral_common(processor.tokenizer):
        chat = mistrals = MistralChat(processor.tokenizer)
        media = mistrals.media
    else:
        chat = ChatTokenizer(processor.tokenizer, strategy.chat_template or processor.chat_template)
        media = media_tokens(processor, chat)

    def conversation(row: Mapping[str, Any]) -> dict[str, Any]:
        """Return the messages that Axolotl makes of a row, without opening images."""
        example = dict(row)
        for column in ("images", "image"):
            if isinstance(example.get(column), list):
                # Axolotl uses the first image, and logs a message for each row that has more.
                example[column] = [_TINY_IMAGE] * min(1, len(example[column]))
        (read,) = strategy([example])
        return {"messages": read["messages"]}

    return MediaRows(chat, media, conversation, kinds=_KINDS)


_KINDS = ("image", "video", "audio")
"""Kinds of media that transformers' `apply_chat_template` opens, which Axolotl's collator calls."""

_TINY_IMAGE = Image.new("RGB", (1, 1))
