"""Finding plugins, checking them, and looking things up by the name the configuration uses.

The built-in guards, segmenters, weight maps and integrations arrive through the same hooks as those
of other packages (`hookspecs.py`). A plugin that cannot do what it says stops the run here: pluggy
alone would skip a second plugin of the same name and would never call a hook with a misspelt one.

Importing this module loads nothing. `load_plugins` imports the modules of the entry points, once
per process; what they register as "module:object" is imported when it is looked up.
"""

from __future__ import annotations

import difflib
import os
import pkgutil
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from importlib.metadata import EntryPoint
from typing import TYPE_CHECKING, Any, Literal, cast, get_args

import pluggy
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

from star_dss_plugin import hookspecs
from star_dss_plugin._version import __version__
from star_dss_plugin.errors import PluginError
from star_dss_plugin.hookspecs import ENTRY_POINT_GROUP, Register, RegisterIntegration
from star_dss_plugin.validation import unknown_name

if TYPE_CHECKING:
    from star_dss_plugin.guards.base import Guard
    from star_dss_plugin.segmenters import Segmenter
    from star_dss_plugin.weights import WeightMap

__all__ = [
    "BUILTINS",
    "DISABLED_PLUGINS",
    "HOOK_KINDS",
    "Entry",
    "Integration",
    "Kind",
    "Origin",
    "PluginInfo",
    "Plugins",
    "load_plugins",
]

BUILTINS = ("star_dss_plugin.builtins",)

DISABLED_PLUGINS = "STAR_DSS_DISABLED_PLUGINS"
"""Environment variable: comma-separated entry points or packages that are not to be loaded."""

Kind = Literal["guard", "segmenter", "loss_type", "integration"]
"""What can be registered, in the words of the configuration: `loss_type` names a weight map."""

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
    """Where a plugin comes from: its entry point (or built-in module), its distribution."""

    plugin: str
    package: str
    version: str

    def __str__(self) -> str:
        return f"{self.package} {self.version} (plugin {self.plugin!r})"


@dataclass(frozen=True)
class Entry:
    """One registered name; `target` is the object, or "module:object"."""

    name: str
    target: str | Callable[..., Any]
    summary: str
    origin: Origin


@dataclass(frozen=True)
class Integration:
    """One host framework: its distribution, the supported versions, the installed one if any."""

    name: str
    host: str
    versions: str
    installed: str | None
    supported: bool


@dataclass(frozen=True)
class PluginInfo:
    """One plugin as `star-dss plugins` lists it; a blocked one was not loaded."""

    origin: Origin
    hooks: tuple[str, ...]
    names: Mapping[Kind, tuple[str, ...]]
    blocked: bool


