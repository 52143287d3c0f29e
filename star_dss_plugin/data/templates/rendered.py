"""Recognise rendered chats in plain texts and tokenized rows, and parse them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from weakref import WeakKeyDictionary

from star_dss_plugin.data.templates.chat import ChatTokenizer
from star_dss_plugin.data.templates.inverse import TemplateInverse

__all__ = ["is_rendered", "parsed_chat", "parsed_prompt", "parsed_tokens"]

_inverses: WeakKeyDictionary[ChatTokenizer, TemplateInverse] = WeakKeyDictionary()


def is_rendered(text: str, chat: ChatTokenizer) -> bool:
    """Return whether a plain text contains the model's own turn markers.

    These are the generation prompt, if an added token is part of it, or any control token other
    than bos, eos and pad.
    """
    header = chat.header.strip()
    if header and chat.added.search(header) and header in text:
        return True
    edges = {chat.tokenizer.bos_token, chat.tokenizer.eos_token, chat.tokenizer.pad_token}
    return any(match.group() not in edges for match in chat.control.finditer(text))


def parsed_prompt(prompt: str, chat: ChatTokenizer) -> list[dict[str, Any]] | None:
    """Return the messages that the template renders as this prompt; None if there are none."""
    return _inverse(chat).messages_of_prompt(prompt) if chat.source else None


def parsed_chat(text: str, chat: ChatTokenizer) -> list[dict[str, Any]] | None:
    """Return the messages that the template renders as this chat; None if there are none."""
    return _inverse(chat).messages(text) if chat.source else None


def parsed_tokens(ids: Sequence[int], chat: ChatTokenizer) -> list[dict[str, Any]] | None:
    """Return the messages that one of the known templates renders as these tokens, or None."""
    for one in (chat, *chat.others):
        found = _inverse(one).messages_of_tokens(ids) if one.source else None
        if found is not None:
            return found
    return None


def _inverse(chat: ChatTokenizer) -> TemplateInverse:
    if chat not in _inverses:
        _inverses[chat] = TemplateInverse(
            chat.tokenizer, chat.chat_template, chat.template_arguments
        )
    return _inverses[chat]
