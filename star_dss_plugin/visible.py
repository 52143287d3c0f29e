"""Make untrusted text safe to display by replacing invisible and control characters with names.

Text is converted once, in Python, before it is written anywhere, so that a report, a terminal or a
notebook never receives an escape sequence, a bidirectional override, a NUL or a lone surrogate.
"""

from __future__ import annotations

import re
import unicodedata

__all__ = ["as_code", "visible", "visible_line"]

_KEPT = "\n\t"
_CONTROL_PICTURES = 0x2400  # ␀ ␁ … stand for U+0000, U+0001, …
_DELETE = 0x7F
# Characters that are invisible but not in the format category; runs of them can hide bytes.
_INVISIBLE = frozenset(
    {
        0x034F,
        0x115F,
        0x1160,
        0x17B4,
        0x17B5,
        0x2065,
        0x2800,
        0x3164,
        0xFFA0,
        *range(0x180B, 0x1810),
        *range(0xFE00, 0xFE0F),
        *range(0xFFF0, 0xFFF9),
        *range(0xE0000, 0xE1000),
    }
)
_MARKS = 8
"""Limit of combining marks per character; more would cover neighbouring text."""
_HIDDEN = ("Cc", "Cf", "Cs", "Zl", "Zp")
_PLAIN = re.compile(r"[\n\t\x20-\x7e]*")


def visible(text: str) -> str:
    """Replace control, format and bidirectional characters by visible names.

    Args:
        text: Any string, lone surrogates included.

    Returns:
        The text with "␀" to "␟" and "␡" for ASCII controls (line feed and tab stay), and names such
        as "⟨U+202E⟩" for other hidden characters and for combining marks in long runs. It can be
        encoded in UTF-8 and does not change the direction of other text.
    """
    if _PLAIN.fullmatch(text):
        return text
    shown, marks = [], 0
    for char in text:
        marks = marks + 1 if unicodedata.category(char)[0] == "M" else 0
        shown.append(_name(char) if marks > _MARKS else _shown(char))
    return "".join(shown)


def visible_line(text: str, max_length: int = 200) -> str:
    """Return text as one safe line, truncated to `max_length` characters.

    Line breaks and tabs are shown by name too, so that text cannot forge lines of a log.
    """
    shown = visible(text[: max_length + 1]).replace("\n", "␊").replace("\t", "␉")
    return shown[:max_length] + "…" if len(text) > max_length else shown


def as_code(text: str) -> str:
    """Return text as a Markdown code span, in which nothing is markup, even in a table's cell."""
    plain = visible_line(text).replace("`", "'").replace("\\", "∖").replace("|", "\\|")
    return f"`{plain.strip() or '-'}`"


def _shown(char: str) -> str:
    code = ord(char)
    if char in _KEPT or not (unicodedata.category(char) in _HIDDEN or code in _INVISIBLE):
        return char
    if code < 0x20:
        return chr(_CONTROL_PICTURES + code)
    return "␡" if code == _DELETE else _name(char)


def _name(char: str) -> str:
    return f"⟨U+{ord(char):04X}⟩"