class Plugins:
    """The registered plugins and what they offer; empty until `register` or `discover`."""

    def __init__(self) -> None:
        self._manager = pluggy.PluginManager("star_dss")
        self._manager.add_hookspecs(hookspecs)
        self._entries: dict[Kind, dict[str, Entry]] = {kind: {} for kind in get_args(Kind)}
        self._hosts: dict[str, tuple[str, SpecifierSet]] = {}
        self._listing: list[PluginInfo] = []

    @classmethod
    def discover(cls, builtins: Sequence[str] = BUILTINS, disabled: Iterable[str] = ()) -> Plugins:
        """Loads the built-in plugins, then every entry point of the group `star_dss`.

        Args:
            builtins: Modules of the built-in plugins.
            disabled: Entry points or packages to leave out; each must exist.

        Raises:
            PluginError: A plugin cannot be imported, implements or registers something that cannot
                be used, or clashes with another; or a name in `disabled` matches nothing.
        """
        plugins = cls()
        allowed, blocked = _entry_points(disabled)
        ours = {Origin(m, "star-dss-plugin", __version__): EntryPoint(m, m, "") for m in builtins}
        for origin, entry_point in (ours | allowed).items():
            try:
                plugin = entry_point.load()
            except Exception as error:
                raise PluginError(f"{origin} cannot be imported. {_describe(error)}") from error
            plugins.register(plugin, origin)
        plugins._listing += [PluginInfo(origin, (), {}, blocked=True) for origin in blocked]
        return plugins

    def register(self, plugin: object, origin: Origin) -> None:
        """Checks one plugin, a module or object with functions marked `hookimpl`, and calls them.

        Raises:
            PluginError: See `discover`.
        """
        hooks = self._hooks(plugin, origin)
        try:
            self._manager.register(plugin, name=f"{origin.package}:{origin.plugin}")
        except (pluggy.PluginValidationError, ValueError) as error:
            raise PluginError(f"{origin} cannot be registered: {error}") from error
        others = self._manager.get_plugins() - {plugin}
        names: dict[Kind, tuple[str, ...]] = {}
        for hook in hooks:
            kind = HOOK_KINDS[hook]
            before = len(self._entries[kind])
            try:
                self._manager.subset_hook_caller(hook, others)(register=self._add(kind, origin))
            except PluginError:
                raise
            except Exception as error:
                raise PluginError(f"{hook} of {origin} failed. {_describe(error)}") from error
            names[kind] = self.names(kind)[before:]
        self._listing.append(PluginInfo(origin, hooks, names, blocked=False))

    def guard(self, name: str) -> Callable[..., Guard]:
        """What builds the guard `name` from its options."""
        return cast("Callable[..., Guard]", self._resolve("guard", name))

    def segmenter(self, name: str) -> Segmenter:
        """The segmenter `name`."""
        return cast("Segmenter", self._resolve("segmenter", name))

    def weight_map(self, name: str) -> WeightMap:
        """The weight map that `loss_type: name` asks for."""
        return cast("WeightMap", self._resolve("loss_type", name))

    def names(self, kind: Kind) -> tuple[str, ...]:
        """All names of one kind, the built-in ones first."""
        return tuple(self._entries[kind])

    def entries(self, kind: Kind) -> tuple[Entry, ...]:
        """What is registered under the `names` of one kind; nothing is imported."""
        return tuple(self._entries[kind].values())

    def integrations(self) -> list[Integration]:
        """The host frameworks, looked up among the packages that are installed now."""
        found = []
        for name, (host, versions) in self._hosts.items():
            try:
                installed = metadata.version(host)
            except metadata.PackageNotFoundError:
                installed = None
            supported = installed is not None and versions.contains(installed, prereleases=True)
            found.append(Integration(name, host, str(versions), installed, supported))
        return found

    def listing(self) -> list[PluginInfo]:
        """All plugins in the order in which they were loaded, then the blocked ones."""
        return list(self._listing)

    def _hooks(self, plugin: object, origin: Origin) -> tuple[str, ...]:
        """The hooks that a plugin implements; a function that only looks like one is an error."""
        hooks, unmarked = set(), set()
        for attribute in dir(plugin):
            options = self._manager.parse_hookimpl_opts(plugin, attribute)
            if options is not None:
                hooks.add(options["specname"] or attribute)
            elif attribute.startswith("star_dss_register_"):
                unmarked.add(attribute)
        wrong = ""
        if unmarked:
            wrong = f"defines {min(unmarked)} without marking it. Put @hookimpl above it."
        elif unknown := hooks - HOOK_KINDS.keys():
            near = difflib.get_close_matches(min(unknown), HOOK_KINDS, n=2) or HOOK_KINDS
            wrong = f"implements {min(unknown)}, which is no hook. Meant: {' or '.join(near)}?"
        elif not hooks:
            wrong = "implements no hook. Does its entry point name the right module or object?"
        if wrong:
            raise PluginError(f"{origin} {wrong}")
        return tuple(hook for hook in HOOK_KINDS if hook in hooks)

    def _add(self, kind: Kind, origin: Origin) -> Register | RegisterIntegration:
        """The `register` function that the hook for one kind receives."""

        def register(name: str, target: str | Callable[..., Any], *, summary: str = "") -> None:
            what = f"{origin} registers {kind} {name!r}"
            if not (isinstance(name, str) and _NAME.fullmatch(name)):
                raise PluginError(f"{what}. A name has to match {_NAME.pattern}.")
            if not (_TARGET.fullmatch(target) if isinstance(target, str) else callable(target)):
                raise PluginError(f"{what} as {target!r}. Give a callable or 'module:object'.")
            if (other := self._entries[kind].get(name)) is not None:
                raise PluginError(
                    f"{what}, but {other.origin} has done so already. Rename one, or leave one "
                    f"plugin out: {DISABLED_PLUGINS}={origin.package}"
                )
            self._entries[kind][name] = Entry(name, target, summary, origin)

        def register_integration(
            name: str, target: str | Callable[..., Any], *, host: str, versions: str
        ) -> None:
            register(name, target, summary=f"{host} {versions}")
            self._hosts[name] = (host, SpecifierSet(versions))

        return register_integration if kind == "integration" else register

    def _resolve(self, kind: Kind, name: str) -> object:
        entry = self._entries[kind].get(name)
        if entry is None:
            raise unknown_name(kind, name, self._entries[kind])
        if not isinstance(entry.target, str):
            return entry.target
        what = f"The {kind} {name!r} of {entry.origin} is {entry.target!r}"
        try:
            found = pkgutil.resolve_name(entry.target)
        except Exception as error:
            raise PluginError(f"{what}; that cannot be loaded. {_describe(error)}") from error
        if not callable(found):
            raise PluginError(f"{what}; an object of type {type(found).__name__} cannot be called.")
        return found


@cache
def load_plugins() -> Plugins:
    """All plugins of this process, loaded on the first call; raises what `discover` raises."""
    return Plugins.discover(BUILTINS, os.environ.get(DISABLED_PLUGINS, "").split(","))


def _entry_points(disabled: Iterable[str]) -> tuple[dict[Origin, EntryPoint], list[Origin]]:
    """The installed plugins: those to load, and the origins of those that `disabled` names."""
    found: dict[Origin, EntryPoint] = {}
    for entry_point in metadata.entry_points(group=ENTRY_POINT_GROUP):
        dist = entry_point.dist
        assert dist is not None  # metadata.entry_points always sets it
        found[Origin(entry_point.name, dist.name, dist.version)] = entry_point
    origins = sorted(found, key=lambda origin: (origin.package, origin.plugin))
    blocked: set[Origin] = set()
    for word in {word.strip() for word in disabled} - {""}:
        package = canonicalize_name(word)
        hits = {o for o in origins if o.plugin == word or canonicalize_name(o.package) == package}
        if not hits:
            raise PluginError(
                f"{DISABLED_PLUGINS} names {word!r}, which is neither plugin nor package. "
                f"Installed: {'; '.join(map(str, origins)) or 'none'}."
            )
        blocked |= hits
    first: dict[str, Origin] = {}
    for origin in origins:
        if origin not in blocked and (other := first.setdefault(origin.plugin, origin)) != origin:
            raise PluginError(
                f"{other} and {origin} have the same plugin name. Uninstall one of the packages, "
                f"or leave it out: {DISABLED_PLUGINS}={origin.package}"
            )
    return {o: found[o] for o in first.values()}, [o for o in origins if o in blocked]


def _describe(error: Exception) -> str:
    """The cause in a sentence; of a failed import also what could not be imported."""
    text = f"{type(error).__name__}: {str(error).rstrip('.')}."
    if isinstance(error, ImportError) and error.name:
        text += f" Is the package that provides {error.name!r} installed?"
    return text
