"""Which tokens of a row are a response, what text they are, and what was said before them.

A *response* is a maximal run of trained tokens (`labels != -100`). Its text is the exact decoding
of those tokens, without the special tokens around it; its context is the messages before it, or,
where only tokens are known, the decoded tokens before it.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from typing import Any

import jinja2
from transformers import PreTrainedTokenizerBase

from star_dss_plugin.errors import DataError
from star_dss_plugin.guards.base import Message, PrefixRequest
from star_dss_plugin.logprobs import IGNORE_INDEX
from star_dss_plugin.segmenters import Segmenter, chunk_ends

__all__ = [
    "Response",
    "find_responses",
    "render_chat",
    "row_messages",
    "runs",
    "source_messages",
    "special_ids",
    "template_arguments",
    "token_boundaries",
]

_OVERLAP = 8
"""Boundaries back from which tokens are decoded again, so that a decoder sees a token's left
neighbours (some strip the first token's leading space)."""
_REPLACEMENT = "\ufffd"  # what decoders write for a character whose bytes are not all there


@dataclass(frozen=True)
class Response:
    """One response of a row and how it is cut.

    Attributes:
        start: First token of the run in the row.
        end: One past the run's last token.
        chunk_ends: One past the last token of each chunk, in the row; strictly increasing, the last
            one is `end`: chunks partition the run, special tokens included.
        request: Context, text and prefix ends for the guard, one prefix per chunk.
        raw_context: True if the context is decoded tokens, because no message matched the run.
    """

    start: int
    end: int
    chunk_ends: tuple[int, ...]
    request: PrefixRequest
    raw_context: bool


def runs(labels: Sequence[int]) -> list[tuple[int, int]]:
    """Maximal runs [start, end) of labels other than -100."""
    found: list[tuple[int, int]] = []
    for i, label in enumerate(labels):
        if label == IGNORE_INDEX:
            continue
        if found and found[-1][1] == i:
            found[-1] = (found[-1][0], i + 1)
        else:
            found.append((i, i + 1))
    return found


def _decode(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    text = tokenizer.decode(
        list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False
    )
    assert isinstance(text, str)
    return text


def token_boundaries(
    tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]
) -> tuple[str, list[int], list[bool]]:
    """The text of some tokens, and how far it reaches after each of them.

    Returns:
        The decoded text; for each token the number of its characters that are complete after that
        token; for each token whether the text is complete there (False inside a character that is
        spread over several tokens).
    """
    text, kept = _readable(tokenizer, ids)
    whole, rest = ids[:kept], len(ids) - kept
    ends, complete = _boundaries(tokenizer, whole, text, _OVERLAP)
    if whole and not (complete[-1] and ends[-1] == len(text)):
        # A decoder whose output depends on tokens further back: decode every prefix in full.
        ends, complete = _boundaries(tokenizer, whole, text, len(whole))
    return text, ends + [len(text)] * rest, complete + [True] * rest


def _readable(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> tuple[str, int]:
    """The text of some tokens, and how many of them it takes.

    All of them, but for this: truncation may leave the first bytes of a character, for which
    decoders that fall back to bytes give up on all the bytes before it too. Those are left out.
    """
    text = _decode(tokenizer, ids)
    if text.endswith(_REPLACEMENT):
        for kept in range(len(ids) - 1, max(0, len(ids) - 4), -1):
            shorter = _decode(tokenizer, ids[:kept])
            if not shorter.endswith(_REPLACEMENT):
                return (text, len(ids)) if text.startswith(shorter) else (shorter, kept)
    return text, len(ids)


def _boundaries(
    tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], text: str, overlap: int
) -> tuple[list[int], list[bool]]:
    ends: list[int] = []
    complete: list[bool] = []
    chars, seen = 0, ""  # up to the last boundary: characters, text of the window
    # A window begins at a boundary: where bytes are tokens, a decoder that meets the second half of
    # a character gives up on all bytes behind it too.
    starts = deque([0], maxlen=overlap + 1)
    for n in range(1, len(ids) + 1):
        start = starts[0]
        window = _decode(tokenizer, ids[start:n])
        piece = window[len(seen) :]
        at_boundary = (
            window.startswith(seen)
            and text.startswith(piece, chars)
            and not _cuts_replacement(tokenizer, ids, start, n, window)
        )
        if at_boundary:
            chars += len(piece)
            starts.append(n)
            seen = window if starts[0] == start else _decode(tokenizer, ids[starts[0] : n])
        ends.append(chars)
        complete.append(at_boundary)
    return ends, complete


def _cuts_replacement(
    tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], start: int, n: int, window: str
) -> bool:
    """Whether a window ends inside a U+FFFD that the text itself holds.

    Its first byte looks like all of it, and the text does not grow with the other two.
    """
    later = range(n + 1, min(n + 2, len(ids)) + 1)
    return window.endswith(_REPLACEMENT) and any(
        _decode(tokenizer, ids[start:end]) == window for end in later
    )


