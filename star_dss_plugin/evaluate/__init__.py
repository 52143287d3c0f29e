"""Evaluation of finetuned models: what they refuse, what they can do, how robustly."""

from __future__ import annotations

__all__: list[str] = []
