"""List the plugins of the installed packages, without those that the user disables."""

from __future__ import annotations

from collections.abc import Iterable
from importlib import metadata
from importlib.metadata import EntryPoint

from packaging.utils import canonicalize_name

from star_dss_plugin.errors import PluginError
from star_dss_plugin.hookspecs import ENTRY_POINT_GROUP
from star_dss_plugin.plugins.records import Origin

__all__ = ["DISABLED_PLUGINS", "installed_plugins"]

DISABLED_PLUGINS = "STAR_DSS_DISABLED_PLUGINS"
"""Environment variable with the entry points or packages not to load, separated by commas."""


def installed_plugins(
    disabled: Iterable[str],
) -> tuple[dict[Origin, EntryPoint], list[Origin]]:
    """Return the entry points to load, and the origins of those that `disabled` names.

    Args:
        disabled: Names of entry points or of packages; empty names are skipped.

    Raises:
        PluginError: A name in `disabled` matches nothing, or two packages use one plugin name.
    """
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
