"""Keep a guard in memory while a model is trained on streams."""

from __future__ import annotations

from star_dss_plugin.guards.base import Guard
from star_dss_plugin.options import StarDSSOptions
from star_dss_plugin.scoring.scorer import guard_of

__all__ = ["KeptGuard"]


class KeptGuard:
    """Load a guard on first use and keep it for later buffers.

    Args:
        options: The run's options, which name the guard and its engine.
    """

    def __init__(self, options: StarDSSOptions) -> None:
        self._options = options
        self._guard: Guard | None = None

    @property
    def loaded(self) -> bool:
        """Whether the guard has been loaded."""
        return self._guard is not None

    def get(self) -> Guard:
        """Return the guard.

        Raises:
            StarDSSError: No guard is named, or it cannot be loaded.
        """
        if self._guard is None:
            self._guard = guard_of(self._options)
        return self._guard

    def close(self) -> None:
        """Free the guard's memory; the guard loads itself again on its next use."""
        if self._guard is not None:
            self._guard.close()
