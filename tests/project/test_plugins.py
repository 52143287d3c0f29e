"""Plugins: names, and targets that are imported on first use."""

import sys

import pytest
from support.plugins import MINE, YOURS, OneGuard, guard_source

from star_dss_plugin.errors import ConfigError, PluginError
from star_dss_plugin.hookspecs import hookimpl
from star_dss_plugin.plugins import Plugins


def test_a_name_that_two_plugins_register_is_an_error_that_names_both():
    plugins = Plugins()
    plugins.register(OneGuard("same"), MINE)
    with pytest.raises(PluginError, match="guard 'same'") as e:
        plugins.register(OneGuard("same"), YOURS)
    assert str(MINE) in str(e.value)
    assert str(YOURS) in str(e.value)
    assert "STAR_DSS_DISABLED_PLUGINS=your-package" in str(e.value)


@pytest.mark.parametrize("name", ["a", "0", "star_dss", "a.b-c_d", "llama-guard-3-8b"])
def test_valid_names(name):
    plugins = Plugins()
    plugins.register(OneGuard(name), MINE)
    assert plugins.names("guard") == (name,)


@pytest.mark.parametrize(
    "name", ["", "Word", "-a", "_a", ".a", "a b", "a/b", "ä", "a\n", "٣", None, 3]
)
def test_invalid_names_are_errors(name):
    with pytest.raises(PluginError, match=r"^my-package .*A name has to match"):
        Plugins().register(OneGuard(name), MINE)


@pytest.mark.parametrize(
    "target", ["module", "a:b:c", ":b", "a:", ".a:b", "a b:c", "a:b\n", 3, None]
)
def test_invalid_targets_are_errors(target):
    with pytest.raises(PluginError, match=r"my-package .*Give a callable or 'module:object'"):
        Plugins().register(OneGuard("a", target), MINE)


# Looking up


@pytest.mark.parametrize(
    ("lookup", "kind"),
    [("guard", "guard"), ("segmenter", "segmenter"), ("weight_map", "loss_type")],
)
def test_an_unknown_name_is_an_error_with_the_nearest_names(lookup, kind):
    class Plugin:
        @hookimpl
        def star_dss_register_guards(self, register):
            register("word-list", dict)

        @hookimpl
        def star_dss_register_segmenters(self, register):
            register("word-list", dict)

        @hookimpl
        def star_dss_register_weight_maps(self, register):
            register("word-list", dict)

    plugins = Plugins()
    plugins.register(Plugin(), MINE)
    with pytest.raises(ConfigError, match=f"Unknown {kind} 'wordlist'. Did you mean 'word-list'"):
        getattr(plugins, lookup)("wordlist")


def test_what_is_registered_is_imported_on_first_use(install):
    install(
        "lazy",
        {"lazy": "lazy_plugin"},
        lazy_plugin=guard_source("a", "lazy_plugin"),
        lazy_plugin_heavy="Guard = dict",
    )
    plugins = Plugins.discover(builtins=())
    assert "a" in plugins.names("guard")
    assert [e.target for e in plugins.entries("guard") if e.name == "a"] == [
        "lazy_plugin_heavy:Guard"
    ]
    assert "lazy_plugin_heavy" not in sys.modules
    assert plugins.guard("a") is dict
    assert "lazy_plugin_heavy" in sys.modules


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("import a_missing_dependency", "'a_missing_dependency' installed"),
        ("from json import missing_name", "'json' installed"),
        ("raise OSError('no driver')", "OSError: no driver."),
        ("def broken(", "SyntaxError"),
        ("", "AttributeError.*Guard"),
        ("Guard = 3", "type int cannot be called"),
    ],
)
def test_a_target_that_cannot_be_loaded_is_an_error_with_package_and_cause(
    install, source, message
):
    install("lazy", {}, lazy_heavy=source)
    plugins = Plugins()
    plugins.register(OneGuard("a", "lazy_heavy:Guard"), MINE)
    with pytest.raises(PluginError, match=f"guard 'a' of my-package 1.0 .*{message}") as e:
        plugins.guard("a")
    assert not isinstance(e.value, ImportError)