def special_ids(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Ids of the tokenizer's control tokens."""
    added = tokenizer.added_tokens_decoder
    return frozenset(tokenizer.all_special_ids) | {i for i, t in added.items() if t.special}


def _body(
    tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], special: frozenset[int]
) -> tuple[int, int]:
    """The part of a run that is text: without leading special tokens and without the end of turn.

    The end of turn is the run's last stretch of special tokens, with white space behind or between.
    """
    first, last = 0, len(ids)
    while first < last and ids[first] in special:
        first += 1
    cut = last
    while cut > first and (
        ids[cut - 1] in special or not _decode(tokenizer, [ids[cut - 1]]).strip()
    ):
        cut -= 1
        if ids[cut] in special:
            last = cut
    return first, last


def find_responses(
    row: Mapping[str, Any],
    tokenizer: PreTrainedTokenizerBase,
    segmenter: Segmenter,
    chunk_size: int,
    *,
    chat_template: str | None = None,
) -> list[Response]:
    """All responses of a tokenized row.

    Args:
        row: `input_ids` and `labels`, and if known the messages (`messages`, or `prompt` and
            `completion`).
        tokenizer: The one that made `input_ids`.
        segmenter: Where chunks end.
        chunk_size: M, in the segmenter's units.
        chat_template: The template that made `input_ids`; None: the tokenizer's own.

    Raises:
        DataError: `input_ids` and `labels` differ in length, or a label is not its token.
    """
    ids, labels = list(row["input_ids"]), list(row["labels"])
    if len(ids) != len(labels):
        raise DataError(
            f"input_ids has {len(ids)} tokens and labels has {len(labels)}. They must be the same "
            "tokens: truncate both, or neither."
        )
    special = special_ids(tokenizer)
    context_of = _context_finder(tokenizer, ids, row, chat_template)
    found = []
    for start, end in runs(labels):
        if labels[start:end] != ids[start:end]:
            raise DataError(
                f"The labels at tokens {start} to {end} are not the input's own tokens. STAR-DSS "
                "needs unshifted labels: a copy of input_ids with -100 where nothing is trained."
            )
        first, last = _body(tokenizer, ids[start:end], special)
        text, char_ends, complete = token_boundaries(tokenizer, ids[start + first : start + last])
        cuts = chunk_ends(segmenter(text, char_ends, chunk_size), complete)
        prefix_ends = [char_ends[cut - 1] for cut in cuts] or [0]
        tokens = [start + first + cut for cut in cuts[:-1]] + [end]
        tokens, prefix_ends = _merge_empty(tokens, prefix_ends)
        context, raw = context_of(start, text)
        request = PrefixRequest(context, text, tuple(prefix_ends))
        found.append(Response(start, end, tuple(tokens), request, raw))
    return found


def _merge_empty(tokens: list[int], prefix_ends: list[int]) -> tuple[list[int], list[int]]:
    """Joins chunks that add no text (tokens that decode to nothing) to the chunk after them."""
    keep = [i for i, (a, b) in enumerate(pairwise([*prefix_ends, -1])) if a != b]
    return [tokens[i] for i in keep], [prefix_ends[i] for i in keep]


def source_messages(row: Mapping[str, Any]) -> list[dict[str, Any]] | None:
    """The conversation of a row as it is given, whatever columns it is in; None if there is none.

    A plain-text `prompt` counts as one user message, a plain-text `completion` as the answer.
    """
    if isinstance(row.get("messages"), list):
        return [dict(m) for m in row["messages"]]
    prompt, completion = row.get("prompt"), row.get("completion")
    if prompt is None or completion is None:
        return None
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    if isinstance(completion, str):
        completion = [{"role": "assistant", "content": completion}]
    return [dict(m) for m in [*prompt, *completion]]


