"""Show scored data: the HTML report, figures, and single rows in a terminal or a notebook.

The modules only read a scored data set. Its text is untrusted: `../visible.py` makes it safe to
display, and `page.py` describes how the HTML file isolates it. Names are imported on first use, so
that the command line starts quickly.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from star_dss_plugin.report.inspection import Inspection, inspect_row

__all__ = ["Inspection", "inspect_row"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        return getattr(importlib.import_module("star_dss_plugin.report.inspection"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
