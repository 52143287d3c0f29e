"""A host framework of another package: found, checked and trained like the built-in ones."""

import ast
import json
import os
import re
import subprocess
import sys

import pytest
import yaml
from support.paths import ROOT, TESTS

from star_dss_plugin import PluginError
from star_dss_plugin.cli.check import check_config
from star_dss_plugin.errors import ConfigError
from star_dss_plugin.hookspecs import Findings, Integration, hookimpl
from star_dss_plugin.options import StarDSSOptions
from star_dss_plugin.plugins import Origin, Plugins, load_plugins

EXAMPLE = TESTS / "plugin_example"
TRAINER = "star_dss_toy.trainer:StarDSSToyTrainer"


def install(target, *sources):
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        + ["--no-index", "--no-deps", "--no-build-isolation", "--target", str(target)]
        + [str(source) for source in sources],
        check=True,
        timeout=300,
    )
    return target


@pytest.fixture(scope="module")
def sites(tmp_path_factory):
    """Return the folders in which pip installed the integration with a guard, and the host."""
    for needed in ("pip", "hatchling"):
        pytest.importorskip(needed, reason=f"{needed} is needed to install the example")
    plugins = install(tmp_path_factory.mktemp("plugins"), EXAMPLE, EXAMPLE / "toy_integration")
    return plugins, install(tmp_path_factory.mktemp("host"), EXAMPLE / "toy_host")


