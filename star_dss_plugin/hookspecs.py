"""The extension points. Four hooks; the built-ins use them like everybody else.

A plugin is a package with an entry point in the group `star_dss` that names a module (or object)
with any of these functions, each marked with `hookimpl`::

    from star_dss_plugin import hookimpl

    @hookimpl
    def star_dss_register_guards(register):
        register("word-list", "my_package.guard:WordListGuard", summary="P(safe) by a word list")
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import pluggy

__all__ = [
    "ENTRY_POINT_GROUP",
    "Register",
    "RegisterIntegration",
    "hookimpl",
    "hookspec",
    "star_dss_register_guards",
    "star_dss_register_integrations",
    "star_dss_register_segmenters",
    "star_dss_register_weight_maps",
]

ENTRY_POINT_GROUP = "star_dss"

hookspec = pluggy.HookspecMarker("star_dss")
hookimpl = pluggy.HookimplMarker("star_dss")


class Register(Protocol):
    """Registers one named thing."""

    def __call__(
        self, name: str, target: str | Callable[..., object], *, summary: str = ""
    ) -> None:
        """
        Args:
            name: What the configuration calls it; lower case, unique over all plugins.
            target: The object itself, or "module:object" to import it only when it is used.
            summary: One line for `star-dss plugins`.
        """


class RegisterIntegration(Protocol):
    """Registers one host framework."""

    def __call__(
        self, name: str, target: str | Callable[..., object], *, host: str, versions: str
    ) -> None:
        """
        Args:
            name: The integration's name ("trl").
            target: The trainer or plugin class, or "module:object".
            host: The host's distribution name on PyPI.
            versions: The supported versions of the host, as a PEP 440 specifier (">=1.9,<2").
        """


@hookspec
def star_dss_register_guards(register: Register) -> None:
    """Registers guards: `target(**options)` returns a `star_dss_plugin.guards.base.Guard`.

    `options` are the remaining keys of the user's `guard:` mapping, plus `device` and `dtype`
    and `batch_tokens`; `engine` and `engine_options` too where the user has set them.
    """


@hookspec
def star_dss_register_segmenters(register: Register) -> None:
    """Registers segmenters: `target(text, token_char_ends, chunk_size)` returns chunk ends.

    See `star_dss_plugin.segmenters.Segmenter`.
    """


@hookspec
def star_dss_register_weight_maps(register: Register) -> None:
    """Registers weight maps, the values of `loss_type`: scores to (CE weight, KL weight).

    See `star_dss_plugin.weights.WeightMap`.
    """


@hookspec
def star_dss_register_integrations(register: RegisterIntegration) -> None:
    """Registers host frameworks, for `star-dss plugins` and version checks."""
