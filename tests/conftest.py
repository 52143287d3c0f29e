"""The fixtures of all tests; what they share otherwise lies in support/."""

import functools
import gc
from pathlib import Path

import pytest
from support.guards import WordGuard, WordsPlugin
from support.models import make_tokenizer, tiny_llama
from support.paths import SHARED
from support.standin_guards import layout
from support.standin_guards import make as make_guard
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from star_dss_plugin.plugins import Origin, load_plugins

try:
    from hypothesis import settings
except ImportError:  # the wheel's tests use none
    pass
else:  # a busy machine is no failure; everything else stays as it is, also in CI
    settings.register_profile("unhurried", parent=settings.default, deadline=None)
    settings.load_profile("unhurried")


def pytest_collection_finish():
    # Trainers collect garbage at every turn, and each time look through all that was imported: a
    # second. What is there now, stays.
    gc.collect()
    gc.freeze()


def pytest_unconfigure():
    gc.unfreeze()


@pytest.fixture(autouse=True)
def _test_guard():
    # Once for each plugin manager: the tests of plugins.py make new ones.
    if WordGuard.name not in load_plugins().names("guard"):
        load_plugins().register(WordsPlugin(), Origin("tests", "star-dss-tests", "0"))


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("STAR_DSS_CACHE", str(tmp_path / "star-dss-cache"))


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer()


@pytest.fixture
def model(tokenizer) -> LlamaForCausalLM:
    return tiny_llama(len(tokenizer))


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory, tokenizer) -> Path:
    """A tiny random model with tokenizer, saved."""
    path = tmp_path_factory.mktemp("tiny-model")
    tiny_llama(len(tokenizer)).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def folder_of(tmp_path_factory):
    """Return what takes a preset's name and gives the folder of a tiny random guard of its kind."""
    made = functools.cache(lambda key: make_guard(key, tmp_path_factory.mktemp(key)))
    return lambda name: made(layout(name))


@pytest.fixture(scope="session")
def shared() -> Path:
    """The developers' shared fixtures, which a user's clone does not have."""
    if not (SHARED / "guards").is_dir():
        pytest.skip("needs the developers' ../shared folder (guard tokenizers and labelled data)")
    return SHARED
