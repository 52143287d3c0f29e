"""Integrations: errors in their parts, configurations that they claim, and the built-in ones."""

import ast
import re

import pytest
from support.paths import ROOT

from star_dss_plugin import PluginError
from star_dss_plugin.cli.check import check_config
from star_dss_plugin.errors import ConfigError
from star_dss_plugin.hookspecs import Findings, Integration, hookimpl
from star_dss_plugin.options import StarDSSOptions
from star_dss_plugin.plugins import Origin, Plugins, load_plugins


def integration(**changes):
    """Return an integration with changed parts."""
    parts = {
        "host": "pytest",
        "versions": ">=1",
        "install": "pytest",
        "trainer": dict,
        "options": StarDSSOptions,
        "configuration": "a YAML with mine",
        "claims": lambda raw: "mine" in raw,
        "check": lambda path, raw, *, data: Findings(),
    }
    return Integration(**{**parts, **changes})


def registered(given, name="mine"):
    """Return plugins of which one has registered this integration."""

    class Plugin:
        @hookimpl
        def star_dss_register_integrations(self, register):
            register(name, given)

    plugins = Plugins()
    plugins.register(Plugin(), Origin("mine", "my-package", "1.0"))
    return plugins


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"host": ""}, "host=''. Give a text"),
        ({"install": None}, "install=None. Give a text"),
        ({"configuration": 3}, "configuration=3. Give a text"),
        ({"versions": "any"}, "versions='any'.*PEP 440"),
        ({"versions": None}, "versions=None.*PEP 440"),
        ({"claims": "module:claims"}, "claims='module:claims'. Give a function"),
        ({"trainer": "Trainer"}, "trainer='Trainer'. Give a callable or 'module:object'"),
        ({"options": None}, "options=None. Give a callable"),
        ({"check": "check"}, "check='check'. Give a callable"),
        ({"commands": {"train": dict}}, "the command 'train'. An integration can run sft and demo"),
        ({"commands": {"sft": "main"}}, "sft='main'. Give a callable"),
    ],
)
def test_a_part_that_cannot_be_used_is_an_error(change, message):
    with pytest.raises(PluginError, match=f"my-package 1.0 .*{message}"):
        registered(integration(**change))


def test_an_object_that_is_no_integration_is_an_error():
    with pytest.raises(PluginError, match=r"my-package .*'a:b'. Give a .*Integration"):
        registered("a:b")


def test_a_command_that_another_integration_runs_is_an_error():
    class Plugin:
        @hookimpl
        def star_dss_register_integrations(self, register):
            register("one", integration(commands={"sft": dict}))
            register("two", integration(commands={"sft": dict}))

    with pytest.raises(PluginError, match="the command 'sft', which 'one' runs already"):
        Plugins().register(Plugin(), Origin("mine", "my-package", "1.0"))


# `star-dss check`


@pytest.fixture
def use_plugins(monkeypatch):
    """Return a function that lets `star-dss check` use these plugins."""

    def use_plugins(plugins):
        monkeypatch.setattr("star_dss_plugin.cli.check.load_plugins", lambda: plugins)

    return use_plugins


@pytest.fixture
def path(tmp_path):
    """Return a configuration that the integration claims."""
    path = tmp_path / "run.yaml"
    path.write_text("mine: 1\n")
    return path


def test_a_file_that_no_integration_knows_is_an_error_that_lists_them(path):
    with pytest.raises(
        ConfigError, match="has the keys mine, and no integration recognizes it"
    ) as error:
        check_config(path, data=False)
    for host in load_plugins().hosts():
        assert f"{host.name}: {host.integration.configuration}" in str(error.value)
    path.write_text("{}")
    with pytest.raises(ConfigError, match="has no keys, and no integration recognizes it"):
        check_config(path, data=False)


