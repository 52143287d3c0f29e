"""Find and check plugins, and look up what they register by its name in the configuration.

The built-in guards, segmenters, weight maps and integrations are registered through the same hooks
as those of other packages (`hookspecs.py`). An invalid plugin stops the run here: pluggy alone
would skip a second plugin of the same name and would never call a hook whose name is misspelt.

Importing this package loads no plugin. `load_plugins` imports the modules of the entry points, once
per process. A target that is registered as "module:object" is imported when it is looked up.
"""

from __future__ import annotations

import os
from functools import cache

from star_dss_plugin.plugins.installed import DISABLED_PLUGINS
from star_dss_plugin.plugins.records import HOOK_KINDS, Entry, Host, Kind, Origin, PluginInfo
from star_dss_plugin.plugins.registry import BUILTINS, Plugins

__all__ = [
    "BUILTINS",
    "DISABLED_PLUGINS",
    "HOOK_KINDS",
    "Entry",
    "Host",
    "Kind",
    "Origin",
    "PluginInfo",
    "Plugins",
    "load_plugins",
]


@cache
def load_plugins() -> Plugins:
    """Load the plugins of this process on the first call, and return them.

    Raises:
        PluginError: See `Plugins.discover`.
    """
    return Plugins.discover(BUILTINS, os.environ.get(DISABLED_PLUGINS, "").split(","))
