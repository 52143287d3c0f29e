"""How a response is cut: token boundaries, chunks, words and sentences."""

import re
import time
from itertools import pairwise

import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from support.models import tokenized
from support.sentencepiece import sentencepiece_like
from tokenizers import decoders
from transformers import AutoTokenizer

from star_dss_plugin.data import decoding
from star_dss_plugin.data.decoding import decode, special_ids, token_boundaries
from star_dss_plugin.data.responses import find_responses
from star_dss_plugin.data.templates.chat import ChatTokenizer
from star_dss_plugin.segmenters import chunk_ends, sentences, tokens, whole, words

SEGMENTERS = {"tokens": tokens, "words": words, "sentences": sentences, "whole": whole}


@pytest.fixture(scope="module", params=["bytes", "spm-bpe", "spm-unigram", "qwen3guard"])
def each_tokenizer(request, tokenizer):
    """Return a byte-level tokenizer (ours or Qwen's) or a SentencePiece-like one."""
    if request.param == "bytes":
        return tokenizer
    if request.param == "qwen3guard":
        folder = request.getfixturevalue("shared") / "guards" / "qwen3guard_gen"
        return AutoTokenizer.from_pretrained(folder)
    return sentencepiece_like(request.param.removeprefix("spm-"))


pieces = st.sampled_from(
    [
        "bad",
        "hello",
        " the",
        "quick brown",
        "👩‍👩‍👧",
        "🛡️",
        "e\u0301",
        "ñ",
        "你好。",
        "日本",
        "שלום",
        "مرحبا",
        "\n",
        "\r\n",
        "\n\n",
        "   ",
        "\t",
        "\ufffd",
        "<|im_end|>",
        "</think>",
        "\x00",
        "\u2028",
        "...",
        "?!",
        '."',
        "3.5",
        "𝔘",
        "\u200d",
        "▁",
        "",
    ]
)
texts = st.lists(pieces | st.text(max_size=4), max_size=14).map("".join)


def decoded(tokenizer, ids):
    """Return the text of tokens, with special tokens."""
    return tokenizer.decode(
        list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False
    )


def response_to(tokenizer, ids, segmenter=tokens, chunk_size=5, before=(), after=()):
    """Return the response of a row in which only `ids` are trained."""
    row = {
        "input_ids": [*before, *ids, *after],
        "labels": [-100] * len(before) + list(ids) + [-100] * len(after),
    }
    (response,) = find_responses(row, ChatTokenizer(tokenizer), segmenter, chunk_size)
    return response


def assume_clear(tokenizer, ids):
    """Skip two U+FFFD where bytes are tokens: they look like the first bytes of any character."""
    byte_level = isinstance(tokenizer.backend_tokenizer.decoder, decoders.ByteLevel)
    assume(byte_level or "\ufffd\ufffd" not in decoded(tokenizer, ids))


def readable(tokenizer, ids):
    """Return the decoded text, without half a character that changes the text before it."""
    text = decoded(tokenizer, ids)
    shorter = [decoded(tokenizer, ids[: len(ids) - n]) for n in (1, 2, 3) if n < len(ids)]
    clean = next((s for s in shorter if not s.endswith("\ufffd")), text)
    return text if not text.endswith("\ufffd") or text.startswith(clean) else clean


def body(tokenizer, ids):
    """Return ids without leading special tokens, and without the last ones and what follows."""
    special = special_ids(tokenizer)
    ids = list(ids)
    while ids and ids[0] in special:
        ids.pop(0)
    kept = list(ids)
    while kept and (kept[-1] in special or not decoded(tokenizer, kept[-1:]).strip()):
        if kept.pop() in special:
            ids = list(kept)
    return ids


# Token boundaries


def decode_every_prefix(tokenizer, ids):
    """Return the boundaries, computed by decoding every prefix in full."""
    whole_text = readable(tokenizer, ids)
    prefixes = [decoded(tokenizer, ids[:n]) for n in range(1, len(ids) + 1)]
    ends, complete = [], []
    for n, prefix in enumerate(prefixes):
        # Half of a U+FFFD decodes to U+FFFD, too, and its other half adds no text.
        half = prefix.endswith("\ufffd") and prefix in prefixes[n + 1 : n + 3]
        complete.append(whole_text.startswith(prefix) and not half)
        ends.append(len(prefix) if complete[-1] else ends[-1] if ends else 0)
    if ids and not complete[-1]:  # the half character that was left out
        rest = complete[::-1].index(True)
        complete[-rest:], ends[-rest:] = [True] * rest, [len(whole_text)] * rest
    return whole_text, ends, complete


