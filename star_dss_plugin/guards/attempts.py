"""Detect text that imitates a guard's prompt or verdict, so that attempts to fool it are reported.

The defence is elsewhere: content never becomes a control token (`prompting/template.py`), and only
content is cut to fit, never the guard's own words (`prompting/prompts.py`).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

__all__ = ["Markers", "find_attempts", "scaffold_lines"]

_SHORTEST_MARK, _SHORTEST_SENTENCE = 5, 12
_CONTROL = "control token"
_SCAFFOLD = "guard's own words"
_VERDICT = "fake verdict"

_ANYWHERE: Mapping[str, re.Pattern[str]] = {
    "template code": re.compile(r"\{\{.{0,200}?\}\}|\{%.{0,200}?%\}", re.DOTALL),
    # Control characters, bidirectional overrides, zero-width characters that no script needs, tag
    # characters, lone surrogates.
    "hidden characters": re.compile(
        "[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u200b\u2060\ufeff\u202a-\u202e\u2066-\u2069"
        "\U000e0000-\U000e007f\ud800-\udfff]"
    ),
    "long white space": re.compile(r"\s{200}"),
}


@dataclass(frozen=True)
class Markers:
    """Describe what text that imitates one guard's prompt would contain.

    Attributes:
        control_tokens: Spellings of the guard's control tokens.
        scaffold: Lines of the guard's own prompt that follow the response.
        verdict: Text right before the guard's verdict.
        labels: The guard's verdict words.
    """

    control_tokens: Sequence[str] = ()
    scaffold: Sequence[str] = ()
    verdict: str = ""
    labels: Sequence[str] = ()

    @cached_property
    def patterns(self) -> dict[str, re.Pattern[str]]:
        """Compile the search patterns, by kind of attempt."""
        found = {
            _CONTROL: _any(re.escape(t) for t in self.control_tokens),
            _SCAFFOLD: _any(re.escape(line) for line in self.scaffold),
        }
        if self.verdict:
            labels = "|".join(re.escape(label.strip()) for label in self.labels)
            found[_VERDICT] = re.compile(
                rf"{re.escape(self.verdict)}\s*(?:{labels})\b", re.IGNORECASE
            )
        return found


def find_attempts(texts: Iterable[str], markers: Sequence[Markers]) -> set[str]:
    """Return the kinds of attempt found in texts, with the markers of all guards that read them."""
    patterns = [*_ANYWHERE.items(), *(item for m in markers for item in m.patterns.items())]
    return {kind for text in texts for kind, pattern in patterns if pattern.search(text)}


def scaffold_lines(ending: str, control_tokens: Sequence[str]) -> tuple[str, ...]:
    """Return the lines of a prompt's ending that hardly occur in text by chance."""
    for token in control_tokens:
        ending = ending.replace(token, "\n")
    lines = (line.strip() for line in ending.splitlines())
    return tuple(
        dict.fromkeys(
            line
            for line in lines
            if (line[:1] in ("<", "[", "{", "|") and len(line) >= _SHORTEST_MARK)
            or (" " in line and len(line) >= _SHORTEST_SENTENCE)
        )
    )


def _any(alternatives: Iterable[str]) -> re.Pattern[str]:
    return re.compile("|".join(alternatives) or r"(?!)")
