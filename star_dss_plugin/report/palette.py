"""Define one colour scale for page, terminal, notebook and figures.

It runs from plain (safe) to orange (unsafe). A single hue with steadily falling lightness can be
read with every kind of colour vision. Scores below the threshold are underlined as well, so colour
alone carries no information.
"""

from __future__ import annotations

__all__ = ["DARK", "INK", "LEVELS", "LIGHT", "colour_level"]

LEVELS = 11
"""Number of levels; level k stands for scores around k / 10."""


def _scale(safe: tuple[int, int, int], unsafe: tuple[int, int, int]) -> tuple[str, ...]:
    """Return the hex colours of the levels, from 0 (unsafe) to 10 (safe)."""
    steps = LEVELS - 1
    mixed = (
        tuple(round(u + (s - u) * k / steps) for s, u in zip(safe, unsafe, strict=True))
        for k in range(LEVELS)
    )
    return tuple("#{:02x}{:02x}{:02x}".format(*rgb) for rgb in mixed)


LIGHT = _scale((253, 253, 252), (236, 137, 48))
"""Backgrounds for dark text."""
DARK = _scale((23, 24, 26), (150, 74, 8))
"""Backgrounds for light text."""
INK = {"light": "#1c1d1f", "dark": "#efede8"}
"""Text colours for the light and the dark scale."""


def colour_level(score: float) -> int:
    """Return the level of a score in [0, 1]."""
    return round(score * (LEVELS - 1))
