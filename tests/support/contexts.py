"""The contexts that a guard reads before each response of a row."""

from star_dss_plugin.data.responses import find_responses
from star_dss_plugin.data.templates.chat import ChatTokenizer
from star_dss_plugin.data.tokenization import tokenize_row
from star_dss_plugin.segmenters import tokens


def contexts(row, tokenizer, chat_template=None):
    """Return the context of each response: "raw", or role and content of its messages."""
    found = find_responses(row, ChatTokenizer(tokenizer, chat_template), tokens, 5)
    return [
        "raw" if r.raw_context else [(m["role"], m["content"]) for m in r.request.context]
        for r in found
    ]


def before_each_answer(messages, answers=None):
    """Return role and content of the messages before each answer, or before these answers."""
    places = [i for i, m in enumerate(messages) if m["role"] == "assistant"]
    return [
        [(m["role"], m["content"]) for m in messages[:i]]
        for i in (places if answers is None else [places[n] for n in answers])
    ]


def labelled(messages, tokenizer, chat_template=None):
    """Return a row of messages with its tokens and labels."""
    row = {"messages": messages}
    return row | tokenize_row(row, ChatTokenizer(tokenizer, chat_template))
