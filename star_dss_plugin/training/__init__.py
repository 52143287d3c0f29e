"""The column `star_scores` to the loss of a transformers Trainer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from star_dss_plugin.training.mixin import StarDSSMixin

__all__ = ["StarDSSMixin"]


def __getattr__(name: str) -> Any:
    if name in __all__:  # transformers is imported when the mixin is used
        from star_dss_plugin.training.mixin import StarDSSMixin

        return StarDSSMixin
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