def row_messages(row: Mapping[str, Any]) -> list[Message] | None:
    """`source_messages` with each content as one string (typed parts joined, absent ones empty)."""
    source = source_messages(row)
    return None if source is None else [_text_message(m) for m in source]


def _text_message(message: Mapping[str, Any]) -> Message:
    content = message.get("content")
    if isinstance(content, list):
        content = "".join(part.get("text") or "" for part in content)
    return {"role": message["role"], "content": content or ""}


def template_arguments(row: Mapping[str, Any]) -> dict[str, Any]:
    """What a row gives to its chat template beside its messages."""
    tools = row.get("tools")
    tools = json.loads(tools) if isinstance(tools, str) else tools
    return {"tools": tools, **(row.get("chat_template_kwargs") or {})}


def render_chat(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Mapping[str, Any]], **kwargs: Any
) -> str:
    """The chat template's text for some messages.

    Raises:
        DataError: There is no template, or it cannot render these messages.
    """
    try:
        text = tokenizer.apply_chat_template([dict(m) for m in messages], tokenize=False, **kwargs)
    except (jinja2.TemplateError, TypeError, ValueError) as error:
        raise DataError(f"The chat template cannot render the row's messages: {error}") from error
    assert isinstance(text, str)
    return text


def _squash(text: str) -> str:
    """Without white space: templates trim and pad it."""
    return "".join(text.split())


def _context_finder(
    tokenizer: PreTrainedTokenizerBase,
    ids: Sequence[int],
    row: Mapping[str, Any],
    chat_template: str | None,
) -> Callable[[int, str], tuple[tuple[Message, ...], bool]]:
    """A function (start of a run, its text) → (context, whether it is raw).

    A run is assistant message k if it agrees with k's content, and the tokens before it are what
    the row's own template makes of the messages before k. Where the template makes other tokens
    (another one was used), `_by_contents` decides.
    """
    source, messages = source_messages(row), row_messages(row) or []
    contents = [_squash(str(m["content"])) for m in messages]
    arguments = {"chat_template": chat_template, **template_arguments(row)}
    bos = str(tokenizer.bos_token or "")
    plain = isinstance(row.get("prompt"), str) and not isinstance(row.get("messages"), list)

    @cache
    def rendered(k: int) -> str | None:
        """The messages before k; None if the template cannot say (it may insist on an answer)."""
        assert source is not None
        if k == 0 or plain:
            return "".join(contents[:k])
        try:
            text = render_chat(tokenizer, source[:k], **arguments)
        except DataError:
            return None
        return _squash(text.removeprefix(bos))

    def begins(before: str, k: int) -> bool:
        text = rendered(k)
        return text is not None and before.startswith(text)

    def find(start: int, text: str) -> tuple[tuple[Message, ...], bool]:
        decoded = _decode(tokenizer, ids[:start])
        before, run = _squash(decoded.removeprefix(bos)), _squash(text)
        spoken = [
            k
            for k, message in enumerate(messages)
            if message["role"] == "assistant" and _agrees(contents[k], run)
        ]
        here = [k for k in spoken if begins(before, k) and not begins(before, k + 1)]
        match = here[-1] if here else _by_contents(before, messages, contents, spoken)
        if match is not None:
            return tuple(messages[:match]), False
        return ({"role": "user", "content": decoded},) if decoded else (), True

    return find


def _by_contents(
    before: str, messages: Sequence[Message], contents: Sequence[str], spoken: Sequence[int]
) -> int | None:
    """The candidate whose earlier messages all stand before the run, in order.

    Templates drop system turns and cut old answers, never a question. Of several candidates, the
    one with the fewest such gaps (a short question may seem to stand in the template's own words);
    then the last.
    """
    found: list[tuple[int, int]] = []
    reached = missing = 0
    for k, content in enumerate(contents):
        if k in spoken:
            found.append((missing, -k))
        position = before.find(content, reached)
        if position >= 0:
            reached = position + len(content)
        elif messages[k]["role"] == "user":
            break
        else:
            missing += 1
    return -min(found)[1] if found else None


def _agrees(content: str, run: str) -> bool:
    """Whether a run is this message, up to truncation and what a template puts around it."""
    run = run.rstrip(_REPLACEMENT)  # half a character, where the row was cut
    return run in content if len(run) <= len(content) else content in run
