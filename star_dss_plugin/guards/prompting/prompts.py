"""Build a verdict guard's prompts from a response and its context, one per prefix."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any

from star_dss_plugin.data.requests import Message, PrefixRequest
from star_dss_plugin.engines.shared_prompts import SharedPrompts
from star_dss_plugin.errors import ConfigError, GuardError
from star_dss_plugin.guards.prompting.template import GuardTemplate

__all__ = ["Prompts", "fitting_context", "policies"]

# A prefix of a response may have a few tokens more than the whole: half a word is often two.
_SPARE_TOKENS = 16
_TOKENS_PER_TURN = 32  # more than any template adds around a turn


class Prompts:
    """Build the prompts about a response.

    Args:
        name: The guard's name, for errors.
        templates: One template per policy.
        turns: "all" for the whole conversation, "last" for the last question only.
        max_length: Largest number of tokens in a prompt; None is no limit.

    Raises:
        ConfigError: `turns` has another value.
    """

    def __init__(
        self, name: str, templates: Sequence[GuardTemplate], turns: str, max_length: int | None
    ) -> None:
        if turns not in ("all", "last"):
            raise ConfigError(f"turns is {turns!r}; a guard reads 'all' turns or the 'last' one.")
        self._name = name
        self.templates = templates
        self._turns = turns
        self._max_length = max_length

    def of(self, index: int, request: PrefixRequest) -> list[SharedPrompts]:
        """Return the prompts up to the verdict position: per template, one prompt per prefix.

        Args:
            index: The request's index in its batch, for the error.
            request: The response with its context and prefixes.

        Raises:
            GuardError: The response does not fit into the guard's context; the error carries
                `index`.
        """
        context = self.fit_context(index, request)
        found = [t.prompts(context, request.text, request.ends) for t in self.templates]
        longest = max(length for prompts in found for length in prompts.lengths())
        if self._max_length is not None and longest > self._max_length:
            raise self._too_long(longest, index)
        return found

    def fit_context(self, index: int, request: PrefixRequest) -> list[Message]:
        """Return the turns of the context that fit; raise like `build`."""
        context = self.context(request)
        if context is None:
            raise self._too_long(self._length([], request), index)
        return context

    def truncates(self, request: PrefixRequest) -> bool:
        """Return whether a part of the conversation is cut to make the response fit."""
        return self.context(request) not in (None, self.turns(request.context))

    def context(self, request: PrefixRequest) -> list[Message] | None:
        """Return the turns that fit, equal for all prefixes; None if even the response does not."""
        turns = self.turns(request.context)
        # A token has at least one byte, so the bytes bound the tokens without tokenizing.
        texts = [request.text, *(str(turn["content"]) for turn in turns)]
        bound = sum(len(text.encode("utf-8", "replace")) for text in texts)
        bound += self._bare_length + _TOKENS_PER_TURN * len(turns) + _SPARE_TOKENS
        if self._max_length is None or bound <= self._max_length:
            return turns
        room = self._max_length - _SPARE_TOKENS
        return fitting_context(turns, room, lambda kept: self._length(kept, request))

    def turns(self, messages: Sequence[Message]) -> list[Message]:
        """Merge messages into alternating turns that begin and end with a question.

        Many templates require this form. System and developer messages are dropped. Tool output
        becomes a user turn or a part of one.
        """
        if self._turns == "last":
            messages = _last_question(messages)
        turns: list[Message] = []
        for message in messages:
            if message["role"] in ("system", "developer"):
                continue
            role = "assistant" if message["role"] == "assistant" else "user"
            content = str(message["content"])
            if turns and turns[-1]["role"] == role:
                content = f"{turns.pop()['content']}\n\n{content}"
            turns.append({"role": role, "content": content})
        nothing: Message = {"role": "user", "content": ""}
        if not turns or turns[0]["role"] == "assistant":
            turns.insert(0, nothing)
        if turns[-1]["role"] == "assistant":
            turns.append(nothing)
        return turns

    def _length(self, context: Sequence[Message], request: PrefixRequest) -> int:
        """Return the number of tokens in the prompt for the whole response."""
        turns = context or self.turns([])
        ends = (len(request.text),)
        return max(t.prompts(turns, request.text, ends).lengths()[0] for t in self.templates)

    @cached_property
    def _bare_length(self) -> int:
        """Return the number of tokens in a prompt with empty content."""
        return self._length([], PrefixRequest((), "", (0,)))

    def _too_long(self, longest: int, index: int) -> GuardError:
        return GuardError(
            f"A prompt of {longest} tokens does not fit the context of guard {self._name!r} "
            f"({self._max_length} tokens), even without the conversation before the response. "
            "Shorten the data (max_length), use a guard with a longer context, or set "
            "on_guard_error='unsafe'.",
            request=index,
        )


def _last_question(messages: Sequence[Message]) -> list[Message]:
    """Return the last user messages in a row and the tool output after them.

    Without a user message, it is the last message that is not the assistant's.
    """
    last = max((k for k, m in enumerate(messages) if m["role"] == "user"), default=None)
    if last is None:
        return [m for m in messages if m["role"] != "assistant"][-1:]
    while last and messages[last - 1]["role"] == "user":
        last -= 1
    return [m for m in messages[last:] if m["role"] != "assistant"]


def policies(
    kwargs: Mapping[str, Any] | Sequence[Mapping[str, Any]] | None,
) -> list[Mapping[str, Any]]:
    """Return `template_kwargs` as a list with the template arguments of each policy.

    Raises:
        ConfigError: `kwargs` is neither a mapping nor a list of mappings.
    """
    if kwargs is None or isinstance(kwargs, Mapping):
        return [kwargs or {}]
    if not kwargs or not all(isinstance(one, Mapping) for one in kwargs):
        raise ConfigError(
            f"template_kwargs is {kwargs!r}; give a mapping, or a list of them to ask with each."
        )
    return list(kwargs)


def fitting_context(
    context: Sequence[Message], room: int, length: Callable[[Sequence[Message]], int]
) -> list[Message] | None:
    """Drop a conversation's oldest turns, then the start of the last question, until it fits.

    Args:
        context: Turns before the response; the last one is a question.
        room: Largest number of tokens in a prompt.
        length: Returns the number of tokens in the prompt for a context, response included.

    Returns:
        The end of the conversation; None if the response does not fit even with an empty question.
    """
    if length(context) <= room:
        return list(context)
    questions = [i for i, turn in enumerate(context) if turn["role"] == "user"]
    for first in questions[1:]:
        if length(context[first:]) <= room:
            return list(context[first:])
    question = context[questions[-1]]
    text = str(question["content"])

    def cut(start: int) -> list[Message]:
        return [{**question, "content": text[start:]}]

    if length(cut(len(text))) > room:
        return None
    low, high = 0, len(text)  # binary search for the shortest start to cut
    while low < high:
        middle = (low + high) // 2
        if length(cut(middle)) <= room:
            high = middle
        else:
            low = middle + 1
    return cut(low)
