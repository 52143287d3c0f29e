"""Say what a row's text is as tokens, and what stands where in it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from star_dss_plugin.data.templates.chat import Encoded, whole_text
from star_dss_plugin.data.templates.layout import Layout
from star_dss_plugin.logprobs import IGNORE_INDEX

__all__ = ["Plan", "Runs", "Tokenized", "joined_runs", "labels_of", "runs_within"]

Runs = list[tuple[int, int]]


@dataclass(frozen=True)
class Tokenized:
    """A row's text as tokens, and what stands where in it.

    Attributes:
        encoded: The tokens of `text`.
        text: The rendered conversation, or the plain text.
        trained: The runs [start, end) of tokens that are trained, in order: what assistants say,
            ends of turn included. They are not empty, and do not touch each other. None: the row's
            form does not tell.
        layout: Where the messages stand; None if that is not certain, or there are none.
        source: The messages; None for a plain text.
        problem: Why `trained` is None.
        rendered: Whether a plain text is a chat that is rendered already, and not understood.
        plain: Whether the row has a plain prompt and completion.
    """

    encoded: Encoded
    text: str
    trained: Runs | None
    layout: Layout | None
    source: list[dict[str, Any]] | None
    problem: str = ""
    rendered: bool = False
    plain: bool = False


@dataclass(frozen=True)
class Plan:
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


def joined_runs(found: Iterable[tuple[int, int]]) -> Runs:
    """Return runs of tokens in order, those that touch or overlap joined, empty ones left out."""
    joined: Runs = []
    for start, end in sorted(found):
        if start >= end:
            continue
        if joined and start <= joined[-1][1]:
            joined[-1] = joined[-1][0], max(end, joined[-1][1])
        else:
            joined.append((start, end))
    return joined


def runs_within(found: Runs, kept: slice) -> Runs:
    """Return the runs of some tokens, counted from the first of these on."""
    first, last = kept.start, kept.stop
    cut = ((max(start, first) - first, min(end, last) - first) for start, end in found)
    return [(start, end) for start, end in cut if start < end]


def labels_of(ids: Sequence[int], trained: Runs) -> list[int]:
    """Return one label for each token: itself where it is trained, and -100 elsewhere."""
    labels = [IGNORE_INDEX] * len(ids)
    for start, end in trained:
        labels[start:end] = ids[start:end]
    return labels
