"""Trained tokens, and the text that a guard reads, under templates of today's forms."""

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from support.paths import ROOT
from support.template_conversations import answer, user
from template_forms import CALL, FORMS, QUESTION, TALKS, chat_of, read, renders_all, table

from star_dss_plugin.data.responses import find_responses
from star_dss_plugin.data.templates.chat import ChatTokenizer
from star_dss_plugin.data.templates.tokenized import trained_runs
from star_dss_plugin.data.tokenization import tokenize_row
from star_dss_plugin.segmenters import tokens

PAGE = ROOT / "docs" / "templates.md"
QWEN3 = "Qwen3, SmolLM3: a block of thought in the last turn"
CHATS: dict[str, ChatTokenizer] = {}
STORY = "Sure! A dragon woke up " + "and flew over one more hill " * 12


@pytest.fixture(scope="module", params=list(FORMS))
def form(request):
    """Return the name of a form and its chat tokenizer."""
    return request.param, chat_of(request.param)


def test_the_table_in_the_docs_is_up_to_date():
    assert table() in PAGE.read_text(encoding="utf-8")


@pytest.mark.parametrize("talk", TALKS)
def test_the_guard_reads_every_trained_word_and_no_control_token(form, talk):
    name, chat = form
    if not renders_all(name, talk):
        pytest.skip("the template does not render all of it")
    for trained, read_text, raw in read(chat, TALKS[talk]):
        assert not raw
        assert not chat.control.search(read_text)
        assert "think>" not in read_text
        for word in ("Two and two.", "It is four.", "It rains.", "weather", "Oslo"):
            assert (word in trained) == (word in read_text)


def responses_of(chat, row, cut=None, end=False):
    """Return the responses of a row that a host has tokenized and cut."""
    made = tokenize_row({"messages": row["messages"]}, chat)
    kept = slice(None) if cut is None else slice(-cut, None) if end else slice(cut)
    made = {key: value[kept] for key, value in made.items()}
    return find_responses({**row, **made}, chat, tokens, 5)


def test_a_cut_answer_is_not_the_answer_to_an_earlier_question(form):
    """The cut answer begins like the whole of an earlier answer."""
    _, chat = form
    before = [user("Can you help me?"), answer("Sure!"), user("Tell me a story.")]
    row = {"messages": [*before, answer(STORY)]}
    length = len(tokenize_row(row, chat)["input_ids"])
    for cut in range(length - 80, length, 13):
        last = responses_of(chat, row, cut)[-1]
        assert not last.raw_context
        assert [m["content"] for m in last.request.context] == [m["content"] for m in before]
        assert STORY.startswith(last.request.text)


def test_rows_without_their_beginning_have_raw_contexts(form):
    _, chat = form
    row = {"messages": [user("Can you help me?"), answer("Sure!"), user("More?"), answer(STORY)]}
    for response in responses_of(chat, row, 60, end=True):
        assert response.raw_context
        assert response.request.text.strip() in STORY


@pytest.mark.parametrize(
    "name", ["Qwen3, SmolLM3: a block of thought in the last turn", "gpt-oss: channels"]
)
def test_an_earlier_turn_has_the_text_of_its_tokens_in_the_context(name):
    chat = chat_of(name)
    messages = [
        QUESTION,
        answer("It is four.", reasoning_content="Two and two."),
        user("And 3 + 3?"),
        answer("It is six.", reasoning_content="Three and three."),
    ]
    last = responses_of(chat, {"messages": messages})[-1]
    kept = "Two and two." in chat.render(messages)
    earlier = "Two and two.\n\nIt is four." if kept else "It is four."
    assert [m["content"] for m in last.request.context] == [
        QUESTION["content"],
        earlier,
        "And 3 + 3?",
    ]


def test_a_turn_with_only_its_end_trained_is_read_from_its_beginning():
    chat = chat_of(QWEN3)
    messages = [QUESTION, answer("It is four.", reasoning_content="Two and two.")]
    row = {"messages": messages} | tokenize_row({"messages": messages}, chat)
    close = chat.tokenizer.convert_tokens_to_ids("</think>")
    at = row["input_ids"].index(close) + 1
    row["labels"] = [-100] * at + row["labels"][at:]
    (response,) = find_responses(row, chat, tokens, 5)
    assert response.request.text == "Two and two.\n\nIt is four."
    assert response.request.ends[0] > len("Two and two.")


