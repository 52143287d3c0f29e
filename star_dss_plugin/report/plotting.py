"""Share the style of all figures: colour-blind-safe lines, and labels without formulas."""

from __future__ import annotations

from typing import Any

from star_dss_plugin.validation import require
from star_dss_plugin.visible import visible

__all__ = ["COLOURS", "GUIDE", "QUIET", "escape_mathtext", "line_style", "require_matplotlib"]

# Okabe and Ito's colours, distinct with every kind of colour vision. Line styles differ as well.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#1c1d1f", "#8a8d91")
_DASHES = ("-", "--", "-.", ":")
QUIET = "#5a5e64"
"""Colour of axes and annotations."""
GUIDE: dict[str, Any] = {"color": QUIET, "linewidth": 0.8, "linestyle": (0, (4, 3))}
"""Style of a reference line, such as a threshold or a model."""


def require_matplotlib(alternative: str) -> None:
    """Raise a ConfigError if matplotlib is missing.

    Args:
        alternative: What works without figures; the error message ends with it.

    Raises:
        ConfigError: matplotlib is missing.
    """
    require("matplotlib", "report", "A figure", alternative=alternative)


def line_style(k: int) -> dict[str, Any]:
    """Return the colour and dashes of a figure's k-th line."""
    return {"color": COLOURS[k % len(COLOURS)], "linestyle": _DASHES[k % len(_DASHES)]}


def escape_mathtext(text: str) -> str:
    """Make untrusted text visible, with dollar signs escaped so that they start no formula."""
    return visible(text).replace("$", r"\$")
