"""Conversations that are too long for a guard: what is cut, and what never is."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from star_dss_plugin.guards.base import Message

__all__ = ["fitting_context"]


def fitting_context(
    context: Sequence[Message], room: int, length: Callable[[Sequence[Message]], int]
) -> list[Message] | None:
    """As much of a conversation as fits: its oldest turns go first, then the last question's start.

    Args:
        context: Turns before the response, the last one a question.
        room: The most tokens that a prompt may have.
        length: Tokens of the prompt for a context, the guard's own words and the response included.

    Returns:
        The end of the conversation; None if the response does not fit even alone.
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
    low, high = 0, len(text)  # the shortest start that has to go
    while low < high:
        middle = (low + high) // 2
        if length(cut(middle)) <= room:
            high = middle
        else:
            low = middle + 1
    return cut(low)
