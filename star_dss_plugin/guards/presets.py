"""Known guards, as data: what to load, how to ask, which words carry the verdict.

Sources are the models' own cards. `min_label_mass` is low enough for partial sentences and high
enough to catch a wrong template, with which it falls near zero.
"""

from __future__ import annotations

from typing import Any

__all__ = ["PRESETS"]

_GRANITE_YES_NO: dict[str, Any] = {
    "safe_labels": ["No", " No", "no", " no", "NO", " NO"],
    "unsafe_labels": ["Yes", " Yes", "yes", " yes", "YES", " YES"],
}

PRESETS: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3guard-gen-0.6b": (
        "Qwen3Guard-Gen 0.6B, Apache-2.0, ungated (recommended)",
        {
            "model": "Qwen/Qwen3Guard-Gen-0.6B",
            "prefill": "Safety:",
            "safe_labels": [" Safe"],
            "unsafe_labels": [" Unsafe"],
            "controversial_labels": [" Controversial"],
        },
    ),
    "granite-guardian-3.1-2b": (
        "Granite Guardian 3.1 2B, Apache-2.0, ungated (the paper's guard)",
        {
            "model": "ibm-granite/granite-guardian-3.1-2b",
            "template_kwargs": {"guardian_config": {"risk_name": "harm"}},
            # Its template takes the first of three messages for a list of tools.
            "turns": "last",
            **_GRANITE_YES_NO,
        },
    ),
}
"""Name → (one line about it, the options of `VerdictGuard`)."""
