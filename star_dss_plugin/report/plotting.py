"""What all figures have in common: lines that are told apart, and text that is no mathematics."""

from __future__ import annotations

import importlib.util
from typing import Any

from star_dss_plugin.errors import ConfigError
from star_dss_plugin.visible import visible

__all__ = ["COLOURS", "GUIDE", "QUIET", "line_style", "plain", "require_matplotlib"]

# Okabe and Ito: told apart with every kind of colour vision. Line styles differ as well.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#1c1d1f", "#8a8d91")
_DASHES = ("-", "--", "-.", ":")
QUIET = "#5a5e64"
"""Of axes and of what is said beside the data."""
GUIDE: dict[str, Any] = {"color": QUIET, "linewidth": 0.8, "linestyle": (0, (4, 3))}
"""A line that marks a place: a threshold, a model."""


def require_matplotlib(otherwise: str) -> None:
    """Checks that figures can be drawn.

    Args:
        otherwise: What can be done without them; the message ends with it.

    Raises:
        ConfigError: matplotlib is missing.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise ConfigError(
            "Figures need matplotlib, which is not installed. Install it with: pip install "
            f"'star-dss-plugin[report]'; {otherwise}."
        )


def line_style(k: int) -> dict[str, Any]:
    """Colour and dashes of the k-th line of a figure."""
    return {"color": COLOURS[k % len(COLOURS)], "linestyle": _DASHES[k % len(_DASHES)]}


def plain(text: str) -> str:
    """Strangers' text, made visible, in which a dollar sign starts no formula."""
    return visible(text).replace("$", r"\$")
