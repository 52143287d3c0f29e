"""Tokenizing several rows at once gives the same as each row alone."""

from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.sentencepiece import sentencepiece_like
from support.template_conversations import answer
from template_forms import FORMS, QUESTION, TALKS, chat_of
from tokenizers import AddedToken

from star_dss_plugin import DataError
from star_dss_plugin.data import tokenization
from star_dss_plugin.data.templates.chat import ChatTokenizer
from star_dss_plugin.data.templates.encoded import common_prefix_length
from star_dss_plugin.data.templates.located import _joined, locate
from star_dss_plugin.data.tokenization import read_row, read_rows

PARTS = [
    "ok",
    " ",
    "\n",
    "é",
    "👩‍👩‍👧",
    "e\u0301",
    "<|im_end|>",
    "assistant",
    "one more",
    "<think>",
    "日本",
]
contents = st.lists(st.sampled_from(PARTS), min_size=1, max_size=6).map("".join)


MIXED = [
    {"messages": TALKS["an answer"]},
    {"prompt": [QUESTION], "completion": [answer("four é 👩‍👩‍👧")]},
    {"prompt": "2 + 2?", "completion": " four"},
    {"text": "one text"},
    {"text": "another"},
    {"messages": [QUESTION, answer("It is four. " * 40)]},
]


@pytest.fixture(scope="module", params=["bytes", "bpe", "unigram"])
def chat(request, tokenizer):
    """Return a byte-level or SentencePiece-like tokenizer with a template."""
    if request.param == "bytes":
        return ChatTokenizer(tokenizer)
    return ChatTokenizer(sentencepiece_like(request.param), tokenizer.chat_template)


@pytest.mark.parametrize(("rows", "characters"), [(64, 1 << 18), (2, 1 << 18), (64, 100), (1, 1)])
def test_rows_at_once_equal_each_row_alone(chat, monkeypatch, rows, characters):
    alone = [read_row(row, chat) for row in MIXED]
    monkeypatch.setattr(tokenization, "_AT_ONCE", rows)
    monkeypatch.setattr(tokenization, "_CHARACTERS_AT_ONCE", characters)
    assert list(read_rows(MIXED, chat)) == alone


def test_calls_of_the_tokenizer_have_a_limit_of_characters(chat, monkeypatch):
    """Apart from its last row, no call gets more characters than the limit."""
    characters = []
    encode_all = ChatTokenizer.encode_all

    def recorded(self, texts, **kwargs):
        characters.append(sum(map(len, texts[:-1])))
        return encode_all(self, texts, **kwargs)

    monkeypatch.setattr(ChatTokenizer, "encode_all", recorded)
    monkeypatch.setattr(tokenization, "_CHARACTERS_AT_ONCE", 1000)
    made = list(read_rows([{"messages": [QUESTION, answer("ok " * 100)]}] * 20, chat))
    assert len(made) == 20
    assert 0 < max(characters) < 1000


@pytest.mark.parametrize(
    "bad",
    [
        {"messages": [QUESTION, answer("half a \ud83d character")]},
        {"prompt": "half \ud83d", "completion": "ok"},
        {"prompt": [{"role": "user", "content": "\ud83d"}], "completion": [answer("ok")]},
        {"messages": []},
        {"other": "column"},
    ],
)
def test_an_invalid_row_is_an_error_after_the_rows_before_it(chat, bad):
    later = {"messages": [{"role": "human", "content": "hi"}]}
    made = read_rows([*MIXED, bad, *MIXED, later], chat)
    before = [next(made) for _ in MIXED]
    assert before == [read_row(row, chat) for row in MIXED]
    with pytest.raises(DataError) as alone:
        read_row(bad, chat)
    with pytest.raises(DataError) as found:
        next(made)
    assert str(found.value) == str(alone.value)


_CHATS: dict[str, ChatTokenizer] = {}


def sentencepiece_chat():
    """Return a SentencePiece-like tokenizer with control tokens and a template."""
    model = sentencepiece_like("bpe")
    model.add_tokens([AddedToken("<|end|>", special=True), AddedToken("<think>", special=False)])
    return ChatTokenizer(
        model,
        "{% for m in messages %}{{ m.role }}: {{ m.content }}<|end|>{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}",
    )


