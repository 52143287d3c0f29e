"""Rows to tokens and labels: for `star-dss score`, and where a trainer trains on the user's turns.

The frameworks tokenize their own data. This module serves rows that no framework has seen yet, and
rows whose labels a framework left open: on a conversation, TRL trains every token unless
`assistant_only_loss` is set. A response is what an assistant says (paper, section 3), so only
those tokens stay trained.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from star_dss_plugin.data.chat import ChatTokenizer, Encoded, same_beginning, whole_text
from star_dss_plugin.data.conversations import (
    conversation_of,
    source_messages,
    template_arguments,
    text_of,
)
from star_dss_plugin.data.layout import Layout, Turn, generated_spans, lay_out
from star_dss_plugin.data.rendered import is_rendered, parsed_prompt
from star_dss_plugin.errors import DataError
from star_dss_plugin.logprobs import IGNORE_INDEX

__all__ = [
    "MASKS",
    "Tokenized",
    "assistant_labels",
    "has_mask",
    "labelled",
    "needs_assistant_labels",
    "read_row",
    "read_rows",
    "tokenize_row",
]

MASKS = ("completion_mask", "assistant_masks")
"""Columns with 1 for trained tokens and 0 for others, as TRL writes and reads them."""


_AT_ONCE = 64
_CHARACTERS_AT_ONCE = 1 << 18
"""Rows, and characters of them, that are tokenized in one call."""

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


@dataclass(frozen=True)
class Tokenized:
    """A row's text as tokens, and what stands where in it.

    Attributes:
        encoded: The tokens of `text`.
        text: The rendered conversation, or the plain text.
        trained: For each token whether it is trained: what assistants say, ends of turn included.
            None: the row's form does not tell.
        layout: Where the messages stand; None if that is not certain, or there are none.
        source: The messages; None for a plain text.
        problem: Why `trained` is None.
        rendered: Whether a plain text is a chat that is rendered already, and not understood.
        plain: Whether the row has a plain prompt and completion.
    """

    encoded: Encoded
    text: str
    trained: list[bool] | None
    layout: Layout | None
    source: list[dict[str, Any]] | None
    problem: str = ""
    rendered: bool = False
    plain: bool = False


def tokenize_row(
    row: Mapping[str, Any],
    chat: ChatTokenizer,
    *,
    max_length: int | None = None,
    assistant_only_loss: bool = False,
) -> dict[str, list[int]]:
    """Return `input_ids` and `labels` of a raw row, as TRL's SFTTrainer makes them.

    Args:
        row: With `messages` (only assistant turns are trained), `prompt` and `completion` (plain
            or messages; the completion is trained) or `text` (all of it is trained).
        chat: The trained model's tokenizer and its template.
        max_length: Tokens kept from the start; None: all.
        assistant_only_loss: Whether only what the template marks as generated is trained, also of
            completions.

    Raises:
        DataError: No such column, or a conversation whose turns cannot be found in its tokens.
    """
    made = read_row(row, chat, assistant_only_loss=assistant_only_loss)
    return labelled(made, max_length)


def labelled(
    made: Tokenized, max_length: int | None, *, keep_end: bool = False
) -> dict[str, list[int]]:
    """Return `input_ids` and `labels` of a row that was read, cut to `max_length` tokens.

    Args:
        made: What `read_row` returns.
        max_length: Tokens that are kept; None: all.
        keep_end: Whether those at the end are kept, as TRL's truncation_mode of this name does.

    Raises:
        DataError: It is not certain which of its tokens are trained.
    """
    if made.trained is None:
        raise DataError(made.problem)
    tokens = len(made.encoded.ids)
    most = tokens if max_length is None else min(max_length, tokens)
    kept = slice(tokens - most, tokens) if keep_end else slice(most)
    ids = made.encoded.ids[kept]
    labels = [i if t else IGNORE_INDEX for i, t in zip(ids, made.trained[kept], strict=True)]
    return {"input_ids": ids, "labels": labels}


@dataclass(frozen=True)
class _Plan:
    """A row as a text that is to be tokenized.

    Attributes:
        text: The rendered conversation, or the plain text.
        finish: Makes the row's tokens what `read_row` returns.
        plain: Whether the tokenizer adds its own special tokens.
    """

    text: str
    finish: Callable[[Encoded], Tokenized]
    plain: bool = False

    def __post_init__(self) -> None:
        whole_text(self.text)


def read_rows(
    rows: Iterable[Mapping[str, Any]], chat: ChatTokenizer, *, assistant_only_loss: bool = False
) -> Iterator[Tokenized]:
    """Read rows as `read_row` does one; several are tokenized at once, which takes less time.

    Args:
        rows: As for `tokenize_row`.
        chat: As for `tokenize_row`.
        assistant_only_loss: As for `tokenize_row`.

    Raises:
        DataError: As `read_row` does, behind the rows before that row.
    """
    waiting: list[_Plan] = []
    length = 0
    for row in rows:
        try:
            plan = _plan(row, chat, assistant_only_loss, True)
        except DataError:
            yield from _finished(waiting, chat)
            raise
        full = len(waiting) == _AT_ONCE or length >= _CHARACTERS_AT_ONCE
        if waiting and (full or waiting[0].plain != plan.plain):
            yield from _finished(waiting, chat)
            waiting, length = [], 0
        waiting.append(plan)
        length += len(plan.text)
    yield from _finished(waiting, chat)


def _finished(plans: Sequence[_Plan], chat: ChatTokenizer) -> Iterator[Tokenized]:
    """Tokenize rows of one kind."""
    if plans:
        texts = [plan.text for plan in plans]
        encoded = chat.encode_all(texts, add_special_tokens=plans[0].plain)
        yield from (plan.finish(found) for plan, found in zip(plans, encoded, strict=True))


def read_row(
    row: Mapping[str, Any],
    chat: ChatTokenizer,
    *,
    assistant_only_loss: bool = False,
    whole_completion: bool = True,
) -> Tokenized:
    """Tokenize a row, and find what stands where in it.

    Args:
        row: As for `tokenize_row`.
        chat: As for `tokenize_row`.
        assistant_only_loss: As for `tokenize_row`.
        whole_completion: Whether all of a completion that an assistant says is trained, what the
            template writes around it included.

    Raises:
        DataError: No such column, or messages that cannot be rendered.
    """
    plan = _plan(row, chat, assistant_only_loss, whole_completion)
    return plan.finish(chat.encode(plan.text, add_special_tokens=plan.plain))


def _plan(
    row: Mapping[str, Any], chat: ChatTokenizer, assistant_only_loss: bool, whole_completion: bool
) -> _Plan:
    """Return the text of a row, and how its tokens are read."""
    given = {name for name, value in row.items() if value is not None}
    if conversation_of(row) is not None:
        messages = source_messages(row)
        assert messages is not None
        return _conversation(row, messages, chat, 0, assistant_only_loss)
    if {"prompt", "completion"} <= given:
        prompt, completion = row["prompt"], row["completion"]
        source = source_messages(row)
        assert source is not None
        if isinstance(prompt, str) != isinstance(completion, str):
            raise DataError(
                f"'prompt' is a {type(prompt).__name__} and 'completion' a "
                f"{type(completion).__name__}. Both must be texts, or both lists of messages."
            )
        if isinstance(prompt, str):
            return _plain(prompt, completion, chat)
        others = any(m["role"] != "assistant" for m in completion)
        if others or assistant_only_loss or not whole_completion:
            return _conversation(row, source, chat, len(prompt), assistant_only_loss)
        return _completion(row, source, chat)
    if "text" in given:
        text = row["text"]
        if not isinstance(text, str):
            raise DataError(f"'text' is a {type(text).__name__}; it must be a text.")
        whole = _with_eos(chat, text)
        rendered = is_rendered(text, chat)

        def all_of_it(encoded: Encoded) -> Tokenized:
            trained = [True] * len(encoded.ids)
            return Tokenized(encoded, whole, trained, None, None, rendered=rendered)

        return _Plan(whole, all_of_it, plain=True)
    raise DataError(
        f"A row has the columns {sorted(given)}. Scoring needs 'messages', 'prompt' and "
        "'completion', or 'text' (or 'input_ids' and 'labels')."
    )


def needs_assistant_labels(row: Mapping[str, Any]) -> bool:
    """Return whether a tokenized row trains on turns that are not an assistant's.

    True where every token of a conversation or of a prompt with its completion is trained, or a
    completion that holds other turns than the assistant's is trained in one piece.
    """
    messages, completion = conversation_of(row), row.get("completion")
    if isinstance(messages, list) or isinstance(completion, list):
        source_messages(row)  # or an error that says what is wrong with them
    if has_mask(row) and IGNORE_INDEX not in row["labels"]:
        return True
    if isinstance(messages, list):
        others = any(m["role"] != "assistant" for m in messages)
        return others and IGNORE_INDEX not in row["labels"]
    if isinstance(completion, list):
        others = any(m["role"] != "assistant" for m in completion)
        # Several pieces: whoever made the labels (assistant_only_loss) has told the turns apart.
        in_one_piece = _pieces(row["labels"]) == 1
        return IGNORE_INDEX not in row["labels"] or (others and in_one_piece)
    said = isinstance(row.get("prompt"), str) and isinstance(completion, str)
    return said and bool(row["prompt"]) and IGNORE_INDEX not in row["labels"]


def _pieces(labels: list[int]) -> int:
    """Return the number of runs of trained tokens."""
    trained = [label != IGNORE_INDEX for label in labels]
    return sum(now and not before for before, now in zip([False, *trained], trained, strict=False))


def assistant_labels(
    row: Mapping[str, Any], chat: ChatTokenizer, made: Tokenized | None = None
) -> list[int]:
    """Return labels of a tokenized row with only its assistant turns trained.

    Args:
        row: `input_ids` (possibly truncated, at either end) and the messages they were made from.
        chat: The tokenizer and the template that made `input_ids`.
        made: What `read_row` returns for the row, if that is known.

    Returns:
        One label per token of `input_ids`.

    Raises:
        DataError: The row's tokens are not those of its messages.
    """
    given = list(row["input_ids"])
    if has_mask(row):
        tokens = zip(given, *(row[m] for m in MASKS if row.get(m) is not None), strict=True)
        return [token if all(bits) else IGNORE_INDEX for token, *bits in tokens]
    made = made or read_row(row, chat)
    if made.trained is None:
        raise DataError(made.problem)
    ids, trained = made.encoded.ids, made.trained
    for start in (0, max(0, len(ids) - len(given))):
        kept = slice(start, start + len(given))
        if ids[kept] == given:
            return [i if t else IGNORE_INDEX for i, t in zip(given, trained[kept], strict=True)]
    if made.plain:
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


def has_mask(row: Mapping[str, Any]) -> bool:
    """Return whether a row's own masks say what is trained, and nothing else is needed for it.

    A host that cuts rows may leave masks as long as they were; the messages tell then. A completion
    that holds turns of others needs them too.
    """
    masks = [row[m] for m in MASKS if row.get(m) is not None]
    completion = row.get("completion")
    if isinstance(completion, list) and any(m["role"] != "assistant" for m in completion):
        return False
    return bool(masks) and all(len(m) == len(row["input_ids"]) for m in masks)


def _conversation(
    row: Mapping[str, Any],
    source: list[dict[str, Any]],
    chat: ChatTokenizer,
    first: int,
    assistant_only_loss: bool,
) -> _Plan:
    """Render a conversation; the assistant's turns from message `first` on are trained."""
    arguments = template_arguments(row)
    text, layout = lay_out(chat, source, arguments)
    generated = layout.generated if layout else generated_spans(chat, source, arguments, text)

    def turns_of_it(encoded: Encoded) -> Tokenized:
        return _turns(source, chat, first, (text, layout, encoded), generated, assistant_only_loss)

    return _Plan(text, turns_of_it)


