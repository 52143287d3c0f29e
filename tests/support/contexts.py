"""The contexts that a guard reads before each response of a row."""

from star_dss_plugin.data.responses import find_responses
from star_dss_plugin.data.templates.chat import ChatTokenizer
from star_dss_plugin.data.tokenization import tokenize_row
from star_dss_plugin.segmenters import tokens


def contexts(row, tokenizer, chat_template=None):
    found = find_responses(row, ChatTokenizer(tokenizer, chat_template), tokens, 5)
    return [
        "raw" if r.raw_context else [(m["role"], m["content"]) for m in r.request.context]
        for r in found
    ]


def before_each_answer(messages, answers=None):
    spoken = [i for i, m in enumerate(messages) if m["role"] == "assistant"]
    return [
        [(m["role"], m["content"]) for m in messages[:i]]
        for i in (spoken if answers is None else [spoken[n] for n in answers])
    ]


def labelled(messages, tokenizer, chat_template=None):
    row = {"messages": messages}
    return row | tokenize_row(row, ChatTokenizer(tokenizer, chat_template))
