"""Plugins and sources of plugins for tests."""

from star_dss_plugin import hookspecs
from star_dss_plugin.hookspecs import hookimpl
from star_dss_plugin.plugins import Origin

MINE = Origin("mine", "my-package", "1.0")
YOURS = Origin("yours", "your-package", "2.0")
HOOKS = {name: f for name, f in vars(hookspecs).items() if hasattr(f, "star_dss_spec")}


class OneGuard:
    """A plugin with one guard called `name`."""

    def __init__(self, name: object, target: object = dict, **options: str) -> None:
        self.name, self.target, self.options = name, target, options

    @hookimpl
    def star_dss_register_guards(self, register):
        register(self.name, self.target, **self.options)


GUARD = """
    from star_dss_plugin.hookspecs import hookimpl

    @hookimpl
    def star_dss_register_guards(register):
        register("{name}", "{module}_heavy:Guard", summary="a guard")
    """


def guard_source(name: str, module: str) -> str:
    return GUARD.format(name=name, module=module)
