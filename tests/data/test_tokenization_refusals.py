"""Rows and templates in which the assistant's tokens cannot be found are refused."""

import copy
from contextlib import contextmanager

import pytest
from support.conversations import CONVERSATIONS, GENERATION, chat, spoken

from star_dss_plugin import DataError
from star_dss_plugin.data.host_labels import assistant_labels, needs_assistant_labels
from star_dss_plugin.data.templates.chat import ChatTokenizer
from star_dss_plugin.data.tokenization import tokenize_row

# Rows that need labels


@pytest.mark.parametrize(
    ("messages", "labels", "needed"),
    [
        (chat("u:hi", "a:ok"), [1, 2, 3], True),
        (chat("u:hi", "a:ok"), [-100, 2, 3], False),
        (chat("a:ok"), [1, 2, 3], False),
        (None, [1, 2, 3], False),
    ],
)
def test_a_conversation_needs_labels_where_all_of_it_is_trained(messages, labels, needed):
    assert needs_assistant_labels({"messages": messages, "labels": labels}) is needed


@pytest.mark.parametrize(
    ("completion", "labels", "needed"),
    [
        (chat("a:ok"), [-100, 2, 3], False),
        (chat("a:ok"), [1, 2, 3], True),  # the prompt is trained too
        (chat("a:ok", "u:hi", "a:ok"), [-100, 2, 3, 4], True),
        (chat("a:ok", "u:hi", "a:ok"), [1, 2, 3, 4], True),
        # the labels of assistant_only_loss are complete
        (chat("a:ok", "u:hi", "a:ok"), [-100, 2, -100, 4], False),
        (chat("a:ok", "t:42", "a:ok"), [-100, -100, -100], False),
        ("ok", [1, 2, 3], True),
        ("ok", [-100, 2, 3], False),
    ],
)
def test_a_completion_needs_labels_where_several_turns_are_trained(completion, labels, needed):
    prompt = "hi" if isinstance(completion, str) else chat("u:hi")
    row = {"prompt": prompt, "completion": completion, "labels": labels}
    assert needs_assistant_labels(row) is needed


# Rows and templates


@contextmanager
def refuses(message):
    """Check that a DataError with this message is raised."""
    with pytest.raises(DataError, match=message):
        yield


TOOL_CALL = {"type": "function", "function": {"name": "sum", "arguments": {"a": 1}}}
TOOLS_TEMPLATE = (
    "{%- for m in messages %}{{- '<|im_start|>' + m.role + '\n' + (m.content or '') }}"
    "{%- for call in m.tool_calls or [] %}"
    "{{- '<tool_call>' + call.function.name + '</tool_call>' }}{%- endfor %}"
    "{{- '<|im_end|>\n' }}{%- endfor %}"
)
THINKING_TEMPLATE = (
    "{%- for m in messages %}{{- '<|im_start|>' + m.role + '\n' }}"
    "{%- if m.reasoning_content %}{{- '<think>' + m.reasoning_content + '</think>' }}{%- endif %}"
    "{{- m.content + '<|im_end|>\n' }}{%- endfor %}"
)


@pytest.mark.parametrize("content", [None, "", "one moment"])
def test_tool_calls_are_trained_and_read(tokenizer, content):
    messages = chat("u:hi", "a:x", "t:42", "a:it is 42")
    messages[1] = {"role": "assistant", "content": content, "tool_calls": [TOOL_CALL]}
    row = {"messages": messages}
    calling = ChatTokenizer(tokenizer, TOOLS_TEMPLATE)
    made = tokenize_row(row, calling)
    expected = f"{content or ''}<tool_call>sum</tool_call><|im_end|>"
    assert spoken(made, tokenizer) == [expected, "it is 42<|im_end|>"]
    assert assistant_labels(row | made, calling) == made["labels"]


def test_reasoning_is_trained(tokenizer):
    messages = chat("u:hi", "a:ok")
    messages[1]["reasoning_content"] = "hm"
    made = tokenize_row({"messages": messages}, ChatTokenizer(tokenizer, THINKING_TEMPLATE))
    assert spoken(made, tokenizer) == ["<think>hm</think>ok<|im_end|>"]


@pytest.mark.parametrize("content", ["m.content|upper", "m.content|tojson"])
def test_rewritten_answers_are_refused_unless_the_template_marks_them(tokenizer, content):
    marking = ChatTokenizer(tokenizer, GENERATION.replace("m.content", content))
    row = {"messages": chat("u:hi", 'a:hm</think>"ok"')}
    made = tokenize_row(row, marking)
    (answer,) = spoken(made, tokenizer)
    assert answer.lower().replace("\\", "").strip('"') in (
        'hm</think>"ok"<|im_end|>',
        'hm</think>"ok""<|im_end|>',
    )
    plain = marking.source.replace("{%- generation %}", "").replace("{%- endgeneration %}", "")
    with refuses("does not render the assistant's turns as plain text"):
        tokenize_row(row, ChatTokenizer(tokenizer, plain))


