"""Say what a row's text is as tokens, and what stands where in it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from star_dss_plugin.data.chat import Encoded, whole_text
from star_dss_plugin.data.layout import Layout

__all__ = ["Plan", "Tokenized"]


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
