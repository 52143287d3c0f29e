"""Fixtures that run Axolotl's commands in processes of their own, and that record guards' calls."""

import itertools
import os

import pytest
from axolotl_commands import Command
from support.guards import WordGuard, write_words_plugin
from support.paths import TESTS


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """Return a folder for PYTHONPATH with the tests' guard as an installed plugin."""
    return write_words_plugin(tmp_path_factory.mktemp("site"))


@pytest.fixture(scope="module")
def environment(site, tmp_path_factory):
    """Return the environment variables of a command; a module's commands share one score cache."""
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
    """Return a function that starts a command of Axolotl."""
    logs, number = tmp_path_factory.mktemp("logs"), itertools.count()
    return lambda *arguments: Command(arguments, environment, logs / f"{next(number)}.log")


@pytest.fixture
def asked(monkeypatch):
    """Return a list that records each (context, response) that a guard is asked to score."""
    seen = []
    original = WordGuard.token_scores

    def token_scores(self, responses):
        seen.extend(([dict(m) for m in context], text) for context, text in responses)
        return original(self, responses)

    monkeypatch.setattr(WordGuard, "token_scores", token_scores)
    return seen
