"""A host framework of another package: found, checked and trained like the built-in ones."""

import json
import os
import re
import subprocess
import sys

import pytest
import yaml
from support.paths import ROOT, TESTS

EXAMPLE = TESTS / "plugin_example"
TRAINER = "star_dss_toy.trainer:StarDSSToyTrainer"


def install(target, *sources):
    """Install packages into a folder, as pip does for a user."""
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