def _turns(
    source: list[dict[str, Any]],
    chat: ChatTokenizer,
    first: int,
    made: tuple[str, Layout | None, Encoded],
    generated: Sequence[tuple[int, int]] | None,
    assistant_only_loss: bool,
) -> Tokenized:
    """Find which tokens of a rendered conversation are trained."""
    text, layout, encoded = made
    trained = [False] * len(encoded.ids)
    turns = [t for t in layout.turns if t.message >= first] if layout else []
    if generated is not None:
        begin = turns[0].begin if first and turns else 0
        for start, end in generated:
            if start >= begin:
                _train(trained, encoded, start, end)
    elif assistant_only_loss:
        return Tokenized(encoded, text, None, layout, source, _NOTHING_GENERATED)
    elif layout is None or len(turns) < _speaking(source, first):
        return Tokenized(encoded, text, None, layout, source, _NOT_PLAIN)
    for turn in turns if generated is None else ():
        _train_turn(trained, encoded, chat, text, turn)
    return Tokenized(encoded, text, trained, layout, source)


def _speaking(source: list[dict[str, Any]], first: int) -> int:
    """Return how many assistant turns from message `first` on say something."""
    return sum(
        m["role"] == "assistant" and bool(text_of(m.get("content")) or m.get("tool_calls"))
        for m in source[first:]
    )