@settings(max_examples=60, deadline=None)
@given(texts, st.integers(0, 2))
@example("你" * 12, 0)
@example("\ufffd👩‍👩‍👧\ufffd", 0)
@example("👩‍👩‍👧" * 3, 1)
def test_token_boundaries_equal_those_of_decoded_prefixes(each_tokenizer, text, cut):
    ids = tokenized(each_tokenizer, text)
    ids = ids[: len(ids) - cut]  # a cut row may end with half a character
    assume_clear(each_tokenizer, ids)
    assert token_boundaries(each_tokenizer, ids) == decode_every_prefix(each_tokenizer, ids)


def byte_lengths(tokenizer, ids):
    """Return the bytes of each byte-level token: each character of its name is one byte."""
    added = {i: str(t) for i, t in tokenizer.added_tokens_decoder.items()}
    return [
        len(added[i].encode()) if i in added else len(tokenizer.convert_ids_to_tokens(i))
        for i in ids
    ]


@pytest.mark.parametrize("each_tokenizer", ["bytes", "qwen3guard"], indirect=True)
@settings(max_examples=60, deadline=None)
@given(texts)
@example("\ufffd\ufffd a\ufffd")
def test_token_boundaries_equal_those_of_the_bytes(each_tokenizer, text):
    ids = tokenized(each_tokenizer, text)
    text = decoded(each_tokenizer, ids)  # Qwen normalises to NFC
    char_ends = {0: 0}
    for i, char in enumerate(text):
        char_ends[max(char_ends) + len(char.encode())] = i + 1
    reached, ends, complete = 0, [], []
    for length in byte_lengths(each_tokenizer, ids):
        reached += length
        complete.append(reached in char_ends)
        ends.append(max(end for at, end in char_ends.items() if at <= reached))
    found_text, found_ends, found_complete = token_boundaries(each_tokenizer, ids)
    assert (found_text, found_complete) == (text, complete)
    assert [e for e, c in zip(found_ends, complete, strict=True) if c] == [
        e for e, c in zip(ends, complete, strict=True) if c
    ]


@pytest.mark.parametrize(
    "text", ["the quick brown fox 🛡️ said 你好. ", "你好", "😀", "a\ufffd", " ", "a"]
)
def test_token_boundaries_of_long_texts_decode_few_tokens(each_tokenizer, text, monkeypatch):
    ids, decoded = tokenized(each_tokenizer, text * 4000)[:3999], []

    def counting(tokenizer, some):
        decoded.append(len(some))
        return decode(tokenizer, some)

    monkeypatch.setattr(decoding, "decode", counting)
    found, ends, complete = token_boundaries(each_tokenizer, ids)
    assert sum(decoded) < 200 * len(ids)  # decoding each prefix in full takes 2000 times as many
    assert ends[-1] == len(found)
    assert complete[-1]


# Chunks


@settings(max_examples=80, deadline=None)
@given(texts, st.sampled_from(sorted(SEGMENTERS)), st.integers(1, 6), st.integers(0, 2))
@example("", "tokens", 5, 0)
@example("<|im_end|>", "words", 1, 0)
@example("<|im_end|>\n<|im_end|>", "sentences", 1, 0)
@example("a\n<|im_end|>\n", "tokens", 1, 0)
@example("👩‍👩‍👧你\ufffd", "tokens", 1, 1)
def test_chunks_partition_every_run(each_tokenizer, text, segmenter, chunk_size, cut):
    eos = each_tokenizer.convert_tokens_to_ids("<|im_end|>")
    ids = [*tokenized(each_tokenizer, text), eos]
    ids = ids[: max(1, len(ids) - cut)]
    before, after = tokenized(each_tokenizer, "hello world"), [eos]
    response = response_to(each_tokenizer, ids, SEGMENTERS[segmenter], chunk_size, before, after)
    assert (response.start, response.end) == (len(before), len(before) + len(ids))
    ends, prefixes = response.chunk_ends, response.request.ends
    # every trained token has exactly one chunk
    assert list(ends) == sorted(set(ends))
    assert ends[0] > response.start
    assert ends[-1] == response.end
    # every chunk has exactly one prefix, and prefixes grow up to the whole text
    assert len(ends) == len(prefixes)
    assert list(prefixes) == sorted(set(prefixes))
    assert prefixes[-1] == len(response.request.text)
    # the text is that of the tokens, and each prefix is what its own tokens decode to
    inside = body(each_tokenizer, ids)
    assert response.request.text == readable(each_tokenizer, inside)
    first = ids.index(inside[0]) if inside else 0
    for end, prefix in zip(ends[:-1], prefixes, strict=False):
        own = ids[first : end - response.start]
        assert decoded(each_tokenizer, own) == response.request.text[:prefix]


