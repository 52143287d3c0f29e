"""Register plugins, and look up by name what they provide."""

from __future__ import annotations

import pkgutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib import metadata
from importlib.metadata import EntryPoint
from typing import TYPE_CHECKING, Any, cast, get_args

import pluggy
from packaging.specifiers import SpecifierSet

from star_dss_plugin import hookspecs
from star_dss_plugin._version import __version__
from star_dss_plugin.errors import PluginError
from star_dss_plugin.hookspecs import GuardInfo, Integration
from star_dss_plugin.plugins.installed import DISABLED_PLUGINS, installed_plugins
from star_dss_plugin.plugins.records import (
    HOOK_KINDS,
    Entry,
    Host,
    Kind,
    Origin,
    PluginInfo,
    check_entry,
    check_integration,
)
from star_dss_plugin.validation import nearest, unknown_name

if TYPE_CHECKING:
    from star_dss_plugin.guards.base import Guard
    from star_dss_plugin.segmenters import Segmenter
    from star_dss_plugin.weights import WeightMap

__all__ = ["BUILTINS", "Plugins"]

BUILTINS = ("star_dss_plugin.builtins",)

_NOTHING_STATED = GuardInfo()


class Plugins:
    """Hold the registered plugins and their entries; a new object is empty."""

    def __init__(self) -> None:
        self._manager = pluggy.PluginManager("star_dss")
        self._manager.add_hookspecs(hookspecs)
        self._entries: dict[Kind, dict[str, Entry]] = {kind: {} for kind in get_args(Kind)}
        self._integrations: dict[str, Integration] = {}
        self._listing: list[PluginInfo] = []

    @classmethod
    def discover(cls, builtins: Sequence[str] = BUILTINS, disabled: Iterable[str] = ()) -> Plugins:
        """Load the built-in plugins, then every entry point of the group `star_dss`.

        Args:
            builtins: Modules of the built-in plugins.
            disabled: Entry points or packages to leave out; each must exist.

        Raises:
            PluginError: A plugin cannot be imported, has an invalid hook or registration, or uses a
                name of another plugin; or a name in `disabled` matches nothing.
        """
        plugins = cls()
        allowed, blocked = installed_plugins(disabled)
        own = {Origin(m, "star-dss-plugin", __version__): EntryPoint(m, m, "") for m in builtins}
        for origin, entry_point in (own | allowed).items():
            try:
                plugin = entry_point.load()
            except Exception as error:
                raise PluginError(f"{origin} cannot be imported. {_describe(error)}") from error
            plugins.register(plugin, origin)
        plugins._listing += [PluginInfo(origin, (), {}, blocked=True) for origin in blocked]
        return plugins

    def register(self, plugin: object, origin: Origin) -> None:
        """Check one plugin, a module or object with functions marked `hookimpl`, and call these.

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
        """Return the class or function that builds the guard `name` from its options."""
        return cast("Callable[..., Guard]", self._resolve("guard", name))

    def guard_info(self, name: str) -> GuardInfo:
        """Return licence, size and cost of the guard `name`; nothing is imported."""
        return self._entry("guard", name).info

    def segmenter(self, name: str) -> Segmenter:
        """Return the segmenter `name`."""
        return cast("Segmenter", self._resolve("segmenter", name))

    def weight_map(self, name: str) -> WeightMap:
        """Return the weight map that `loss_type: name` selects."""
        return cast("WeightMap", self._resolve("loss_type", name))

    def names(self, kind: Kind) -> tuple[str, ...]:
        """Return all names of one kind, the built-in ones first."""
        return tuple(self._entries[kind])

    def entries(self, kind: Kind) -> tuple[Entry, ...]:
        """Return all entries of one kind, in the order of `names`; nothing is imported."""
        return tuple(self._entries[kind].values())

    def hosts(self) -> list[Host]:
        """Return the host frameworks of all integrations; nothing is imported."""
        return [self.host(name) for name in self._integrations]

    def host(self, name: str) -> Host:
        """Return the host framework of the integration `name`; nothing is imported."""
        self._entry("integration", name)
        integration = self._integrations[name]
        try:
            installed = metadata.version(integration.host)
        except metadata.PackageNotFoundError:
            return Host(name, integration, None, supported=False)
        versions = SpecifierSet(integration.versions)
        return Host(name, integration, installed, versions.contains(installed, prereleases=True))

    def claimants(self, raw: Mapping[str, Any]) -> list[str]:
        """Return the names of the integrations that claim a configuration.

        Args:
            raw: A parsed YAML mapping.

        Raises:
            PluginError: The `claims` function of an integration failed.
        """
        found = []
        for name, integration in self._integrations.items():
            try:
                claimed = integration.claims(raw)
            except Exception as error:
                origin = self._entry("integration", name).origin
                raise PluginError(
                    f"The function 'claims' of the integration {name!r} of {origin} failed on a "
                    f"configuration. {_describe(error)}"
                ) from error
            if claimed:
                found.append(name)
        return found

    def host_of_command(self, command: str) -> str | None:
        """Return the name of the integration that runs a command of `star-dss`, if one does."""
        named = (n for n, i in self._integrations.items() if command in i.commands)
        return next(named, None)

    def starters(self) -> dict[str, str]:
        """Return the values of `star-dss init --host`, each with the name of its integration."""
        return {name: host for host, i in self._integrations.items() for name in i.starters}

    def import_target(
        self, name: str, target: str | Callable[..., Any], what: str
    ) -> Callable[..., Any]:
        """Import a target of the integration `name`.

        Args:
            name: Name of the integration.
            target: One of its targets.
            what: Subject of the error message, such as "`star-dss sft`".

        Raises:
            PluginError: The target cannot be imported; the message says how to install the host.
        """
        try:
            return _load(target)
        except Exception as error:
            host = self.host(name)
            why = "cannot be imported" if host.installed else "is not installed"
            said = f"{what} needs {host.integration.host}, which {why} here. {_describe(error)}"
            install = f"pip install '{host.integration.install}'"
            if install not in said:  # the integration's own error may already say it
                said += f" Install it with: {install}"
            raise PluginError(said) from error

    def listing(self) -> list[PluginInfo]:
        """Return all plugins in the order in which they were loaded, then the blocked ones."""
        return list(self._listing)

    def _hooks(self, plugin: object, origin: Origin) -> tuple[str, ...]:
        """Return the hooks that a plugin implements.

        Raises:
            PluginError: It implements none or an unknown one, or a function lacks `@hookimpl`.
        """
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
            near = nearest(min(unknown), HOOK_KINDS, limit=2) or HOOK_KINDS
            wrong = f"implements {min(unknown)}, which is no hook. Meant: {' or '.join(near)}?"
        elif not hooks:
            wrong = "implements no hook. Does its entry point name the right module or object?"
        if wrong:
            raise PluginError(f"{origin} {wrong}")
        return tuple(hook for hook in HOOK_KINDS if hook in hooks)

    def _add(self, kind: Kind, origin: Origin) -> Callable[..., None]:
        """Return the `register` function that is passed to the hook of one kind."""

        def add(name: str, target: Any, summary: str, info: GuardInfo) -> None:
            what = f"{origin} registers {kind} {name!r}"
            check_entry(what, name, target, info)
            if (other := self._entries[kind].get(name)) is not None:
                raise PluginError(
                    f"{what}, but {other.origin} has done so already. Rename one, or leave one "
                    f"plugin out: {DISABLED_PLUGINS}={origin.package}"
                )
            self._entries[kind][name] = Entry(name, target, summary, origin, info)

        def register(name: str, target: Any, *, summary: str = "") -> None:
            add(name, target, summary, _NOTHING_STATED)

        def guard(
            name: str, target: Any, *, summary: str = "", info: GuardInfo = _NOTHING_STATED
        ) -> None:
            add(name, target, summary, info)

        def integration(name: str, integration: Integration) -> None:
            what = f"{origin} registers {kind} {name!r}"
            check_integration(what, integration)
            for command in integration.commands:
                if (other := self.host_of_command(command)) is not None:
                    raise PluginError(
                        f"{what} with the command {command!r}, which {other!r} runs already. "
                        f"Leave one plugin out: {DISABLED_PLUGINS}={origin.package}"
                    )
            if taken := integration.starters.keys() & self.starters().keys():
                raise PluginError(
                    f"{what} with the starter {min(taken)!r}, which another integration has. "
                    f"Leave one plugin out: {DISABLED_PLUGINS}={origin.package}"
                )
            summary = f"{integration.host} {integration.versions}"
            add(name, integration.trainer, summary, _NOTHING_STATED)
            self._integrations[name] = integration

        own: dict[Kind, Callable[..., None]] = {"guard": guard, "integration": integration}
        return own.get(kind, register)

    def _entry(self, kind: Kind, name: str) -> Entry:
        entry = self._entries[kind].get(name)
        if entry is None:
            raise unknown_name(kind, name, self._entries[kind])
        return entry

    def _resolve(self, kind: Kind, name: str) -> object:
        entry = self._entry(kind, name)
        try:
            return _load(entry.target)
        except Exception as error:
            raise PluginError(
                f"The {kind} {name!r} of {entry.origin} is {entry.target!r}; that cannot be "
                f"loaded. {_describe(error)}"
            ) from error


def _load(target: str | Callable[..., Any]) -> Callable[..., Any]:
    """Import a "module:object"; return a callable as it is."""
    found = pkgutil.resolve_name(target) if isinstance(target, str) else target
    if not callable(found):
        raise TypeError(f"an object of type {type(found).__name__} cannot be called")
    return cast("Callable[..., Any]", found)


def _describe(error: Exception) -> str:
    """Describe an error in a sentence, for a failed import with the missing package."""
    text = f"{type(error).__name__}: {str(error).rstrip('.')}."
    if isinstance(error, ImportError) and error.name:
        text += f" Is the package that provides {error.name!r} installed?"
    return text