def _train(trained: list[bool], encoded: Encoded, start: int, end: int) -> None:
    """Mark the tokens of some characters as trained."""
    first, last = bisect_right(encoded.ends, start), bisect_left(encoded.starts, end)
    trained[first:last] = [True] * (last - first)


def _train_turn(
    trained: list[bool],
    encoded: Encoded,
    chat: ChatTokenizer,
    text: str,
    turn: Turn,
) -> None:
    """Mark a turn as trained, with its end: the model must learn to stop.

    The end is the first control token behind the words. Where the token that stops generation
    stands behind others (Cohere's), it is all of them up to that one. Behind a call of a function
    the template's own text may come first.
    """
    end = turn.words[-1][1]
    _train(trained, encoded, turn.begin, end)
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
    if stop is not None:
        trained[first : stop + 1] = [True] * (stop + 1 - first)


def _completion(row: Mapping[str, Any], source: list[dict[str, Any]], chat: ChatTokenizer) -> _Plan:
    """Render a prompt of messages and a completion that an assistant says, trained as a whole."""
    arguments, prompt = template_arguments(row), row["prompt"]
    text, layout = lay_out(chat, source, arguments)
    question = chat.render(prompt, add_generation_prompt=True, **arguments)
    whole_text(question)

    def behind_the_question(encoded: Encoded) -> Tokenized:
        common = chat.begins_like(encoded, text, question)
        trained = [False] * common + [True] * (len(encoded.ids) - common)
        return Tokenized(encoded, text, trained, layout, source)

    return _Plan(text, behind_the_question)


