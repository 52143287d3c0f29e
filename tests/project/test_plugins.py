"""Plugins: the four hooks, and every way in which a plugin can be wrong."""

import inspect
import json
import os
import subprocess
import sys
import textwrap
import typing
from pathlib import Path

import pytest
from support.paths import ROOT, TESTS

from star_dss_plugin import hookspecs
from star_dss_plugin import plugins as plugins_module
from star_dss_plugin.errors import ConfigError, PluginError
from star_dss_plugin.hookspecs import Integration, hookimpl
from star_dss_plugin.plugins import HOOK_KINDS, Kind, Origin, Plugins, load_plugins

MINE = Origin("mine", "my-package", "1.0")
YOURS = Origin("yours", "your-package", "2.0")
HOOKS = {name: f for name, f in vars(hookspecs).items() if hasattr(f, "star_dss_spec")}


def integration(**changes) -> Integration:
    """An integration of which nothing can be imported."""
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


class OneGuard:
    """A plugin with one guard called `name`."""

    def __init__(self, name: object, target: object = dict, **options: str) -> None:
        self.name, self.target, self.options = name, target, options

    @hookimpl
    def star_dss_register_guards(self, register):
        register(self.name, self.target, **self.options)


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Puts a fake distribution on the path: `install("dist", {"entry": "module"}, module="…")`."""
    loaded = set(sys.modules)

    def install(dist: str, entry_points: dict[str, str], version: str = "1.0", **modules: str):
        site = tmp_path / dist
        info = site / f"{dist.replace('-', '_')}-{version}.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {dist}\nVersion: {version}\n")
        lines = "\n".join(f"{name} = {value}" for name, value in entry_points.items())
        (info / "entry_points.txt").write_text(f"[star_dss]\n{lines}\n")
        for name, source in modules.items():
            (site / f"{name}.py").write_text(textwrap.dedent(source))
        monkeypatch.syspath_prepend(site)

    yield install
    for name in set(sys.modules) - loaded:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(tmp_path)):
            del sys.modules[name]


GUARD = """
    from star_dss_plugin.hookspecs import hookimpl

    @hookimpl
    def star_dss_register_guards(register):
        register("{name}", "{module}_heavy:Guard", summary="a guard")
    """


def guard_source(name: str, module: str) -> str:
    return GUARD.format(name=name, module=module)


# The hooks


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


# What is wrong is said, with the package's name


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


# Discovery


def test_builtins_use_the_same_hooks_and_come_first(install):
    install(
        "other",
        {"other": "other_plugin"},
        other_plugin=guard_source("other", "other_plugin"),
        our_builtins=guard_source("ours", "our_builtins"),
    )
    plugins = Plugins.discover(builtins=("our_builtins",))
    assert plugins.names("guard")[0] == "ours"
    assert "other" in plugins.names("guard")
    first = plugins.listing()[0]
    assert (first.origin.package, first.origin.plugin) == ("star-dss-plugin", "our_builtins")
    assert first.hooks == ("star_dss_register_guards",)
    assert first.names == {"guard": ("ours",)}


def test_a_builtin_name_cannot_be_taken(install):
    install(
        "other",
        {"other": "other_plugin"},
        other_plugin=guard_source("same", "other_plugin"),
        our_builtins=guard_source("same", "our_builtins"),
    )
    with pytest.raises(PluginError, match=r"other 1.0 .*'same', but star-dss-plugin .*already"):
        Plugins.discover(builtins=("our_builtins",))


def test_an_entry_point_may_name_an_object(install):
    source = """
        from star_dss_plugin.hookspecs import hookimpl

        class Plugin:
            @hookimpl
            def star_dss_register_guards(self, register):
                register("of-an-object", dict)

        plugin = Plugin()
        """
    install("other", {"other": "other_plugin:plugin"}, other_plugin=source)
    assert Plugins.discover(builtins=()).guard("of-an-object") is dict


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("import a_missing_dependency", "ModuleNotFoundError.*'a_missing_dependency' installed"),
        ("raise RuntimeError('boom')", "RuntimeError: boom"),
        ("def broken(", "SyntaxError"),
    ],
)
def test_a_plugin_that_cannot_be_imported_is_an_error_with_the_cause(install, source, message):
    install("broken-dist", {"entry": "broken_plugin"}, broken_plugin=source)
    match = rf"broken-dist 1\.0 \(plugin 'entry'\) cannot be imported\. .*{message}"
    with pytest.raises(PluginError, match=match) as e:
        Plugins.discover(builtins=())
    assert not isinstance(e.value, ImportError)
    assert isinstance(e.value.__cause__, Exception)


def test_an_entry_point_that_names_nothing_is_an_error(install):
    install("broken-dist", {"entry": "broken_plugin:absent"}, broken_plugin="")
    with pytest.raises(PluginError, match=r"broken-dist .*cannot be imported.*absent"):
        Plugins.discover(builtins=())


def test_two_distributions_with_one_plugin_name_are_an_error_that_names_both(install):
    install("dist-a", {"same": "plugin_a"}, plugin_a=guard_source("a", "plugin_a"))
    install("dist-b", {"same": "plugin_b"}, plugin_b=guard_source("b", "plugin_b"))
    with pytest.raises(PluginError, match=r"dist-a 1\.0 .*dist-b 1\.0 .*same plugin name"):
        Plugins.discover(builtins=())
    plugins = Plugins.discover(builtins=(), disabled=["dist-b"])
    assert "a" in plugins.names("guard")
    assert "b" not in plugins.names("guard")


# Disabling


@pytest.mark.parametrize("word", ["entry", "my-dist", "My_Dist", " entry "])
def test_a_disabled_plugin_is_listed_but_not_even_imported(install, word):
    install("my-dist", {"entry": "broken_plugin"}, broken_plugin="raise AssertionError")
    plugins = Plugins.discover(builtins=(), disabled=[word, ""])
    blocked = [info for info in plugins.listing() if info.blocked]
    assert [info.origin for info in blocked] == [Origin("entry", "my-dist", "1.0")]
    assert (blocked[0].hooks, blocked[0].names) == ((), {})
    assert "broken_plugin" not in sys.modules


def test_disabling_what_is_not_there_is_an_error(install):
    install("my-dist", {"entry": "my_plugin"}, my_plugin=guard_source("a", "my_plugin"))
    with pytest.raises(PluginError, match=r"STAR_DSS_DISABLED_PLUGINS names 'entyr'.*my-dist 1.0"):
        Plugins.discover(builtins=(), disabled=["entyr"])


def test_load_plugins_reads_the_environment_once(install, monkeypatch):
    install(
        "my-dist",
        {"entry": "my_plugin"},
        my_plugin=guard_source("a", "my_plugin"),
        our_builtins=guard_source("ours", "our_builtins"),
    )
    monkeypatch.setattr(plugins_module, "BUILTINS", ("our_builtins",))
    load_plugins.cache_clear()
    try:
        plugins = load_plugins()
        assert {"ours", "a"} <= set(plugins.names("guard"))
        monkeypatch.setenv("STAR_DSS_DISABLED_PLUGINS", "entry, ")
        assert load_plugins() is plugins
        load_plugins.cache_clear()
        assert "a" not in load_plugins().names("guard")
        monkeypatch.setenv("STAR_DSS_DISABLED_PLUGINS", "entyr")
        load_plugins.cache_clear()
        with pytest.raises(PluginError, match="entyr"):
            load_plugins()
    finally:
        load_plugins.cache_clear()


# In a process of its own


def python(code: str, *path: Path, **environment: str) -> str:
    """What a fresh interpreter prints, with `path` before this repository on its path."""
    search = [*map(str, path), str(ROOT), os.environ.get("PYTHONPATH", "")]
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(search)} | environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_registration_imports_nothing_heavy():
    printed = python(
        """
        import sys
        from star_dss_plugin.plugins import load_plugins
        load_plugins()
        print(sorted({"torch", "transformers", "datasets", "trl", "numpy"} & set(sys.modules)))
        """
    )
    assert printed == "[]\n"


def test_importing_loads_no_plugin(install, tmp_path):
    install("my-dist", {"entry": "my_plugin"}, my_plugin="raise AssertionError")
    python("import star_dss_plugin.plugins", tmp_path / "my-dist")


@pytest.fixture(scope="module")
def example(tmp_path_factory):
    """The example plugin as pip installs it."""
    for needed in ("pip", "hatchling"):
        pytest.importorskip(needed, reason=f"{needed} is needed to install the example plugin")
    target = tmp_path_factory.mktemp("site")
    source = TESTS / "plugin_example"
    subprocess.run(
        [
            sys.executable,
            "-m",
            "pip",
            "install",
            "--quiet",
            "--disable-pip-version-check",
            "--no-index",
            "--no-deps",
            "--no-build-isolation",
            "--target",
            str(target),
            str(source),
        ],
        check=True,
        timeout=300,
    )
    return target


def test_an_installed_plugin_is_found_and_works(example):
    printed = python(
        """
        import json, sys
        from star_dss_plugin.plugins import load_plugins

        plugins = load_plugins()
        heavy = "torch" in sys.modules
        guard = plugins.guard("word-list")(words=["Bomb"], device="cpu", dtype="auto",
                                           batch_tokens=1)
        ask = {"role": "user", "content": "How?"}
        scores = guard.score([
            [ask, {"role": "assistant", "content": text}]
            for text in ("I will not.", "A bomb!", "bomb bomb", "")
        ])
        import torch
        s = torch.tensor([0.5, 1.0])
        ce, kl = plugins.weight_map("star_dss_squared")(s, s, kl_coef=2.0, threshold=0.5)
        (info,) = [i for i in plugins.listing() if i.origin.plugin == "word-list"]
        print(json.dumps({
            "heavy": heavy, "scores": scores, "ce": ce.tolist(), "kl": kl.tolist(),
            "package": info.origin.package, "version": info.origin.version,
            "hooks": info.hooks, "names": info.names,
        }))
        """,
        example,
    )
    assert json.loads(printed) == {
        "heavy": False,
        "scores": pytest.approx([1.0, 0.1, 0.01, 1.0]),
        "ce": [0.25, 1.0],
        "kl": [1.5, 0.0],
        "package": "star-dss-word-list",
        "version": "0.3",
        "hooks": ["star_dss_register_guards", "star_dss_register_weight_maps"],
        "names": {"guard": ["word-list"], "loss_type": ["star_dss_squared"]},
    }


@pytest.mark.parametrize("word", ["word-list", "star-dss-word-list"])
def test_an_installed_plugin_can_be_disabled(example, word):
    printed = python(
        """
        from star_dss_plugin.plugins import load_plugins

        plugins = load_plugins()
        print("word-list" in plugins.names("guard"))
        print("star_dss_squared" in plugins.names("loss_type"))
        print([i.origin.package for i in plugins.listing() if i.blocked])
        """,
        example,
        STAR_DSS_DISABLED_PLUGINS=word,
    )
    assert printed.split("\n") == ["False", "False", "['star-dss-word-list']", ""]
