"""The chat templates that TRL ships: labels are TRL's, and the guard reads all trained words."""

import re
from pathlib import Path

import pytest
import trl
from support.template_conversations import TALKS, WITH_CALLS, tokenizer_for

from star_dss_plugin.data.context import RowReader
from star_dss_plugin.data.responses import find_responses, responses_in
from star_dss_plugin.data.templates.chat import ChatTokenizer
from star_dss_plugin.data.templates.inverse import TemplateInverse
from star_dss_plugin.data.templates.tokenized import trained_runs
from star_dss_plugin.data.tokenization import read_row, tokenize_row
from star_dss_plugin.errors import DataError
from star_dss_plugin.segmenters import tokens

SAID = re.compile(r"apple|Sure!|dragon|ok\b|four\.|six\.|Two and two\.|Three and three\.|Oslo")
TEMPLATES = sorted((Path(trl.__file__).parent / "chat_templates").glob("*.jinja"))


@pytest.fixture(scope="module", params=TEMPLATES, ids=lambda path: path.stem)
def chat(request):
    source = request.param.read_text(encoding="utf-8")
    return ChatTokenizer(tokenizer_for(source))


def tokenized_rows(chat, of_talk, **how):
    """Return conversations with their rows and tokens, without those that the template refuses."""
    made = []
    for talk in TALKS.values():
        row = of_talk(talk)
        try:
            made.append((talk, row, tokenize_row(row, chat, **how)))
        except DataError as error:
            why = str(error)
    if not made:
        pytest.skip(why)
    return made


def test_labels_are_those_of_trl(chat):
    """With assistant_only_loss TRL trains the tokens that the template marks."""
    if "generation %}" not in chat.source:
        pytest.skip("the template marks nothing")
    for talk, _, made in tokenized_rows(
        chat, lambda talk: {"messages": talk}, assistant_only_loss=True
    ):
        theirs = chat.tokenizer.apply_chat_template(
            talk, return_dict=True, return_assistant_tokens_mask=True
        )
        trained = zip(theirs["input_ids"], theirs["assistant_masks"], strict=True)
        assert made["input_ids"] == theirs["input_ids"]
        assert made["labels"] == [token if marked else -100 for token, marked in trained]


def test_completions_are_those_of_trl(chat):
    for _, row, made in tokenized_rows(
        chat, lambda talk: {"prompt": talk[:-1], "completion": talk[-1:]}
    ):
        check_completion(chat, made, row["prompt"], row["completion"][0])


def test_marked_completions_are_those_of_trl(chat):
    """With assistant_only_loss TRL trains what the template marks behind the prompt."""
    if "generation %}" not in chat.source:
        pytest.skip("the template marks nothing")
    rows = tokenized_rows(
        chat,
        lambda talk: {"prompt": talk[:-1], "completion": talk[-1:]},
        assistant_only_loss=True,
    )
    for talk, row, made in rows:
        theirs = chat.tokenizer.apply_chat_template(
            talk, return_dict=True, return_assistant_tokens_mask=True
        )
        whole, marks = theirs["input_ids"], theirs["assistant_masks"]
        first = first_after_prompt(chat, row["prompt"], whole)
        assert made["input_ids"] == whole
        assert made["labels"] == [
            token if marked and n >= first else -100
            for n, (token, marked) in enumerate(zip(whole, marks, strict=True))
        ]


def check_completion(chat, made, prompt, last):
    """Check that the tokens after the common prefix of both renderings are trained, as by TRL."""
    whole = chat.tokenizer.apply_chat_template([*prompt, last], return_dict=True)["input_ids"]
    first = first_after_prompt(chat, prompt, whole)
    assert made["input_ids"] == whole
    assert made["labels"] == [-100] * first + whole[first:]


def first_after_prompt(chat, prompt, whole):
    """Return the index of the first token that a conversation does not share with its prompt."""
    asked = chat.tokenizer.apply_chat_template(
        prompt, add_generation_prompt=True, return_dict=True
    )["input_ids"]
    pairs = zip(asked, whole, strict=False)
    return next((n for n, (a, b) in enumerate(pairs) if a != b), min(len(asked), len(whole)))


@pytest.mark.parametrize("cut", [0, 6])
def test_the_guard_reads_words_without_template_text(chat, cut):
    for talk, row, made in tokenized_rows(chat, lambda talk: {"messages": talk}):
        check_words(chat, talk, row, made, cut)


def check_words(chat, talk, row, made, cut):
    """Check that the guard reads each trained word, and each question before it."""
    kept = slice(len(made["input_ids"]) - cut)
    made = {name: column[kept] for name, column in made.items()}
    found = find_responses({**row, **made}, chat, tokens, 5)
    ids = made["input_ids"]
    reader = RowReader(chat, ids, made, read_row(row, chat))
    assert found == responses_in(trained_runs(made["labels"]), reader, tokens, 5)
    for response in found:
        trained = chat.tokenizer.decode(ids[response.start : response.end])
        said = response.request.text
        if response.raw_context:  # no word of the response is left
            # Some templates move a late system turn to the beginning.
            moved = talk is TALKS["a late system turn"]
            assert moved or not re.search("apple|Sure|ok|four|six", trained)
            continue
        assert not chat.control.search(said)
        assert "think>" not in said
        before = chat.tokenizer.decode(ids[: response.start])
        context = [message["content"] for message in response.request.context]
        for word in ("apple", "Sure!", "dragon", "ok", "four.", "six.", "Two and two."):
            assert (word in trained) <= (word in said)
        for message in talk:
            if message["role"] == "user":
                assert (message["content"] in before) == (message["content"] in context)


def test_the_guard_reads_a_rendered_completion_without_template_text(chat):
    why, words = "no prompt is a prefix of its conversation, or the template writes no contents", []
    for talk in (*TALKS.values(), WITH_CALLS):
        try:
            text = chat.render(talk)
            prompt = chat.render(talk[:-1], add_generation_prompt=True)
        except DataError as error:
            why = str(error)
            continue
        if not text.startswith(prompt):
            continue
        row = {"prompt": prompt, "completion": text[len(prompt) :]}
        made = tokenize_row(row, chat)
        found = find_responses({**row, **made}, chat, tokens, 5)
        assert len(found) == 1
        said = found[0].request.text
        assert SAID.findall(said) == SAID.findall(row["completion"])
        words += SAID.findall(said)
        if not found[0].raw_context:
            assert not chat.control.search(said)
            assert "think>" not in said
    if not words:
        pytest.skip(why)


# Templates that write calls as JSON, as XML (Qwen3.5, GLM, Nemotron) or in channels.
CALLING = re.compile(r"(qwen(2_5|3|3_5_\w*think|3_6|3_instruct_2507|3_vl)|glm4moe|nemotron_\w+)")


def test_tool_calls_are_found_again_from_tokens(chat):
    """A template that cannot be inverted gives None, or messages with the same tokens."""
    talk = WITH_CALLS
    inverse = TemplateInverse(chat.tokenizer, chat.source)
    try:
        ids = chat.encode(chat.render(talk)).ids
    except DataError as error:
        pytest.skip(str(error))
    found = inverse.messages_of_tokens(ids)
    if found is not None:
        again = chat.encode(chat.render(found)).ids
        assert again == ids
    if CALLING.fullmatch(Path(next(t for t in TEMPLATES if t.read_text() == chat.source)).stem):
        assert found == talk
