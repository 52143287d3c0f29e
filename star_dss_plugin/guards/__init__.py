"""Hold the guards: models that score how safe each prefix of a response is."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from star_dss_plugin.guards.loading import load_guard

__all__ = ["load_guard"]


def __getattr__(name: str) -> Any:
    if name in __all__:  # import torch only when a guard is loaded
        from star_dss_plugin.guards.loading import load_guard

        return load_guard
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
