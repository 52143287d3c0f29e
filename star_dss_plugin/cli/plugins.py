"""List plugins and host frameworks: `star-dss plugins`."""

from __future__ import annotations

import json

import typer

from star_dss_plugin.cli import options as option
from star_dss_plugin.plugins import HOOK_KINDS, Host, load_plugins
from star_dss_plugin.tables import Sheet, terminal

__all__ = ["plugins"]

_HOOKS = {kind: hook for hook, kind in HOOK_KINDS.items()}


def plugins(as_json: option.Json = False) -> None:
    """List plugins: package, version, hooks and names, and the host frameworks found."""
    loaded = load_plugins()
    listing, hosts = loaded.listing(), loaded.hosts()
    if as_json:
        found = {
            "plugins": [
                {
                    "package": plugin.origin.package,
                    "version": plugin.origin.version,
                    "plugin": plugin.origin.plugin,
                    "blocked": plugin.blocked,
                    "names": {_HOOKS[kind]: list(names) for kind, names in plugin.names.items()},
                }
                for plugin in listing
            ],
            "integrations": [
                {
                    "name": host.name,
                    "host": host.integration.host,
                    "versions": host.integration.versions,
                    "installed": host.installed,
                    "supported": host.supported,
                    "trainer": _shown(host.integration.trainer),
                    "options": _shown(host.integration.options),
                    "install": host.integration.install,
                }
                for host in hosts
            ],
        }
        typer.echo(json.dumps(found, indent=2))
        return
    console = terminal()
    for plugin in listing:
        origin = plugin.origin
        rows = [(_HOOKS[kind], ", ".join(names)) for kind, names in plugin.names.items()]
        console.print(
            Sheet(
                ("hook", "names"),
                [("blocked", "")] if plugin.blocked else rows,
                title=f"{origin.package} {origin.version}: {origin.plugin}",
            )
        )
        console.print()
    console.print(
        Sheet(
            ("integration", "host", "supported", "installed", ""),
            [
                (
                    host.name,
                    host.integration.host,
                    host.integration.versions,
                    host.installed or "-",
                    _verdict(host),
                )
                for host in hosts
            ],
        )
    )
    console.print()
    for host in hosts:
        console.print(_details(host))


def _verdict(host: Host) -> str:
    if host.installed is None:
        return "not found"
    return "ok" if host.supported else "not supported"


def _details(host: Host) -> str:
    """Describe an integration's trainer and options, and how to install a missing host."""
    brings = host.integration
    line = f"{host.name}: {_shown(brings.trainer)}, options of {_shown(brings.options)}"
    if host.installed is None:
        line += f"; install it with:\n  pip install '{brings.install}'"
    return line


def _shown(target: object) -> str:
    if isinstance(target, str):
        return target
    return f"{getattr(target, '__module__', '?')}:{getattr(target, '__qualname__', target)}"
