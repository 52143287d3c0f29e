"""Hold a row's rendered text, its tokens, and which of them are trained."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from star_dss_plugin.data.templates.encoded import Encoded, checked_utf8
from star_dss_plugin.data.templates.layout import Layout
from star_dss_plugin.logprobs import IGNORE_INDEX

__all__ = [
    "RenderedRow",
    "Runs",
    "Tokenized",
    "joined_runs",
    "labels_of",
    "runs_within",
    "trained_runs",
]

Runs = list[tuple[int, int]]


@dataclass(frozen=True)
class Tokenized:
    """A tokenized row, and the positions of its messages and trained tokens.

    Attributes:
        encoded: The tokens of `text`.
        text: The rendered conversation, or the plain text.
        trained: The runs [start, end) of trained tokens, in order: assistant turns with their
            end-of-turn tokens. No run is empty and no two touch. None if it cannot be determined.
        layout: The positions of the messages; None if they are uncertain or there are no messages.
        source: The messages; None for a plain text.
        problem: Why `trained` is None.
        rendered: Whether a plain text is a rendered chat that could not be parsed.
        plain: Whether the row has a plain-text prompt and completion.
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
class RenderedRow:
    """A row that has been rendered but not tokenized.

    Attributes:
        text: The rendered conversation, or the plain text.
        finish: Turns the tokens of `text` into the result of `read_row`.
        plain: Whether the tokenizer adds its special tokens.
    """

    text: str
    finish: Callable[[Encoded], Tokenized]
    plain: bool = False

    def __post_init__(self) -> None:
        checked_utf8(self.text)


def trained_runs(labels: Sequence[int]) -> Runs:
    """Return the maximal runs [start, end) of labels other than -100."""
    trained = np.asarray([IGNORE_INDEX, *labels, IGNORE_INDEX]) != IGNORE_INDEX
    edges = np.flatnonzero(trained[1:] != trained[:-1]).tolist()
    return list(zip(edges[::2], edges[1::2], strict=True))


def joined_runs(runs: Iterable[tuple[int, int]]) -> Runs:
    """Sort runs of tokens, merge those that touch or overlap, and drop empty ones."""
    joined: Runs = []
    for start, end in sorted(runs):
        if start >= end:
            continue
        if joined and start <= joined[-1][1]:
            joined[-1] = joined[-1][0], max(end, joined[-1][1])
        else:
            joined.append((start, end))
    return joined


def runs_within(runs: Runs, kept: slice) -> Runs:
    """Return the parts of runs within `kept`, with indices relative to `kept.start`."""
    first, last = kept.start, kept.stop
    cut = ((max(start, first) - first, min(end, last) - first) for start, end in runs)
    return [(start, end) for start, end in cut if start < end]


def labels_of(ids: Sequence[int], trained: Runs) -> list[int]:
    """Return one label per token: the token's id if it is trained, else -100."""
    labels = [IGNORE_INDEX] * len(ids)
    for start, end in trained:
        labels[start:end] = ids[start:end]
    return labels
