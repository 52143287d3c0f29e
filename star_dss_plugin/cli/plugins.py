"""List plugins and host frameworks: `star-dss plugins`."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from star_dss_plugin.plugins import HOOK_KINDS, Host, load_plugins

__all__ = ["plugins"]


def plugins() -> None:
    """List plugins: package, version, hooks and names, and the host frameworks found."""
    loaded = load_plugins()
    console = Console()
    hooks = {kind: hook for hook, kind in HOOK_KINDS.items()}
    table = Table("package", "version", "plugin", "hook", "names")
    for plugin in loaded.listing():
        origin = plugin.origin
        if plugin.blocked:
            table.add_row(origin.package, origin.version, origin.plugin, "blocked", "")
        for kind, names in plugin.names.items():
            row = (origin.package, origin.version, origin.plugin, hooks[kind])
            table.add_row(*row, ", ".join(names))
    for column in table.columns:
        column.overflow = "fold"  # a cut name could not be typed
    console.print(table)
    hosts = loaded.hosts()
    found = Table("integration", "host", "supported", "installed", "")
    for host in hosts:
        versions, installed = host.integration.versions, host.installed or "-"
        found.add_row(host.name, host.integration.host, versions, installed, _verdict(host))
    console.print(found)
    for host in hosts:
        console.print(_details(host), markup=False, soft_wrap=True)


def _verdict(host: Host) -> str:
    if host.installed is None:
        return "not found"
    return "ok" if host.supported else "not supported"


def _details(host: Host) -> str:
    """Say what an integration brings, and how to install its host where it is missing."""
    brings = host.integration
    line = f"{host.name}: {_shown(brings.trainer)}, options of {_shown(brings.options)}"
    if host.installed is None:
        line += f"; install it with: pip install '{brings.install}'"
    return line


def _shown(target: object) -> str:
    if isinstance(target, str):
        return target
    return f"{getattr(target, '__module__', '?')}:{getattr(target, '__qualname__', target)}"
