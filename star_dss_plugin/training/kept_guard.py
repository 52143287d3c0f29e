"""A guard that stays in memory while a model is trained."""

from __future__ import annotations

from star_dss_plugin.guards.base import Guard
from star_dss_plugin.options import StarDSSOptions
from star_dss_plugin.scoring.scorer import guard_of

__all__ = ["KeptGuard"]


class KeptGuard:
    """Load a guard when it is first needed, and keep it for the buffers that follow.

    Args:
        options: Which guard, computed by what.
    """

    def __init__(self, options: StarDSSOptions) -> None:
        self._options = options
        self._guard: Guard | None = None

    @property
    def loaded(self) -> bool:
        """Whether it was needed."""
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
        """Free the guard's memory; it is loaded again if it is needed again."""
        if self._guard is not None:
            self._guard.close()
