"""Data for `LettersGuard` to score in shards."""

import json

import pytest
from support import ray_words
from support.ray_words import LettersGuard
from support.shards import ROWS

from star_dss_plugin.plugins import Origin, load_plugins


@pytest.fixture(autouse=True)
def _letters():
    if LettersGuard.name not in load_plugins().names("guard"):
        load_plugins().register(ray_words, Origin("letters", "star-dss-tests", "0"))


@pytest.fixture
def data(tmp_path):
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
    path = tmp_path / "log"
    path.mkdir()
    return path
