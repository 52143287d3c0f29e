"""All chat templates of Axolotl: the guard reads the messages as in `star-dss score`, or tokens."""

import re

import pytest

pytest.importorskip("axolotl", reason="needs Axolotl: make test-axolotl")

from axolotl.prompt_strategies.chat_template import load
from axolotl.utils.chat_templates.base import _CHAT_TEMPLATES
from axolotl.utils.dict import DictDefault
from axolotl_runs import _light_runs  # noqa: F401
from jinja2 import TemplateError
from support.template_conversations import TALKS, WITH_CALLS, tokenizer_for

from star_dss_plugin.data.responses import find_responses
from star_dss_plugin.data.templates.chat import ChatTokenizer
from star_dss_plugin.data.tokenization import tokenize_row
from star_dss_plugin.errors import DataError
from star_dss_plugin.segmenters import tokens

SOURCES = {name: text for name, text in _CHAT_TEMPLATES.items() if isinstance(text, str)}
WAYS = ({}, {"train_on_eos": "last"}, {"split_thinking": True})
SAID = re.compile(
    r"apple|Sure!|dragon|ok\b|four\.|six\.|Two and two\.|Three and three\.|Let me look\.|Oslo|Rome"
)


def rows_of(tokenizer, source, talk):
    """Return the tokens and labels that Axolotl makes of a conversation, for each way of `WAYS`."""
    config = DictDefault(chat_template="jinja", chat_template_jinja=source, sequence_len=4096)
    fields = {"role": "role", "content": "content"}
    made = []
    for way in WAYS:
        data = DictDefault(type="chat_template", message_property_mappings=fields, **way)
        try:
            row = load(tokenizer, config, ds_cfg=data).tokenize_prompt({"messages": list(talk)})
        except (TemplateError, TypeError):  # a template may refuse roles, orders of turns and calls
            continue
        row = {name: list(row[name]) for name in ("input_ids", "labels")}
        if row not in made and any(label != -100 for label in row["labels"]):
            made.append(row)
    return made


@pytest.mark.parametrize("name", SOURCES)
def test_the_guard_reads_the_words_that_are_trained(name):
    tokenizer = tokenizer_for(SOURCES[name])
    chat = ChatTokenizer(tokenizer)
    read = set()
    for kind, talk in {**TALKS, "calls": WITH_CALLS}.items():
        for row in rows_of(tokenizer, SOURCES[name], talk):
            found = find_responses(row, chat, tokens, 5)
            if found:
                read.add(kind)
            for response in found:
                check_words(tokenizer, talk, row["input_ids"], response)
            if talk is not TALKS["control words"]:  # the forged turn's tokens are an answer
                check_against_messages(chat, talk, row["input_ids"], found)
    assert read >= {"one turn", "turns", "the same answers"}


def check_words(tokenizer, talk, ids, response):
    """Check that the guard reads all trained words, and the messages before them."""
    trained = tokenizer.decode(ids[response.start : response.end])
    before = tokenizer.decode(ids[: response.start])
    said, context = response.request.text, response.request.context
    assert SAID.findall(said) == SAID.findall(trained)
    if response.raw_context:  # nothing is left out
        assert "".join(message["content"] for message in context) == before
        return
    for text in (said, *(message["content"] for message in context)):
        assert "think>" not in text
        assert not set(tokenizer.all_special_tokens) & set(re.findall(r"<\S+?>|\[\S+?\]", text))
    for message in talk:
        if message["role"] in ("user", "system") and talk is not TALKS["control words"]:
            # A template may write a system turn into the next question.
            read = any(message["content"] in one["content"] for one in context)
            assert read == (message["content"] in before)


def check_against_messages(chat, talk, ids, found):
    """Check that the guard reads what `star-dss score` reads, if the tokens are the same."""
    try:
        made = tokenize_row({"messages": talk}, chat)
    except DataError:
        return
    if made["input_ids"] != ids:
        return
    direct = find_responses({"messages": talk, **made}, chat, tokens, 5)
    spans = {(one.start, one.end): one for one in direct if not one.raw_context}
    for one in found:
        same = spans.get((one.start, one.end))
        if same is not None and not one.raw_context:
            assert same.request.text == one.request.text
            assert words(same.request.context) == words(one.request.context)


def words(context):
    """Return all words, sorted, because templates may move a system turn."""
    return sorted(" ".join(message["content"] for message in context).split())
