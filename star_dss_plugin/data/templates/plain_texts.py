"""Read rows that are plain texts: a prompt with its completion, or one text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from star_dss_plugin.data.templates.chat import ChatTokenizer
from star_dss_plugin.data.templates.encoded import Encoded, checked_utf8, common_prefix_length
from star_dss_plugin.data.templates.layout import Layout, Turn, render_with_layout
from star_dss_plugin.data.templates.rendered import is_rendered, parsed_chat, parsed_prompt
from star_dss_plugin.data.templates.tokenized import RenderedRow, Tokenized, joined_runs

__all__ = ["render_prompt_completion", "render_text"]


def render_text(text: str, chat: ChatTokenizer) -> RenderedRow:
    """Render a plain text; every token is trained."""
    whole = _with_eos(chat, text)
    rendered = is_rendered(text, chat)

    def finish(encoded: Encoded) -> Tokenized:
        trained = joined_runs([(0, len(encoded.ids))])
        return Tokenized(encoded, whole, trained, None, None, rendered=rendered)

    return RenderedRow(whole, finish, plain=True)


def render_prompt_completion(prompt: str, completion: str, chat: ChatTokenizer) -> RenderedRow:
    """Render a plain-text prompt and completion; the completion is trained."""
    text = checked_utf8(prompt + _with_eos(chat, completion))
    asked = chat.ids(prompt)
    rendered = is_rendered(prompt, chat)
    source = parsed_prompt(prompt, chat) if rendered else [{"role": "user", "content": prompt}]
    layout = None if source is None else _plain_layout(prompt, completion, text, source, chat)
    if source is not None:
        source = [*source, {"role": "assistant", "content": completion}]

    def finish(encoded: Encoded) -> Tokenized:
        common = common_prefix_length(encoded.ids, asked)
        trained = joined_runs([(common, len(encoded.ids))])
        unread = source is None
        return Tokenized(encoded, text, trained, layout, source, rendered=unread, plain=True)

    return RenderedRow(text, finish, plain=True)


def _plain_layout(
    prompt: str,
    completion: str,
    text: str,
    source: Sequence[Mapping[str, Any]],
    chat: ChatTokenizer,
) -> Layout:
    """Return the layout of a prompt's messages and its completion."""
    k = len(source)
    turn = _rendered_turn(prompt, completion, source, chat)
    if turn is None:
        inner = _without_control(completion, chat)
        begin, end = len(prompt) + inner[0], len(prompt) + inner[1]
        turn = Turn(k, len(prompt), ((begin, end),), inner == (0, len(completion)), len(text))
    # The messages of the prompt are known, but not their positions in it.
    earlier = [m for m in range(k) if source[m]["role"] == "assistant"]
    turns = (*(Turn(m, 0, ((0, 0),), True, 0) for m in earlier), turn)
    return Layout(text, turns, tuple((0, len(prompt), m) for m in range(k)), None)


def _rendered_turn(
    prompt: str, completion: str, source: Sequence[Mapping[str, Any]], chat: ChatTokenizer
) -> Turn | None:
    """Return the turn of the completion of a rendered prompt; None if it cannot be parsed.

    Its words exclude what the template writes within an answer, such as the tags of a thought.
    """
    text = (prompt + completion).rstrip()
    messages = parsed_chat(text, chat) if is_rendered(prompt, chat) else None
    if messages is None or messages[:-1] != list(source):
        return None
    rendered, layout = render_with_layout(chat, messages, {})
    turn = layout.turns[-1] if layout is not None and layout.turns else None
    if turn is None or turn.message != len(source) or not rendered.startswith(text):
        return None
    return turn if len(prompt) <= turn.words[0][0] and turn.words[-1][1] <= len(text) else None


def _without_control(completion: str, chat: ChatTokenizer) -> tuple[int, int]:
    """Return the span of a completion without the added tokens at its beginning and end."""
    start, end = 0, len(completion)
    while (match := chat.added.match(completion, start)) is not None and match.end() > start:
        start = match.end()
    stops = [match.span() for match in chat.added.finditer(completion, start)]
    while stops and not completion[stops[-1][1] : end].strip():
        end = stops.pop()[0]
    return start, max(start, end)


def _with_eos(chat: ChatTokenizer, text: str) -> str:
    eos = str(chat.tokenizer.eos_token or "")
    return text if text.endswith(eos) else text + eos
