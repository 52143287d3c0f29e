"""Recognise what is a chat already: rendered prompts in plain columns, and rows of tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from weakref import WeakKeyDictionary

from star_dss_plugin.data.templates.chat import ChatTokenizer
from star_dss_plugin.data.templates.inverse import TemplateInverse

__all__ = ["is_rendered", "parsed_chat", "parsed_prompt", "parsed_tokens"]

_inverses: WeakKeyDictionary[ChatTokenizer, TemplateInverse] = WeakKeyDictionary()


def is_rendered(text: str, chat: ChatTokenizer) -> bool:
    """Return whether a plain text holds the tokenizer's own marks of turns.

    They are the template's header of an answer, if a control token is part of it, or any control
    token within the text that does not just begin or end texts.
    """
    header = chat.header.strip()
    if header and chat.added.search(header) and header in text:
        return True
    edges = {chat.tokenizer.bos_token, chat.tokenizer.eos_token, chat.tokenizer.pad_token}
    return any(match.group() not in edges for match in chat.control.finditer(text))


def parsed_prompt(prompt: str, chat: ChatTokenizer) -> list[dict[str, Any]] | None:
    """Return the messages of a rendered prompt; None if the template does not render it so."""
    return _inverse(chat).question(prompt) if chat.source else None


def parsed_chat(text: str, chat: ChatTokenizer) -> list[dict[str, Any]] | None:
    """Return the messages of a rendered chat; None if the template does not render it so."""
    return _inverse(chat).messages(text) if chat.source else None


def parsed_tokens(ids: Sequence[int], chat: ChatTokenizer) -> list[dict[str, Any]] | None:
    """Return the messages of which one of the known templates makes some tokens; None if none."""
    for one in (chat, *chat.others):
        found = _inverse(one).of_tokens(ids) if one.source else None
        if found is not None:
            return found
    return None


def _inverse(chat: ChatTokenizer) -> TemplateInverse:
    if chat not in _inverses:
        _inverses[chat] = TemplateInverse(
            chat.tokenizer, chat.chat_template, chat.template_arguments
        )
    return _inverses[chat]
