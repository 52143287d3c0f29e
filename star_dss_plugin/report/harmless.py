"""Text of strangers, made safe to look at: what would be invisible or act on the screen is named.

Applied once, in Python, before text goes anywhere. So a report file, a terminal and a notebook
never receive an escape sequence, a bidirectional override, a NUL or half a surrogate pair.
"""

from __future__ import annotations

import re
import unicodedata

__all__ = ["visible"]

_KEPT = "\n\t"
_CONTROL_PICTURES = 0x2400  # ␀ ␁ … stand for U+0000, U+0001, …
_DELETE = 0x7F
# Variation selectors that ordinary text does not use; bytes can be hidden in runs of them.
_SELECTORS = range(0xE0100, 0xE01F0)
_HIDDEN = ("Cc", "Cf", "Cs", "Zl", "Zp")
_PLAIN = re.compile(r"[\n\t\x20-\x7e]*")


def visible(text: str) -> str:
    """Replaces control, format and bidirectional characters by visible names.

    Args:
        text: Any string, lone surrogates included.

    Returns:
        The text with "␀" to "␟" and "␡" for ASCII controls (line feed and tab stay) and "⟨U+202E⟩"
        for the others. It can be encoded as UTF-8 and never changes the direction of other text.
    """
    if _PLAIN.fullmatch(text):
        return text
    return "".join(map(_shown, text))


def _shown(char: str) -> str:
    code = ord(char)
    if char in _KEPT or not (unicodedata.category(char) in _HIDDEN or code in _SELECTORS):
        return char
    if code < 0x20:
        return chr(_CONTROL_PICTURES + code)
    return "␡" if code == _DELETE else f"⟨U+{code:04X}⟩"