def run(sites, *words, cwd=None):
    """Run `python …` with `sites` on its path; return its output and exit status."""
    search = [*map(str, sites), str(ROOT), str(ROOT / "integrations")]
    search += [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    environment = {
        "PYTHONPATH": os.pathsep.join(search),
        "COLUMNS": "200",
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }
    return subprocess.run(
        [sys.executable, *words],
        env=os.environ | environment,
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


STAR_DSS = ("-c", "from star_dss_plugin.cli.app import main; main()")
CONFIG = {
    "toy": {"model": "?", "data": "rows.jsonl", "steps": 2, "trainer": TRAINER},
    "star_dss": {"guard": {"preset": "word-list", "words": ["bad"]}, "chunk_size": 2},
}


def write_config(folder, name, model_dir, change):
    """Write a configuration with changed blocks, and its data."""
    rows = [{"prompt": "how are you?", "completion": " i am bad. no! it is a word"}] * 2
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    toy = {**CONFIG["toy"], "model": str(model_dir), **change.get("toy", {})}
    given = {**CONFIG, **change, "toy": toy}
    given = {key: value for key, value in given.items() if value is not None}
    (folder / name).write_text(yaml.safe_dump(given))


def test_the_host_is_listed_with_its_version(sites):
    shown = run(sites, *STAR_DSS, "plugins")
    assert shown.returncode == 0, shown.stderr
    assert re.search(r"^toy +toy-host +>=2,<3 +2\.1 +ok", shown.stdout, flags=re.MULTILINE)
    assert f"toy: {TRAINER}, options of star_dss_toy.trainer:ToyOptions\n" in shown.stdout


def test_a_host_that_is_not_installed_is_named_with_its_installation(sites, tmp_path, model_dir):
    shown = run(sites[:1], *STAR_DSS, "plugins")
    assert shown.returncode == 0, shown.stderr
    assert re.search(r"^toy +toy-host +>=2,<3 +- +not found", shown.stdout, flags=re.MULTILINE)
    assert "install it with:\n  pip install 'star-dss-toy[host]'" in shown.stdout
    write_config(tmp_path, "toy.yaml", model_dir, {})
    checked = run(sites[:1], *STAR_DSS, "check", "toy.yaml", cwd=tmp_path)
    assert checked.returncode == 2
    assert "toy.yaml is a configuration for toy and needs toy-host, which is not" in checked.stderr
    assert "pip install 'star-dss-toy[host]'" in checked.stderr


CHECK_ALL = """
import json, sys
from pathlib import Path
from typer.testing import CliRunner
from star_dss_plugin.cli.app import app

found = {}
for name, words in json.loads(sys.argv[1]).items():
    result = CliRunner().invoke(app, ["check", f"{name}.yaml", *words])
    said = str(result.exception) if result.exit_code == 1 and result.exception else ""
    found[name] = [result.exit_code, result.output + said]
print(json.dumps(found))
"""
CHECKED = {
    # name: changes, words of the command, exit status, a part of the output
    "good": ({}, (), 0, "train data: 2 rows, 2 responses (0 without messages): one pass over"),
    "guard": ({}, (), 0, "guard: word-list (DEMONSTRATION ONLY"),
    "options": ({}, (), 0, "options: toy cannot set engine, engine_options, guard_device,"),
    "no-data": ({"toy": {"data": "absent.jsonl"}}, ("--no-data",), 0, "no problem found"),
    "said": ({"base_model": "x"}, ("--integration", "toy"), 0, "no problem found"),
    "trainer": ({"toy": {"trainer": "toy_host:ToyTrainer"}}, (), 1, "toy-host trains without"),
    "block": ({"star_dss": None}, (), 1, "star_dss is None; give a block"),
    "misspelt": ({"star_dss": {"gaurd": "x"}}, (), 1, "unexpected keyword argument 'gaurd'"),
    "unknown": ({"star_dss": {"guard": "word-lst"}}, (), 1, "Did you mean 'word-list'"),
    "lacks": ({"star_dss": {"guard": "word-list"}}, (), 1, "'words'"),
    "two": ({"base_model": "x"}, (), 1, "could be a configuration for each of axolotl and toy"),
}


@pytest.fixture(scope="module")
def checked(sites, tmp_path_factory, model_dir):
    """Return exit status and output of `star-dss check` for each of `CHECKED`."""
    folder = tmp_path_factory.mktemp("checked")
    for name, (change, *_) in CHECKED.items():
        write_config(folder, f"{name}.yaml", model_dir, change)
    words = json.dumps({name: words for name, (_, words, *_) in CHECKED.items()})
    done = run(sites, "-c", CHECK_ALL, words, cwd=folder)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("name", CHECKED)
def test_configurations_of_the_host_are_checked(checked, name):
    _, _, status, message = CHECKED[name]
    assert checked[name][0] == status, checked[name][1]
    assert message in checked[name][1]


TRAIN = """
import json, yaml, toy_host

losses = {}
for name in ("shaped", "sft", "plain"):
    config = yaml.safe_load(open("toy.yaml"))
    if name == "sft":
        config["star_dss"]["loss_type"] = "sft"
    if name == "plain":
        config["toy"]["trainer"] = "toy_host:ToyTrainer"
    trainer = toy_host.trainer_class(config)
    assert (trainer.__name__ == "ToyTrainer") == (name == "plain")
    losses[name] = trainer(config).train()
print(json.dumps(losses))
"""


def test_the_host_trains_with_the_loss(sites, tmp_path, model_dir):
    write_config(tmp_path, "toy.yaml", model_dir, {})
    done = run(sites, "-c", TRAIN, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    losses = json.loads(done.stdout)
    assert {len(steps) for steps in losses.values()} == {2}
    # Tokens from the listed word on have weight 0.1; at first the reference equals the model.
    assert 0 < losses["shaped"][0] < 0.9 * losses["plain"][0]
    assert losses["shaped"][1] < losses["shaped"][0]
    assert losses["sft"] == pytest.approx(losses["plain"], rel=1e-4)


def test_finding_the_host_imports_nothing_heavy(sites):
    code = (
        "import sys; from star_dss_plugin.plugins import load_plugins;"
        "assert 'toy' in load_plugins().names('integration');"
        "assert load_plugins().claimants({'toy': {}}) == ['toy'];"
        "print(sorted({'torch', 'transformers', 'toy_host'} & set(sys.modules)))"
    )
    assert run(sites, "-c", code).stdout == "[]\n"


# Errors of integrations


def integration(**changes):
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


@pytest.fixture
def use_plugins(monkeypatch):
    """Return a function that lets `star-dss check` use these plugins."""

    def use_plugins(plugins):
        monkeypatch.setattr("star_dss_plugin.cli.check.load_plugins", lambda: plugins)

    return use_plugins


@pytest.fixture
def path(tmp_path):
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


# Names of hosts


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
        assert callable(load_plugins().of_host(name, target, "this test"))