def test_a_file_that_two_integrations_know_is_an_error_that_names_both(path, use_plugins):
    class Plugin:
        @hookimpl
        def star_dss_register_integrations(self, register):
            register("one", integration())
            register("two", integration(configuration="something else"))

    plugins = Plugins()
    plugins.register(Plugin(), Origin("mine", "my-package", "1.0"))
    use_plugins(plugins)
    with pytest.raises(ConfigError, match="each of one and two") as error:
        check_config(path, data=False)
    assert "two: something else" in str(error.value)
    assert "--integration one" in str(error.value)
    assert check_config(path, data=False, integration="two") == Findings()


def test_an_unknown_integration_is_an_error_with_the_nearest(path):
    with pytest.raises(ConfigError, match="Unknown integration 'axolot'. Did you mean 'axolotl'"):
        check_config(path, data=False, integration="axolot")


def test_a_check_that_returns_nothing_is_an_error(path, use_plugins):
    use_plugins(registered(integration(check=lambda path, raw, *, data: None)))
    with pytest.raises(PluginError, match="'mine' returned NoneType, not Findings"):
        check_config(path, data=False)


def test_claims_that_fail_are_an_error(path, use_plugins):
    use_plugins(registered(integration(claims=lambda raw: raw["absent"])))
    with pytest.raises(
        PluginError, match=r"'claims' of .*'mine' of my-package .* failed on .*KeyError"
    ):
        check_config(path, data=False)


@pytest.mark.parametrize("part", ["trainer", "options", "check"])
def test_a_part_that_cannot_be_imported_is_an_error_with_the_cause(path, use_plugins, part):
    use_plugins(registered(integration(**{part: "absent_module:thing"})))
    with pytest.raises(PluginError, match="needs pytest, which cannot be imported here") as error:
        check_config(path, data=False)
    assert "No module named 'absent_module'" in str(error.value)


def test_the_installation_of_a_host_is_named_once(path, use_plugins, tmp_path, monkeypatch):
    (tmp_path / "speaking_host.py").write_text(
        "raise RuntimeError(\"Install it with its needs: pip install 'my-package[all]'\")\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    use_plugins(registered(integration(install="my-package[all]", check="speaking_host:check")))
    with pytest.raises(PluginError) as error:
        check_config(path, data=False)
    assert str(error.value).count("pip install 'my-package[all]'") == 1


def test_a_version_that_was_not_tested_is_noted(path, use_plugins):
    use_plugins(registered(integration(versions="<1")))
    (note,) = check_config(path, data=False).notes
    assert f"pytest {pytest.__version__} is installed, and the integration was tested" in note


def test_options_that_cannot_be_set_are_noted(path, use_plugins):
    use_plugins(registered(integration(options=lambda guard, chunk_size: None)))
    (note,) = check_config(path, data=False).notes
    assert note.startswith("options: mine cannot set engine, engine_options, guard_device")
    assert "chunk_size" not in note


# Built-in integrations


def test_the_core_names_hosts_only_where_they_are_registered():
    """Docstrings may name them; so do `score`, `init`, and an extra called trl that brings PEFT."""
    package, found = ROOT / "star_dss_plugin", set()
    hosts = "|".join(host.integration.host for host in load_plugins().hosts())
    for file in sorted(package.rglob("*.py")):
        tree = ast.parse(file.read_text())
        described = {
            node.body[0].value
            for node in ast.walk(tree)
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
            and ast.get_docstring(node) is not None
        }
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                named = re.search(rf"\b(star_dss_)?({hosts})\b", node.value)
                if named and node not in described:
                    found.add(str(file.relative_to(package)))
    assert found == {"builtins.py", "cli/init.py", "cli/score.py", "evaluate/models.py"}


@pytest.mark.parametrize("name", load_plugins().names("integration"))
def test_the_parts_of_built_in_integrations_can_be_imported(name):
    host = load_plugins().host(name)
    if not host.installed:
        pytest.skip(f"{host.integration.host} is not installed")
    parts = (host.integration.trainer, host.integration.options, host.integration.check)
    for target in (*parts, *host.integration.commands.values()):
        assert callable(load_plugins().import_target(name, target, "this test"))
