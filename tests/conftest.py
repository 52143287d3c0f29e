"""The fixtures of all tests; shared helpers are in support/."""

import functools
import gc
from pathlib import Path

import pytest
from support.guards import register_guard
from support.models import make_tokenizer, tiny_llama
from support.paths import SHARED
from support.standin_guards import layout
from support.standin_guards import make as make_guard
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

try:
    from hypothesis import settings
except ImportError:  # the wheel's tests do not use hypothesis
    pass
else:  # no deadline, because a busy machine must not fail a test; all else is hypothesis's default
    settings.register_profile("unhurried", parent=settings.default, deadline=None)
    settings.load_profile("unhurried")


def pytest_collection_finish():
    # Trainers collect garbage often, and each collection would scan all imported modules for a
    # second. Frozen objects are not scanned.
    gc.collect()
    gc.freeze()


def pytest_unconfigure():
    gc.unfreeze()


@pytest.fixture(autouse=True)
def _test_guard():
    # Checked for every test, because the tests of plugins replace the plugin manager.
    register_guard()


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
    """Return the folder of a tiny random model and its tokenizer."""
    path = tmp_path_factory.mktemp("tiny-model")
    tiny_llama(len(tokenizer)).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def folder_of(tmp_path_factory):
    """Return a function from a preset's name to the folder of a tiny random guard of its kind."""
    made = functools.cache(lambda key: make_guard(key, tmp_path_factory.mktemp(key)))
    return lambda name: made(layout(name))


@pytest.fixture(scope="session")
def shared() -> Path:
    """Return the folder of the developers' shared files, which a user's clone does not have."""
    if not (SHARED / "guards").is_dir():
        pytest.skip("needs the developers' ../shared folder (guard tokenizers and labelled data)")
    return SHARED
