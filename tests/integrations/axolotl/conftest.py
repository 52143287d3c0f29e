"""Starts Axolotl's own commands, each in a process of its own, as a user runs them."""

import itertools
import os

import pytest
from axolotl_commands import Command
from support.guards import WordGuard
from support.paths import TESTS


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """A folder for PYTHONPATH with the tests' guard as an installed plugin."""
    folder = tmp_path_factory.mktemp("site")
    (folder / "words_plugin.py").write_text(
        "from support.guards import WordsPlugin\nwords = WordsPlugin()\n"
    )
    info = folder / "words_plugin-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: words-plugin\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[star_dss]\nwords = words_plugin:words\n")
    return folder


@pytest.fixture(scope="module")
def environment(site, tmp_path_factory):
    """The variables of a command; all of a module share one score cache."""
    return {
        **os.environ,
        "AXOLOTL_DO_NOT_TRACK": "1",
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "STAR_DSS_CACHE": str(tmp_path_factory.mktemp("cache")),
        "PYTHONPATH": os.pathsep.join([str(site), str(TESTS), os.environ.get("PYTHONPATH", "")]),
    }


@pytest.fixture(scope="module")
def start(environment, tmp_path_factory):
    """Starts a command of Axolotl."""
    logs, number = tmp_path_factory.mktemp("logs"), itertools.count()
    return lambda *arguments: Command(arguments, environment, logs / f"{next(number)}.log")


@pytest.fixture
def asked(monkeypatch):
    """What guards were asked: (context, response)."""
    seen = []
    original = WordGuard.token_scores

    def token_scores(self, responses):
        seen.extend(([dict(m) for m in context], text) for context, text in responses)
        return original(self, responses)

    monkeypatch.setattr(WordGuard, "token_scores", token_scores)
    return seen
