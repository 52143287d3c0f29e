"""Rows to tokens and labels: for `star-dss score`, and where a trainer trains on the user's turns.

The frameworks tokenize their own data. This module serves rows that no framework has seen yet, and
rows whose labels a framework left open: on a conversation, TRL trains every token unless
`assistant_only_loss` is set. A response is what an assistant says (paper, section 3), so only
those tokens stay trained.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import count
from typing import Any

from transformers import PreTrainedTokenizerBase

from star_dss_plugin.data.chat import ChatTokenizer
from star_dss_plugin.data.conversations import (
    row_messages,
    source_messages,
    template_arguments,
)
from star_dss_plugin.data.decoding import special_ids
from star_dss_plugin.data.responses import runs
from star_dss_plugin.errors import DataError
from star_dss_plugin.logprobs import IGNORE_INDEX

__all__ = ["assistant_labels", "needs_assistant_labels", "tokenize_row"]


def tokenize_row(
    row: Mapping[str, Any], chat: ChatTokenizer, *, max_length: int | None = None
) -> dict[str, list[int]]:
    """`input_ids` and `labels` of a raw row, as TRL's SFTTrainer makes them.

    Args:
        row: With `messages` (only assistant turns are trained), `prompt` and `completion` (plain
            or messages; the completion is trained) or `text` (all of it is trained).
        chat: The trained model's tokenizer and its template.
        max_length: Tokens kept from the start; None: all.

    Raises:
        DataError: No such column, or a conversation whose turns cannot be found in its tokens.
    """
    tokenizer = chat.tokenizer
    given = {name for name, value in row.items() if value is not None}
    if "messages" in given:
        ids, mask = _conversation(row, chat)
    elif {"prompt", "completion"} <= given:
        ids, mask = _prompt_completion(row, chat)
    elif "text" in given:
        text = row["text"]
        if not isinstance(text, str):
            raise DataError(f"'text' is a {type(text).__name__}; it must be a text.")
        ids = _tokens(tokenizer, _with_eos(tokenizer, text))
        mask = [True] * len(ids)
    else:
        raise DataError(
            f"A row has the columns {sorted(given)}. Scoring needs 'messages', 'prompt' and "
            "'completion', or 'text' (or 'input_ids' and 'labels')."
        )
    labels = [i if trained else IGNORE_INDEX for i, trained in zip(ids, mask, strict=True)]
    return {"input_ids": ids[:max_length], "labels": labels[:max_length]}


def needs_assistant_labels(row: Mapping[str, Any]) -> bool:
    """Whether a tokenized row trains on turns that are not an assistant's.

    True where every token of a conversation or of a prompt with its completion is trained, or a
    completion that holds other turns than the assistant's is trained in one piece.
    """
    messages, completion = row.get("messages"), row.get("completion")
    if isinstance(messages, list) or isinstance(completion, list):
        source_messages(row)  # or an error that says what is wrong with them
    if isinstance(messages, list):
        others = any(m["role"] != "assistant" for m in messages)
        return others and IGNORE_INDEX not in row["labels"]
    if isinstance(completion, list):
        others = any(m["role"] != "assistant" for m in completion)
        # Several pieces: whoever made the labels (assistant_only_loss) has told the turns apart.
        in_one_piece = len(runs(row["labels"])) == 1
        return IGNORE_INDEX not in row["labels"] or (others and in_one_piece)
    said = isinstance(row.get("prompt"), str) and isinstance(completion, str)
    return said and bool(row["prompt"]) and IGNORE_INDEX not in row["labels"]


def assistant_labels(row: Mapping[str, Any], chat: ChatTokenizer) -> list[int]:
    """Labels of a tokenized row with only its assistant turns trained.

    Args:
        row: `input_ids` (possibly truncated, at either end) and the messages they were made from.
        chat: The tokenizer and the template that made `input_ids`.

    Returns:
        One label per token of `input_ids`.

    Raises:
        DataError: The row's tokens are not those of its messages.
    """
    of_text = isinstance(row.get("completion"), str) and not isinstance(row.get("messages"), list)
    made = _prompt_completion if of_text else _conversation
    ids, mask = made(row, chat)
    given = list(row["input_ids"])
    for kept in (slice(0, len(given)), slice(max(0, len(ids) - len(given)), len(ids))):
        if ids[kept] == given:
            trained = zip(given, mask[kept], strict=True)
            return [i if is_trained else IGNORE_INDEX for i, is_trained in trained]
    if of_text:
        raise DataError(
            "All tokens of a prompt and its completion are trained, and they are not those of the "
            "two texts, so the completion cannot be found in them. Set completion_only_loss=True, "
            "or give labels that are -100 on the prompt."
        )
    raise DataError(
        "All tokens of a conversation are trained, and its tokens are not those of its chat "
        "template, so the assistant's turns cannot be found in them. Set "
        "assistant_only_loss=True, or give prompt-completion data."
    )


def _conversation(row: Mapping[str, Any], chat: ChatTokenizer) -> tuple[list[int], list[bool]]:
    """Tokens of a conversation, and which of them an assistant says (end of turn included)."""
    source, messages = source_messages(row), row_messages(row)
    if source is None or messages is None:
        raise DataError(
            f"'messages' is a {type(row.get('messages')).__name__}; it must be a list of messages "
            "with 'role' and 'content'."
        )
    whole = isinstance(row.get("messages"), list)
    first = 0 if whole else len(source) - len(row["completion"])
    spoken = [i for i, m in enumerate(source) if m["role"] == "assistant" and i >= first]
    tokenizer, kwargs = chat.tokenizer, template_arguments(row)
    text = chat.render(source, **kwargs)
    mark = _unused_mark(text)
    # A marked turn has nothing but its content, so that one which says more (a tool call, a
    # reasoning) does not look found.
    marked = [
        {"role": m["role"], "content": mark.format(i)} if i in spoken else m
        for i, m in enumerate(source)
    ]
    scaffold = chat.render(marked, **kwargs)
    contents = {mark.format(i): str(messages[i]["content"]) for i in spoken}
    spans = _spans(text, scaffold, contents)
    encoded = tokenizer(_whole(text), add_special_tokens=False, return_offsets_mapping=True)
    ids: list[int] = list(encoded["input_ids"])
    offsets = _untrimmed(text, encoded["offset_mapping"])
    mask = [any(s < end and e > start for s, e in spans) for start, end in offsets]
    special = special_ids(tokenizer)
    for _, span_end in spans:
        # The end of turn belongs to the response: the model must learn to stop.
        for i, (start, end) in enumerate(offsets):
            if start < span_end:
                continue
            if ids[i] in special:
                mask[i] = True
                break
            if text[start:end].strip():
                break
    return ids, mask


def _unused_mark(text: str) -> str:
    """A format for placeholders that the text does not hold: it may come from an attacker."""
    opening = next("\ue0f0" * n for n in count(1) if "\ue0f0" * n not in text)
    return opening + "{}\ue0f1"  # private-use characters: no template looks for them


def _untrimmed(text: str, offsets: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Offsets with the spaces that some tokenizers leave out of them (GPT-2's, Llama 3's)."""
    result: list[tuple[int, int]] = []
    reached = 0
    for start, end in offsets:
        result.append((reached if text[reached:start].isspace() else start, end))
        reached = max(reached, end)
    return result


