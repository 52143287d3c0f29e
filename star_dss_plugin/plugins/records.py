"""Define the records of plugins and registrations, and check registrations."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from packaging.specifiers import InvalidSpecifier, SpecifierSet

from star_dss_plugin.errors import PluginError
from star_dss_plugin.hookspecs import HOST_COMMANDS, GuardInfo, Integration

__all__ = [
    "HOOK_KINDS",
    "Entry",
    "Host",
    "Kind",
    "Origin",
    "PluginInfo",
    "check_entry",
    "check_integration",
]

Kind = Literal["guard", "segmenter", "loss_type", "integration"]
"""Kinds of registrations, named like their options: `loss_type` is a weight map."""

HOOK_KINDS: Mapping[str, Kind] = {
    "star_dss_register_guards": "guard",
    "star_dss_register_segmenters": "segmenter",
    "star_dss_register_weight_maps": "loss_type",
    "star_dss_register_integrations": "integration",
}

_NAME = re.compile(r"[a-z0-9][a-z0-9._-]*")
_TARGET = re.compile(r"\w+(\.\w+)*:\w+(\.\w+)*")


@dataclass(frozen=True)
class Origin:
    """Name the source of a plugin: its entry point (or built-in module) and its distribution."""

    plugin: str
    package: str
    version: str

    def __str__(self) -> str:
        return f"{self.package} {self.version} (plugin {self.plugin!r})"


@dataclass(frozen=True)
class Entry:
    """Hold one registered name.

    Attributes:
        name: Name in the configuration.
        target: The object, or "module:object"; for an integration, its trainer.
        summary: One line for lists.
        origin: The plugin that registered it.
        info: Licence, size and cost of a guard; empty for other kinds.
    """

    name: str
    target: str | Callable[..., Any]
    summary: str
    origin: Origin
    info: GuardInfo


@dataclass(frozen=True)
class Host:
    """Describe one host framework and its installation.

    Attributes:
        name: Name of its integration.
        integration: The registered integration.
        installed: The host's installed version; None if it is not installed.
        supported: Whether that version is one of `integration.versions`.
    """

    name: str
    integration: Integration
    installed: str | None
    supported: bool


@dataclass(frozen=True)
class PluginInfo:
    """Describe one plugin as `star-dss plugins` lists it; a blocked one was not loaded."""

    origin: Origin
    hooks: tuple[str, ...]
    names: Mapping[Kind, tuple[str, ...]]
    blocked: bool


def check_entry(what: str, name: object, target: object, info: object) -> None:
    """Check the name, the target and the info of a registration.

    Args:
        what: Beginning of the error message: the plugin and the registration.
        name: The name to register.
        target: A callable or "module:object".
        info: A `GuardInfo`.

    Raises:
        PluginError: One of them is invalid.
    """
    if not (isinstance(name, str) and _NAME.fullmatch(name)):
        raise PluginError(f"{what}. A name has to match {_NAME.pattern}.")
    if not _is_target(target):
        raise PluginError(f"{what} as {target!r}. Give a callable or 'module:object'.")
    if not isinstance(info, GuardInfo):
        raise PluginError(f"{what} with info={info!r}. Give a GuardInfo, or leave it out.")


def check_integration(what: str, given: object) -> None:
    """Check every part of an integration as far as that is possible without importing it.

    Args:
        what: Beginning of the error message: the plugin and the registration.
        given: The registered object.

    Raises:
        PluginError: The object is no `Integration`, or a part of it is invalid.
    """
    if not isinstance(given, Integration):
        raise PluginError(f"{what} as {given!r}. Give a star_dss_plugin.hookspecs.Integration.")
    for part in ("host", "install", "configuration"):
        text = getattr(given, part)
        if not (isinstance(text, str) and text.strip()):
            raise PluginError(f"{what} with {part}={text!r}. Give a text.")
    try:
        SpecifierSet(given.versions)
    except (InvalidSpecifier, TypeError, AttributeError) as error:
        raise PluginError(
            f"{what} with versions={given.versions!r} (InvalidSpecifier: {error}). Give a PEP 440 "
            "specifier such as '>=1.9,<2'."
        ) from error
    if not callable(given.claims):
        raise PluginError(f"{what} with claims={given.claims!r}. Give a function of a mapping.")
    targets = {"trainer": given.trainer, "options": given.options, "check": given.check}
    starters = {f"starters[{name!r}]": one.write for name, one in given.starters.items()}
    for part, target in {**targets, **given.commands, **starters}.items():
        if not _is_target(target):
            raise PluginError(f"{what} with {part}={target!r}. Give a callable or 'module:object'.")
    if unknown := set(given.commands) - set(HOST_COMMANDS):
        raise PluginError(
            f"{what} with the command {min(unknown)!r}. An integration can run "
            f"{' and '.join(HOST_COMMANDS)}."
        )


def _is_target(target: object) -> bool:
    return bool(_TARGET.fullmatch(target)) if isinstance(target, str) else callable(target)
