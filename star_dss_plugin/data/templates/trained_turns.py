"""Determine the trained tokens of a rendered conversation: the assistant's turns."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Mapping, Sequence
from typing import Any

from star_dss_plugin.data.conversations import template_arguments, text_of
from star_dss_plugin.data.templates.chat import ChatTokenizer
from star_dss_plugin.data.templates.encoded import Encoded, checked_utf8
from star_dss_plugin.data.templates.layout import Layout, Turn, render_with_layout
from star_dss_plugin.data.templates.scaffold import generated_spans
from star_dss_plugin.data.templates.tokenized import RenderedRow, Runs, Tokenized, joined_runs

__all__ = ["render_completion", "render_conversation"]

_NOTHING_GENERATED = (
    "assistant_only_loss is set, and the chat template does not say what is generated (it has no "
    "{% generation %}). Give a template that does, or leave assistant_only_loss out: then the "
    "assistant's turns are found by their messages."
)
_NOT_PLAIN = (
    "The chat template does not render the assistant's turns as plain text (it rewrites or leaves "
    "out what they say), so their tokens cannot be found. Set assistant_only_loss=True with a "
    "template that has {% generation %}, or give prompt-completion data."
)


def render_conversation(
    row: Mapping[str, Any],
    source: list[dict[str, Any]],
    chat: ChatTokenizer,
    first: int,
    assistant_only_loss: bool,
) -> RenderedRow:
    """Render a conversation; the assistant turns from message `first` on are trained."""
    arguments = template_arguments(row)
    text, layout = render_with_layout(chat, source, arguments)
    generated = layout.generated if layout else generated_spans(chat, source, arguments, text)
    question = ""
    if first and generated is not None:
        question = chat.render(source[:first], add_generation_prompt=True, **arguments)

    def finish(encoded: Encoded) -> Tokenized:
        parts = text, layout, encoded
        return _turns(source, chat, first, parts, generated, question, assistant_only_loss)

    return RenderedRow(text, finish)


def _turns(
    source: list[dict[str, Any]],
    chat: ChatTokenizer,
    first: int,
    parts: tuple[str, Layout | None, Encoded],
    generated: Sequence[tuple[int, int]] | None,
    question: str,
    assistant_only_loss: bool,
) -> Tokenized:
    """Return a tokenized conversation with the runs of its trained tokens.

    Tokens of `question`, the rendered messages before `first`, are not trained, although templates
    may mark the generation prompt at its end as generated.
    """
    text, layout, encoded = parts
    turns = [t for t in layout.turns if t.message >= first] if layout else []
    if generated is not None:
        asked = chat.shared_tokens(encoded, text, question) if question else 0
        spans = (_tokens(encoded, start, end) for start, end in generated)
        found = [(max(start, asked), end) for start, end in spans]
    elif assistant_only_loss:
        return Tokenized(encoded, text, None, layout, source, _NOTHING_GENERATED)
    elif layout is None or len(turns) < _speaking(source, first):
        return Tokenized(encoded, text, None, layout, source, _NOT_PLAIN)
    else:
        found = [run for turn in turns for run in _of_turn(encoded, chat, text, turn)]
    return Tokenized(encoded, text, joined_runs(found), layout, source)


def _speaking(source: list[dict[str, Any]], first: int) -> int:
    """Return how many assistant turns from message `first` on are not empty."""
    return sum(
        m["role"] == "assistant" and bool(text_of(m.get("content")) or m.get("tool_calls"))
        for m in source[first:]
    )


def _tokens(encoded: Encoded, start: int, end: int) -> tuple[int, int]:
    """Return the run of tokens that overlap the characters [start, end)."""
    return bisect_right(encoded.ends, start), bisect_left(encoded.starts, end)


def _of_turn(encoded: Encoded, chat: ChatTokenizer, text: str, turn: Turn) -> Runs:
    """Return the runs of a turn's trained tokens: its words and its end-of-turn tokens.

    The end of a turn is trained because the model must learn to stop. It is the first control token
    after the words, or all control tokens up to eos if eos follows others (Cohere's template).
    After a tool call, text of the template may come before it.
    """
    end = turn.words[-1][1]
    words = _tokens(encoded, turn.begin, end)
    ids, starts, ends = encoded.ids, encoded.starts, encoded.ends
    first = bisect_left(starts, end)
    stop = None
    for i in range(first, len(ids)):
        if ids[i] in chat.special:
            if stop is None or ids[i] == chat.tokenizer.eos_token_id:
                stop = i
            if ids[i] == chat.tokenizer.eos_token_id:
                break
            continue
        said = text[starts[i] : ends[i]].strip()
        skipped = not said or chat.added.fullmatch(said) or (turn.calls and stop is None)
        if starts[i] >= turn.right or not skipped:
            break
    return [words] if stop is None else [words, (first, stop + 1)]


def render_completion(
    row: Mapping[str, Any], source: list[dict[str, Any]], chat: ChatTokenizer
) -> RenderedRow:
    """Render a prompt of messages and an assistant's completion, which is trained as a whole."""
    arguments, prompt = template_arguments(row), row["prompt"]
    text, layout = render_with_layout(chat, source, arguments)
    question = chat.render(prompt, add_generation_prompt=True, **arguments)
    checked_utf8(question)

    def finish(encoded: Encoded) -> Tokenized:
        common = chat.shared_tokens(encoded, text, question)
        trained = joined_runs([(common, len(encoded.ids))])
        return Tokenized(encoded, text, trained, layout, source)

    return RenderedRow(text, finish)