@settings(max_examples=160, deadline=None)
@given(
    st.sampled_from([*FORMS, "pieces"]),
    contents,
    contents,
    st.integers(0, 12),
    st.sampled_from(["", " ", "<think>", "<think>\n\n</think>", "<|im_", "of pieces", "é"]),
)
def test_a_completion_begins_at_the_end_of_its_prompts_tokens(
    name, prompt_text, answer_text, cut, suffix
):
    """Compared with the tokens that the prompt alone shares with the whole text."""
    if name not in _CHATS:
        _CHATS[name] = sentencepiece_chat() if name == "pieces" else chat_of(name)
    chat = _CHATS[name]
    prompt = [{"role": "user", "content": prompt_text}]
    text = chat.render([*prompt, answer(answer_text)])
    question = chat.render(prompt, add_generation_prompt=True)
    question = question[: len(question) - cut] + suffix
    encoded = chat.encode(text)
    slowly = common_prefix_length(encoded.ids, chat.encode(question).ids)
    assert chat.shared_tokens(encoded, text, question) == slowly


def tokenized_texts(monkeypatch):
    """Return a list to which every text is added that is tokenized."""
    texts = []
    encode_all = ChatTokenizer.encode_all

    def recorded(self, given, **kwargs):
        texts.extend(given)
        return encode_all(self, given, **kwargs)

    monkeypatch.setattr(ChatTokenizer, "encode_all", recorded)
    return texts


@pytest.mark.parametrize("way", [{}, {"lstrip": True}, {"rstrip": True}, {"normalized": True}])
def test_a_prompt_that_ends_at_a_control_token_is_not_tokenized_again(monkeypatch, way):
    name = "Llama 3: headers"
    chat = chat_of(name)
    backend = chat.tokenizer.backend_tokenizer
    controls = [AddedToken(token, special=True, **way) for token in FORMS[name][0]]
    backend.add_special_tokens(controls)
    row = {"prompt": [{"role": "user", "content": "2 + 2? "}], "completion": [answer("four")]}
    read_row(row, chat)
    texts = tokenized_texts(monkeypatch)
    made = read_row(row, chat)
    question = chat.render(row["prompt"], add_generation_prompt=True)
    parts = not any(way.values())
    assert (question in texts) is not parts
    first = common_prefix_length(made.encoded.ids, chat.encode(question).ids)
    assert made.trained == [(first, len(made.encoded.ids))]


@settings(max_examples=80, deadline=None)
@given(st.sampled_from(list(FORMS)), st.lists(contents, min_size=2, max_size=4), st.data())
def test_the_text_of_a_run_follows_from_the_places_of_tokens(name, texts, data):
    """Compared with joining the bytes of the run's tokens."""
    chat = _CHATS.setdefault(name, chat_of(name))
    roles = ["user", "assistant"] * 2
    messages = [{"role": r, "content": c} for r, c in zip(roles, texts, strict=False)]
    made = read_row({"messages": messages}, chat, whole_completion=False)
    count = len(made.encoded.ids)
    located = locate(chat, made.encoded.ids, made)
    if located is None:
        return  # the template rewrites the contents
    start = data.draw(st.integers(0, count - 1))
    end = data.draw(st.integers(start + 1, count))
    places = located.tokens
    shared = any(a == b for a, b in pairwise(places.starts))
    assert places.exact is not shared
    turns = located.turns(start, end) or located.layout.turns
    text, ends, complete = located.turn_text(chat, turns, start, end)
    slow = replace(located, tokens=replace(places, exact=False))
    assert slow.turn_text(chat, turns, start, end) == (text, ends, complete)


@given(st.lists(st.integers(0, 12), max_size=8), st.sets(st.integers(0, 12), max_size=6))
def test_joined_spans_have_the_text_and_the_ends_of_their_tokens(ends, edges):
    text, ends, edges = "ab  cd\n\nef gh"[:12], sorted(ends), sorted(edges)
    spans = list(zip(edges[::2], edges[1::2], strict=False))
    joined, found = _joined(text, ends, spans)
    gaps = [text[b:a] for (_, b), (a, _) in pairwise(spans)]
    glue = ["", *(gap if not gap.strip() else "\n\n" for gap in gaps)][: len(spans)]
    assert joined == "".join(g + text[a:b] for g, (a, b) in zip(glue, spans, strict=True))
    for end, reached in zip(ends, found, strict=True):
        begun = [(a, min(end, b), len(g)) for (a, b), g in zip(spans, glue, strict=True) if a < end]
        assert reached == sum(b - a + g for a, b, g in begun)