@settings(max_examples=60, deadline=None)
@given(texts, st.integers(1, 4))
def test_words_end_at_the_token_that_completes_every_mth_word(each_tokenizer, text, chunk_size):
    ids = body(each_tokenizer, tokenized(each_tokenizer, text))
    assume(ids)
    assume_clear(each_tokenizer, ids)
    text, char_ends, complete = decode_every_prefix(each_tokenizer, ids)
    word_ends = [m.end() for m in re.finditer(r"\S+", text)][chunk_size - 1 :: chunk_size]
    expected = {len(ids)} | {
        next(n + 1 for n, end in enumerate(char_ends) if end >= word and complete[n])
        for word in word_ends
    }
    response = response_to(each_tokenizer, ids, words, chunk_size)
    assert set(response.chunk_ends) <= expected
    # an end is left out only if its chunk would have no text
    for end in expected - set(response.chunk_ends):
        later = min(e for e in response.chunk_ends if e > end)
        assert not decoded(each_tokenizer, ids[end:later]).strip()


@given(texts)
@settings(max_examples=30, deadline=None)
def test_the_segmenter_whole_makes_one_chunk(each_tokenizer, text):
    ids = [*tokenized(each_tokenizer, text), each_tokenizer.convert_tokens_to_ids("<|im_end|>")]
    assert len(response_to(each_tokenizer, ids, whole, 3).chunk_ends) == 1


@pytest.mark.parametrize("chunk_size", [1, 2, 5, 100])
def test_special_tokens_do_not_count_for_chunks(tokenizer, chunk_size):
    ids = tokenized(tokenizer, "<|im_start|>a quick brown fox jumps over it<|im_end|>")
    response = response_to(tokenizer, ids, tokens, chunk_size)
    length = len(ids) - 2
    cuts = [1 + n for n in range(chunk_size, length, chunk_size)]
    assert list(response.chunk_ends) == [*cuts, len(ids)]
    assert response.request.text == "a quick brown fox jumps over it"


@pytest.mark.parametrize(
    ("text", "chunk_size", "chunks"),
    [
        ("One. Two! Three?", 1, ["One.", " Two!", " Three?"]),
        ("One. Two! Three?", 2, ["One. Two!", " Three?"]),
        ("One. Two! Three?", 9, ["One. Two! Three?"]),
        ("3.5 is a number. So is 4.", 1, ["3.5 is a number.", " So is 4."]),
        ('He said "no." Then (yes!) left.', 1, ['He said "no."', " Then (yes!)", " left."]),
        ("first line\nsecond line", 1, ["first line", "\nsecond line"]),
        ("- a\n- b\n\n- c", 1, ["- a", "\n- b", "\n\n- c"]),
        ("Wait... what?! Yes", 1, ["Wait...", " what?!", " Yes"]),
        ("... ok", 1, ["...", " ok"]),
        ("no end at all", 1, ["no end at all"]),
        ("你好。再见！好", 1, ["你好。", "再见！", "好"]),
        ("「はい。」と言った。", 1, ["「はい。」", "と言った。"]),
        ("see example.com now. ok", 1, ["see example.com now.", " ok"]),
        ("", 1, [""]),
    ],
)
def test_sentences_are_chunks(tokenizer, text, chunk_size, chunks):
    response = response_to(
        tokenizer, tokenized(tokenizer, text + "<|im_end|>"), sentences, chunk_size
    )
    bounds = [0, *response.request.ends]
    assert [text[a:b] for a, b in pairwise(bounds)] == chunks


@pytest.mark.parametrize("segmenter", [sentences, words])
@pytest.mark.parametrize(
    ("part", "end"),
    [
        (".", "x"),
        ('."', "x"),
        (".) ", ""),
        ("a", ""),
        (" ", ""),
        ("\n", ""),
        ("。", "x"),
        ("?", "'"),
        ("a. ", ""),
    ],
)
def test_segmenters_take_linear_time(segmenter, part, end):
    """Four times the text takes about four times the processor's time; sixteen, if quadratic."""

    def cost(repeats):
        text = part * repeats + end * (repeats if end == "'" else 1)
        began = time.process_time()
        list(segmenter(text, list(range(1, len(text) + 1)), 1))
        return time.process_time() - began

    short, long = (min(cost(repeats) for _ in range(3)) for repeats in (20_000, 80_000))
    assert long / short < 10


@pytest.mark.parametrize(
    ("proposed", "boundaries", "ends"),
    [
        ([], "", ()),
        ([1], "", ()),
        ([], "1", (1,)),
        ([5, 2, 2, -1, 0, 99], "11111", (2, 5)),
        ([1], "001", (3,)),
        ([1, 2], "0111", (2, 4)),
        ([3], "1100", (4,)),
    ],
)
def test_invalid_chunk_ends_are_corrected(proposed, boundaries, ends):
    assert chunk_ends(proposed, [b == "1" for b in boundaries]) == ends