def test_reasoning_in_the_content_is_read_like_reasoning_in_a_field():
    chat = chat_of(QWEN3)
    inline = answer("<think>\nTwo and two.\n</think>\n\nIt is four.")
    assert read(chat, [QUESTION, inline]) == read(chat, TALKS["with thought"])


def test_several_tool_calls_are_all_read(form):
    name, chat = form
    if name not in ("Qwen 2.5", "GLM: the next role ends a turn"):
        pytest.skip("the template writes one call")
    other = {"type": "function", "function": {"name": "time", "arguments": {"zone": "CET", "n": 7}}}
    talk = [QUESTION, answer("One moment.", tool_calls=[CALL, other])]
    ((_, text, raw),) = read(chat, talk)
    assert not raw
    for word in ("One moment.", "weather", "Oslo", "time", "zone", "CET", "7"):
        assert word in text


def test_typed_content_is_read_as_its_text():
    chat = chat_of("Gemma: contents are trimmed, the system turn joins the question")
    typed = [
        {"role": m["role"], "content": [{"type": "text", "text": m["content"]}]}
        for m in TALKS["an answer"]
    ]
    assert read(chat, typed) == read(chat, TALKS["an answer"])


def test_a_moved_system_turn_is_part_of_the_context():
    chat = chat_of("Gemma: contents are trimmed, the system turn joins the question")
    messages = [{"role": "system", "content": "Be brief."}, QUESTION, answer("Four.")]
    (response,) = responses_of(chat, {"messages": messages})
    assert not response.raw_context
    assert [m["role"] for m in response.request.context] == ["system", "user"]


def test_rendered_prompts_are_read_as_messages_or_raw(form):
    name, chat = form
    messages = [user("Can you help me?"), answer("Sure!"), user("Tell me a story.")]
    if "add_generation_prompt" not in FORMS[name][3]:
        pytest.skip("the template does not open answers")
    prompt = chat.render(messages, add_generation_prompt=True)
    row = {"prompt": prompt, "completion": STORY}
    (response,) = find_responses(row | tokenize_row(row, chat), chat, tokens, 5)
    context_texts = [m["content"] for m in response.request.context]
    assert response.raw_context or context_texts == [m["content"] for m in messages]
    if name.startswith(("Qwen", "Llama", "Cohere", "Phi")):
        assert not response.raw_context


def test_messages_that_lack_a_question_have_raw_contexts():
    """The tokens have a question that the messages lack."""
    chat = chat_of("Qwen 2.5")
    messages = [user("Hello?"), answer("Yes."), user("Where is it?"), answer("Over the hill.")]
    made = tokenize_row({"messages": messages}, chat)
    row = {"messages": [messages[0], messages[3]], **made}
    assert all(r.raw_context for r in find_responses(row, chat, tokens, 5))


words = st.sampled_from(
    ["Sure!", "ok", " ", "\n", "é", "👩‍👩‍👧", "<think>", "</think>", "assistant", "{}", "a b"]
)
contents = st.lists(words, min_size=1, max_size=5).map("".join)


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(list(FORMS)), st.lists(contents, min_size=2, max_size=6), st.integers(0, 60))
@example("Qwen 2.5", ["ok", "ok", "ok", "ok"], 0)
def test_every_run_has_the_messages_before_its_answer_as_context(name, texts, cut):
    """Compared with counting: the k-th run is the k-th answer."""
    chat = CHATS.setdefault(name, chat_of(name))
    roles = ["user", "assistant"] * 3
    messages = [{"role": r, "content": c} for r, c in zip(roles, texts, strict=False)]
    try:
        made = tokenize_row({"messages": messages}, chat)
    except ValueError:
        return  # the template leaves text out
    kept = max(1, len(made["input_ids"]) - cut)
    row = {"messages": messages} | {key: value[:kept] for key, value in made.items()}
    answers = [k for k, m in enumerate(messages) if m["role"] == "assistant"]
    for k, response in zip(answers, find_responses(row, chat, tokens, 5), strict=False):
        if response.raw_context:
            continue
        assert len(response.request.context) == k
        questions = [m["content"] for m in response.request.context if m["role"] == "user"]
        assert questions == [m["content"] for m in messages[:k] if m["role"] == "user"]
    assert len(trained_runs(row["labels"])) <= len(answers)