def test_text_that_the_template_leaves_out_is_not_trained(tokenizer):
    template = GENERATION.replace("m.content", "m.content.split('</think>')[-1]")
    row = {"messages": chat("u:hi", 'a:hm</think>"ok"')}
    made = tokenize_row(row, ChatTokenizer(tokenizer, template))
    assert spoken(made, tokenizer) == ['"ok"<|im_end|>']


def test_answers_that_the_template_drops_are_refused(tokenizer):
    template = TOOLS_TEMPLATE.replace("in messages", "in messages[-2:]")
    with refuses("does not render the assistant's turns as plain text"):
        tokenize_row(
            {"messages": chat("u:hi", "a:no", "u:hi", "a:ok")}, ChatTokenizer(tokenizer, template)
        )


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"prompt": "hi"},
            r"columns \['prompt'\].*'messages', 'prompt' and 'completion', or 'text'",
        ),
        ({"completion": "hi", "question": "?"}, r"\['completion', 'question'\]"),
        ({"messages": None, "text": None}, r"columns \[\]"),
        ({}, r"columns \[\]"),
        ({"messages": "hello"}, "'messages' is a str"),
        ({"prompt": "hi", "completion": chat("a:ok")}, "'prompt' is a str and 'completion' a list"),
        ({"prompt": chat("u:hi"), "completion": "ok"}, "'prompt' is a list and 'completion' a str"),
        ({"prompt": 5, "completion": 5}, "'prompt' is a int"),
        ({"text": 5}, "'text' is a int"),
        ({"text": "half \ud800 of it"}, "half a character.*half .ud800 of it"),
        ({"messages": []}, "no messages"),
        ({"messages": ["hi"]}, r"messages\[0\] is a str"),
        ({"messages": [None]}, r"messages\[0\] is a NoneType"),
        ({"messages": [{"content": "hi"}]}, r"messages\[0\].role is NoneType None"),
        ({"messages": [*chat("u:hi"), {"role": 5, "content": ""}]}, r"messages\[1\].role is int 5"),
        ({"messages": [{"role": "user"}]}, r"messages\[0\] \(user\) has no content"),
        ({"prompt": [{"role": "system"}], "completion": chat("a:hi")}, r"prompt\[0\] \(system"),
        ({"messages": [{"role": "user", "content": 5}]}, r"messages\[0\].content is int 5"),
        ({"messages": [{"role": "user", "content": ["hi"]}]}, r"content\[0\] is str 'hi'"),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": 5}]}]},
            r"messages\[0\].content\[0\] is dict",
        ),
        ({"messages": chat("u:hi", "a:half \udc00")}, "half a character"),
        ({"messages": chat("u:hi"), "tools": "{nonsense"}, "tools is a text that is not JSON"),
        ({"messages": chat("u:hi"), "tools": "[" * 5000}, "tools is a text that is not JSON"),
        ({"messages": chat("u:hi"), "chat_template_kwargs": "x"}, "chat_template_kwargs is str"),
        ({"messages": chat("u:hi"), "chat_template_kwargs": {"padding": True}}, "brings padding"),
        ({"messages": chat("u:hi"), "chat_template_kwargs": {"messages": 1}}, "cannot render"),
        (
            {
                "prompt": chat("u:hi"),
                "completion": chat("a:ok"),
                "chat_template_kwargs": {"add_generation_prompt": True},
            },
            "brings add_generation_prompt",
        ),
    ],
)
def test_invalid_rows_are_refused(tokenizer, row, message):
    with refuses(message):
        tokenize_row(row, ChatTokenizer(tokenizer))


def test_columns_without_a_value_are_ignored(tokenizer):
    row = {"messages": None, "prompt": None, "completion": None, "text": "hello"}
    assert tokenize_row(row, ChatTokenizer(tokenizer)) == tokenize_row(
        {"text": "hello"}, ChatTokenizer(tokenizer)
    )


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (None, "cannot render the row's messages.*chat_template"),
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ messages[0].content + none }}", "cannot render the row's messages"),
        ("{% for", "cannot render the row's messages"),
    ],
)
def test_failing_templates_are_refused(tokenizer, template, message):
    bare = copy.deepcopy(tokenizer)
    bare.chat_template = template
    with refuses(message):
        tokenize_row({"messages": chat("u:hi", "a:ok")}, ChatTokenizer(bare))


def test_tokens_of_another_template_are_refused(tokenizer):
    row = {"messages": CONVERSATIONS["two turns"]}
    row |= tokenize_row(row, ChatTokenizer(tokenizer))
    row["input_ids"] = [*row["input_ids"][:5], 7, *row["input_ids"][6:]]
    with refuses("not those of its chat template"):
        assistant_labels(row, ChatTokenizer(tokenizer))
    with refuses("not those of its chat template"):
        assistant_labels(row | {"input_ids": row["input_ids"] * 2}, ChatTokenizer(tokenizer))


def test_a_tokenizer_without_an_eos_token_adds_none(tokenizer):
    endless = copy.deepcopy(tokenizer)
    endless.eos_token = None
    assert (
        endless.decode(tokenize_row({"text": "hello"}, ChatTokenizer(endless))["input_ids"])
        == "hello"
    )