def _spans(text: str, scaffold: str, contents: Mapping[str, str]) -> list[tuple[int, int]]:
    """Character spans of the assistant's turns: the text is the scaffold with its marks filled."""
    for trim in (str, str.strip, str.lstrip, str.rstrip):
        spans, rest, filled = [], scaffold, ""
        for mark, content in contents.items():
            before, _, rest = rest.partition(mark)
            spans.append((len(filled + before), len(filled + before + trim(content))))
            filled += before + trim(content)
        if filled + rest == text and all(mark in scaffold for mark in contents):
            return spans
    raise DataError(
        "The chat template does not render the assistant's turns as plain text (it rewrites "
        "answers, or an answer is a tool call), so their tokens cannot be found. Set "
        "assistant_only_loss=True, or give prompt-completion data."
    )


def _prompt_completion(row: Mapping[str, Any], chat: ChatTokenizer) -> tuple[list[int], list[bool]]:
    prompt, completion = row["prompt"], row["completion"]
    tokenizer = chat.tokenizer
    source_messages(row)
    if isinstance(prompt, str) != isinstance(completion, str):
        raise DataError(
            f"'prompt' is a {type(prompt).__name__} and 'completion' a {type(completion).__name__}."
            " Both must be texts, or both lists of messages."
        )
    if isinstance(prompt, str):
        ids = _tokens(tokenizer, prompt + _with_eos(tokenizer, completion))
        prompt_ids = _tokens(tokenizer, prompt)
    elif any(m["role"] != "assistant" for m in completion):
        return _conversation(row, chat)
    else:
        kwargs = template_arguments(row)
        full = chat.render([*prompt, *completion], **kwargs)
        question = chat.render(prompt, add_generation_prompt=True, **kwargs)
        ids = list(tokenizer(_whole(full), add_special_tokens=False)["input_ids"])
        prompt_ids = list(tokenizer(_whole(question), add_special_tokens=False)["input_ids"])
    common = 0
    while common < min(len(ids), len(prompt_ids)) and ids[common] == prompt_ids[common]:
        common += 1
    return ids, [i >= common for i in range(len(ids))]


def _tokens(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return list(tokenizer(_whole(text))["input_ids"])


def _whole(text: str) -> str:
    """A text that tokenizers take.

    Raises:
        DataError: It holds half a character: a lone surrogate, which JSON can spell.
    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        around = ascii(text[max(0, error.start - 20) : error.end + 20])
        raise DataError(
            f"The row's text has half a character (a lone surrogate), here: {around}. Remove it."
        ) from error
    return text


def _with_eos(tokenizer: PreTrainedTokenizerBase, text: str) -> str:
    eos = str(tokenizer.eos_token or "")
    return text if text.endswith(eos) else text + eos
