"""Rows that `LettersGuard` scores in shards, and talks scored with and without a probe."""

import json
from types import SimpleNamespace

import pytest
from support import ray_words
from support.probed import exact, learnable, probed, talks
from support.ray_words import LettersGuard
from support.shards import ROWS

from star_dss_plugin.plugins import Origin, load_plugins


@pytest.fixture(autouse=True)
def _letters():
    if LettersGuard.name not in load_plugins().names("guard"):
        load_plugins().register(ray_words, Origin("letters", "star-dss-tests", "0"))


@pytest.fixture
def data(tmp_path):
    """Return a file of short conversations."""
    path = tmp_path / "chat.jsonl"
    talk = (
        [
            {"role": "user", "content": f"how is {i}?"},
            {"role": "assistant", "content": f"it is {i}"},
        ]
        for i in range(ROWS)
    )
    path.write_text("".join(json.dumps({"messages": messages}) + "\n" for messages in talk))
    return path


@pytest.fixture
def log(tmp_path):
    """Return an empty folder, in which `LettersGuard` records what it scores."""
    path = tmp_path / "log"
    path.mkdir()
    return path


@pytest.fixture(scope="session")
def learnable_guard(tmp_path_factory, tokenizer):
    """Return the description of a verdict guard whose scores a probe can learn."""
    return learnable(tmp_path_factory.mktemp("learnable"), tokenizer)


@pytest.fixture(scope="session")
def scored_twice(tmp_path_factory, tokenizer, learnable_guard):
    """Return talks scored in an `exact` and in a `probed` run, and the `cache` of the latter."""
    folder = tmp_path_factory.mktemp("scored-twice")
    return SimpleNamespace(
        exact=exact(talks(), tokenizer, learnable_guard, score_cache_dir=str(folder / "exact")),
        probed=probed(talks(), tokenizer, learnable_guard, score_cache_dir=str(folder / "probed")),
        cache=folder / "probed",
    )
