"""The four hooks, and the errors of plugins that implement them wrongly."""

import inspect
import typing

import pytest
from support.plugins import HOOKS, MINE, YOURS, OneGuard

from star_dss_plugin.errors import PluginError
from star_dss_plugin.hookspecs import Integration, hookimpl
from star_dss_plugin.plugins import HOOK_KINDS, Kind, Plugins

# The hooks


def integration(**changes) -> Integration:
    """Return an integration whose parts cannot be imported."""
    parts = {
        "host": "host",
        "versions": ">=1",
        "install": "host-plugin",
        "trainer": "somewhere:Trainer",
        "options": "somewhere:Options",
        "configuration": "a YAML with host",
        "claims": lambda raw: "host" in raw,
        "check": "somewhere:check",
    }
    return Integration(**{**parts, **changes})


def test_hook_star_dss_register_guards():
    plugins = Plugins()
    plugins.register(OneGuard("a-guard", dict, summary="one line"), MINE)
    assert plugins.names("guard") == ("a-guard",)
    assert plugins.guard("a-guard")(words=["x"]) == {"words": ["x"]}
    (entry,) = plugins.entries("guard")
    assert (entry.name, entry.target, entry.summary) == ("a-guard", dict, "one line")
    assert entry.origin == MINE


def test_hook_star_dss_register_segmenters():
    def every(text, token_char_ends, chunk_size):
        return [chunk_size]

    class Plugin:
        @staticmethod
        @hookimpl
        def star_dss_register_segmenters(register):
            register("every", every)

    plugins = Plugins()
    plugins.register(Plugin, MINE)
    assert plugins.segmenter("every") is every


def test_hook_star_dss_register_weight_maps():
    class Plugin:
        @hookimpl
        def star_dss_register_weight_maps(self, register):
            register("half", "fractions:Fraction")
            register("whole", "builtins:int.from_bytes")

    plugins = Plugins()
    plugins.register(Plugin(), MINE)
    assert plugins.names("loss_type") == ("half", "whole")
    assert plugins.weight_map("half").__name__ == "Fraction"
    assert plugins.weight_map("whole") == int.from_bytes


def test_hook_star_dss_register_integrations(install):
    install("host-nightly", {}, version="2.0.0.dev3")
    install("host-old", {}, version="0.9")

    class Plugin:
        @hookimpl
        def star_dss_register_integrations(self, register):
            for host, versions in [
                ("pytest", ">=1"),
                ("host-nightly", ">=1.9,<3"),
                ("host-old", ">=1"),
                ("host-missing", ">=1"),
            ]:
                register(host, integration(host=host, versions=versions))

    plugins = Plugins()
    plugins.register(Plugin(), MINE)
    found = {
        h.name: (h.integration.host, h.integration.versions, h.installed, h.supported)
        for h in plugins.hosts()
    }
    assert found == {
        "pytest": ("pytest", ">=1", pytest.__version__, True),
        "host-nightly": ("host-nightly", ">=1.9,<3", "2.0.0.dev3", True),
        "host-old": ("host-old", ">=1", "0.9", False),
        "host-missing": ("host-missing", ">=1", None, False),
    }
    assert plugins.entries("integration")[0].target == "somewhere:Trainer"


def test_every_hook_has_a_kind_and_a_test():
    assert list(HOOKS) == list(HOOK_KINDS)
    assert set(HOOK_KINDS.values()) == set(typing.get_args(Kind))
    assert [name for name in HOOKS if f"test_hook_{name}" not in globals()] == []


@pytest.mark.parametrize("hook", HOOKS.values(), ids=list(HOOKS))
def test_every_hook_is_typed_and_described(hook):
    hints = typing.get_type_hints(hook)
    assert set(hints) == {*inspect.signature(hook).parameters, "return"}
    assert hints["register"].__name__.startswith("Register")
    assert inspect.getdoc(hook)


def test_one_kind_may_use_the_names_of_another():
    class Plugin:
        @hookimpl
        def star_dss_register_guards(self, register):
            register("same", dict)

        @hookimpl
        def star_dss_register_segmenters(self, register):
            register("same", list)

    plugins = Plugins()
    plugins.register(Plugin(), MINE)
    assert (plugins.guard("same"), plugins.segmenter("same")) == (dict, list)


# Errors, which name the package


def test_a_misspelt_hook_is_an_error_with_the_nearest_hook():
    class Plugin:
        @hookimpl
        def star_dss_register_guard(self, register):
            raise AssertionError

    with pytest.raises(
        PluginError, match=r"my-package 1\.0 .*implements star_dss_register_guard,"
    ) as e:
        Plugins().register(Plugin(), MINE)
    assert "star_dss_register_guards" in str(e.value)


@pytest.mark.parametrize("options", [{"optionalhook": True}, {"specname": "star_dss_configure"}])
def test_a_misspelt_hook_cannot_hide(options):
    class Plugin:
        @hookimpl(**options)
        def star_dss_configure(self, register):
            raise AssertionError

    with pytest.raises(
        PluginError, match=r"star_dss_configure, which is no hook.*star_dss_register_"
    ):
        Plugins().register(Plugin(), MINE)


def test_a_hook_may_have_another_name_in_the_plugin():
    class Plugin:
        @hookimpl(specname="star_dss_register_guards")
        def guards(self, register):
            register("a", dict)

    plugins = Plugins()
    plugins.register(Plugin(), MINE)
    assert plugins.names("guard") == ("a",)
    assert plugins.listing()[0].hooks == ("star_dss_register_guards",)


def test_a_hook_without_its_mark_is_an_error():
    class Plugin(OneGuard):
        def star_dss_register_segmenters(self, register):
            register("never", dict)

    with pytest.raises(
        PluginError, match=r"my-package .*star_dss_register_segmenters without .*@hookimpl"
    ):
        Plugins().register(Plugin("a"), MINE)


def test_a_plugin_without_hooks_is_an_error():
    with pytest.raises(PluginError, match=r"my-package .*implements no hook"):
        Plugins().register(object(), MINE)


def test_a_hook_with_other_parameters_is_an_error():
    class Plugin:
        @hookimpl
        def star_dss_register_guards(self, registry):
            raise AssertionError

    with pytest.raises(PluginError, match=r"(?s)my-package .*cannot be registered.*registry"):
        Plugins().register(Plugin(), MINE)


def test_a_plugin_that_is_registered_twice_is_an_error():
    plugin, plugins = OneGuard("a"), Plugins()
    plugins.register(plugin, MINE)
    with pytest.raises(PluginError, match=r"your-package .*already registered"):
        plugins.register(plugin, YOURS)


def test_a_hook_that_fails_is_an_error_with_the_cause():
    class Plugin:
        @hookimpl
        def star_dss_register_guards(self, register):
            raise KeyError("words.txt")

    with pytest.raises(
        PluginError, match=r"star_dss_register_guards of my-package .*KeyError.*words.txt"
    ) as e:
        Plugins().register(Plugin(), MINE)
    assert isinstance(e.value.__cause__, KeyError)


def test_versions_that_are_no_specifier_are_an_error():
    class Plugin:
        @hookimpl
        def star_dss_register_integrations(self, register):
            register("host", integration(versions="1.9 or newer"))

    with pytest.raises(PluginError, match=r"my-package .*InvalidSpecifier.*1.9 or newer"):
        Plugins().register(Plugin(), MINE)
