"""Workflows, hooks and templates can be parsed, and the commands that they name exist."""

import re
import shlex

import pytest
import yaml
from support.paths import ROOT

GITHUB = ROOT / ".github"
if not GITHUB.is_dir():
    pytest.skip("a source distribution has no .github", allow_module_level=True)

MAKEFILE = (ROOT / "Makefile").read_text()
FILES = [*sorted(GITHUB.rglob("*.yml")), ROOT / ".pre-commit-config.yaml"]
WORKFLOWS = {path.stem: yaml.safe_load(path.read_text()) for path in GITHUB.glob("workflows/*.yml")}
STEPS = [
    (name, step)
    for name, workflow in WORKFLOWS.items()
    for job in workflow["jobs"].values()
    for step in job.get("steps", ())
]
COMMANDS = [(name, step["run"]) for name, step in STEPS if "run" in step]
KNOWN = {"sudo", "pipx", "test", "grep", "!"}  # commands of the runner's image or of the shell


def name_of(path):
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_files_are_valid_yaml(path):
    assert isinstance(yaml.safe_load(path.read_text()), dict)


def test_there_are_a_gate_a_fast_lane_and_a_release():
    assert set(WORKFLOWS) == {"ci", "fast", "release"}
    assert ("ci", ".ci/run") in COMMANDS
    assert {command for name, command in COMMANDS if name == "fast"} == {
        "make lint",
        "make test-core",
    }


def missing(command):
    """Return the missing command or target of a workflow's line, or None."""
    words = shlex.split(re.sub(r"^(\w+)=\"\$\(.*\)\"$", "test", command))
    if words[0] == "make":
        return next((t for t in words[1:] if f"\n{t}:" not in MAKEFILE), None)
    if words[0].startswith("."):
        path = ROOT / words[0]
        return None if path.is_file() and path.stat().st_mode & 0o111 else words[0]
    return None if words[0] in KNOWN else words[0]


@pytest.mark.parametrize(("name", "command"), COMMANDS)
def test_the_commands_exist(name, command):
    assert [line for line in command.splitlines() if missing(line)] == []


@pytest.mark.parametrize("command", ["make tset", ".ci/rnu", "tox -e py311"])
def test_a_missing_command_is_detected(command):
    assert missing(command)


@pytest.mark.parametrize("name", ["CORE", "OLDEST_TRL"])
def test_the_tests_that_a_list_names_exist(name):
    listed = re.search(rf"^{name} = ((?:.*\\\n)*.*)$", MAKEFILE, flags=re.MULTILINE)[1]
    named = re.findall(r"tests/[\w/*.]+", listed)
    assert named
    assert [path for path in named if not list(ROOT.glob(path))] == []


def test_files_that_commands_read_exist():
    named = [w for _, c in COMMANDS for w in re.findall(r"\S+\.(?:py|md)\b", c)]
    assert named
    for path in named:
        assert (ROOT / path).is_file()
    for _, step in STEPS:
        for path in step.get("with", {}).get("cache-dependency-path", "").split():
            assert list(ROOT.glob(path)), path


def test_actions_are_pinned_by_their_major_version():
    used = [step["uses"] for _, step in STEPS if "uses" in step]
    assert used
    for action in used:
        assert re.fullmatch(r"[\w-]+/[\w-]+@(release/)?v\d+", action), action
    called = [j["uses"] for w in WORKFLOWS.values() for j in w["jobs"].values() if "uses" in j]
    for path in called:
        assert (ROOT / path).is_file()
        assert "workflow_call" in yaml.safe_load((ROOT / path).read_text())[True]  # `on`, to YAML


def test_workflows_have_only_the_permissions_they_need():
    for workflow in WORKFLOWS.values():
        assert workflow["permissions"] == {"contents": "read"}
        given = {n: j["permissions"] for n, j in workflow["jobs"].items() if "permissions" in j}
        assert given in ({}, {"publish": {"id-token": "write"}})
        for job in workflow["jobs"].values():
            assert "uses" in job or job["timeout-minutes"]


def test_the_release_waits_for_the_gate():
    jobs = WORKFLOWS["release"]["jobs"]
    assert set(jobs["publish"]["needs"]) == {"gate", "build"}
    assert WORKFLOWS["release"][True] == {"push": {"tags": ["v*"]}}


def test_the_hooks_before_a_commit_are_those_of_make_lint():
    (local,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    recipe = MAKEFILE.split("\nlint:")[1].split("\n\n")[0]
    programs = set(re.findall(r"\$\(VENV\)/bin/([\w-]+)", recipe))
    entries = [hook["entry"].split() for hook in local["hooks"]]
    assert {entry[0].removeprefix(".venv/bin/") for entry in entries} == programs
    lines = [line.split() for line in recipe.splitlines()]
    for program, *options in entries:
        wanted = {f"$(VENV)/bin/{program.removeprefix('.venv/bin/')}", *options} - {"--fix"}
        assert any(wanted <= set(line) for line in lines), program


def test_dependabot_watches_existing_files():
    updates = yaml.safe_load((GITHUB / "dependabot.yml").read_text())["updates"]
    assert {one["package-ecosystem"] for one in updates} == {"pip", "github-actions"}
    for one in updates:
        folder = ROOT / one["directory"].lstrip("/")
        assert folder.is_dir()
        for path in one.get("exclude-paths", ()):
            assert (folder / path).is_file() or (ROOT / path).is_file(), path


@pytest.mark.parametrize("path", sorted(GITHUB.glob("ISSUE_TEMPLATE/[!c]*.yml")), ids=name_of)
def test_issue_forms_are_complete(path):
    form = yaml.safe_load(path.read_text())
    assert form["name"]
    assert form["description"]
    fields = [field for field in form["body"] if field["type"] != "markdown"]
    assert len({field["id"] for field in fields}) == len(fields) > 0
    assert all(field["attributes"]["label"] for field in fields)
    for command in re.findall(r"`(star-dss [^`]+)`", path.read_text()):
        assert command.split()[1] in ("--version", "plugins", "guards", "sft")
    for named in re.findall(r"\b(?:docs/)?[\w]+\.md\b", path.read_text()):
        assert (ROOT / named).is_file(), named


def test_there_are_no_owners_of_code_yet():
    assert not [f for f in (ROOT, GITHUB, ROOT / "docs") if (f / "CODEOWNERS").exists()]