def _plain(prompt: str, completion: str, chat: ChatTokenizer) -> _Plan:
    """Join a prompt and a completion that are texts."""
    text = whole_text(prompt + _with_eos(chat, completion))
    asked = chat.ids(prompt)
    rendered = is_rendered(prompt, chat)
    source = parsed_prompt(prompt, chat) if rendered else [{"role": "user", "content": prompt}]
    layout = None if source is None else _plain_layout(prompt, completion, text, source, chat)
    if source is not None:
        source = [*source, {"role": "assistant", "content": completion}]

    def behind_the_prompt(encoded: Encoded) -> Tokenized:
        common = same_beginning(encoded.ids, asked)
        trained = [False] * common + [True] * (len(encoded.ids) - common)
        unread = source is None
        return Tokenized(encoded, text, trained, layout, source, rendered=unread, plain=True)

    return _Plan(text, behind_the_prompt, plain=True)


def _plain_layout(
    prompt: str,
    completion: str,
    text: str,
    source: Sequence[Mapping[str, Any]],
    chat: ChatTokenizer,
) -> Layout:
    """Return where a prompt's messages and a completion stand in their text."""
    k = len(source)
    inner = _without_control(completion, chat)
    begin, end = len(prompt) + inner[0], len(prompt) + inner[1]
    whole = inner == (0, len(completion))
    turn = Turn(k, len(prompt), ((begin, end),), whole, len(text))
    # What was said before is known as a whole, not where in the prompt.
    earlier = [m for m in range(k) if source[m]["role"] == "assistant"]
    turns = (*(Turn(m, 0, ((0, 0),), True, 0) for m in earlier), turn)
    return Layout(text, turns, tuple((0, len(prompt), m) for m in range(k)), None)


def _without_control(completion: str, chat: ChatTokenizer) -> tuple[int, int]:
    """Return the part of a completion that lies within the control tokens around it."""
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
