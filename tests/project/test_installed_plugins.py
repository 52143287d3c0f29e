"""Plugins as packages: entry points, built-ins, disabled plugins, and the example."""

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from support.paths import ROOT, TESTS
from support.plugins import guard_source

from star_dss_plugin import plugins as plugins_module
from star_dss_plugin.errors import PluginError
from star_dss_plugin.plugins import Origin, Plugins, load_plugins

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
def test_a_disabled_plugin_is_listed_but_not_imported(install, word):
    install("my-dist", {"entry": "broken_plugin"}, broken_plugin="raise AssertionError")
    plugins = Plugins.discover(builtins=(), disabled=[word, ""])
    blocked = [info for info in plugins.listing() if info.blocked]
    assert [info.origin for info in blocked] == [Origin("entry", "my-dist", "1.0")]
    assert (blocked[0].hooks, blocked[0].names) == ((), {})
    assert "broken_plugin" not in sys.modules


def test_disabling_a_missing_plugin_is_an_error(install):
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


# In a new process


def python(code: str, *path: Path, **environment: str) -> str:
    """Return what a new interpreter prints, with `path` before this repository on its path."""
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
    """Return the folder in which pip installed the example plugin."""
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
