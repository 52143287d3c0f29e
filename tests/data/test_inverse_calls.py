"""Tool calls are recovered from the tokens of a rendered conversation, or are left as text."""

import json
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.template_conversations import user
from template_forms import FORMS, chat_of

from star_dss_plugin.data.templates.inverse import TemplateInverse
from star_dss_plugin.data.templates.probes import pieces_of, probe_conversation
from star_dss_plugin.data.templates.tool_calls import call_spans

CHATML = "Qwen3, SmolLM3: a block of thought in the last turn"
_OPEN = "{%- for m in messages %}{{- '<|im_start|>' + m.role + '\n' + (m.content or '') }}"
_CLOSE = (
    "{{- '<|im_end|>\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"
)
_EACH = "{%- for call in m.tool_calls or [] %}{%- set f = call.function %}"
# Templates of other forms than `FORMS` has, for the tokens of chatml.
OTHERS = {
    "XML": _OPEN
    + _EACH
    + "{{- '\n<tool_call>\n<function=' + f.name + '>\n' }}{%- for k, v in f.arguments.items() %}"
    "{{- '<parameter=' + k + '>\n' + (v if v is string else v | tojson) + '\n</parameter>\n' }}"
    "{%- endfor %}{{- '</function>\n</tool_call>' }}{%- endfor %}" + _CLOSE,
    "JSON text, with ids": _OPEN
    + _EACH
    + "{%- if call.id | length != 9 %}{{ raise_exception('nine characters') }}{%- endif %}"
    '{{- \'\n<tool_call>{"name": "\' + f.name + \'", "arguments": \' + f.arguments }}'
    "{{- ', \"id\": \"' + call.id + '\"}</tool_call>' }}{%- endfor %}"
    "{%- if m.role == 'tool' %}{{- ' of ' + m.tool_call_id + ' by ' + m.name }}{%- endif %}"
    + _CLOSE,
    "Python": _OPEN
    + "{%- if m.tool_calls %}{{- '[' }}{%- for call in m.tool_calls %}{%- set f = call.function %}"
    "{{- f.name + '(' }}{%- for k, v in f.arguments.items() %}{{- k + '=' }}"
    '{%- if v is string %}{{- "\'" + v + "\'" }}{%- else %}{{- v | tojson }}{%- endif %}'
    "{{- '' if loop.last else ', ' }}{%- endfor %}{{- ')' if loop.last else '), ' }}"
    "{%- endfor %}{{- ']' }}{%- endif %}" + _CLOSE,
}
_INVERSES = {}


def inverse_of(name):
    """Return the inverse of a template, which is made once."""
    if name not in _INVERSES:
        chat = chat_of(CHATML if name in OTHERS else name)
        _INVERSES[name] = TemplateInverse(chat.tokenizer, OTHERS.get(name, chat.chat_template))
    return _INVERSES[name]


def answer(text, *calls, text_arguments=False, **more):
    """Return an answer with calls of tools."""
    made = []
    for n, (name, arguments) in enumerate(calls):
        given = json.dumps(arguments) if text_arguments else arguments
        called = {"name": name, "arguments": given}
        made.append({"type": "function", "id": f"number_{n:02d}", "function": called})
    return {
        "role": "assistant",
        "content": text,
        **more,
        **({"tool_calls": made} if made else {}),
    }


def results(*texts, name="weather"):
    """Return the results of tools."""
    return [
        {"role": "tool", "content": text, "tool_call_id": f"number_{n:02d}", "name": name}
        for n, text in enumerate(texts)
    ]


OSLO, ROME = ("weather", {"city": "Oslo"}), ("weather", {"city": "Rome", "when": "in May\nor so"})


def talks(as_text=False):
    """Return conversations with calls of tools."""
    options = {"text_arguments": as_text}
    return {
        "one": [user("Rain?"), answer("", OSLO, **options), *results("wet"), answer("It rains.")],
        "two": [
            *(user("Rain?"), answer("", OSLO, ROME, **options), *results("wet", "dry")),
            answer("Only in Oslo."),
        ],
        "said, and two": [
            *(user("Rain?"), answer("Let me look.", ROME, OSLO, **options), *results("dry", "wet")),
            answer("Only in Oslo."),
        ],
        "no arguments": [
            *(user("Rain?"), answer("", ("weather", {}), OSLO, **options), *results("dry", "wet")),
            answer("Only in Oslo."),
        ],
        "one after the other": [
            *(user("Rain?"), answer("", OSLO, **options), *results("wet")),
            *(answer("", ROME, **options), *results("dry"), answer("Only in Oslo.")),
        ],
        "later": [
            *(user("Hi"), answer("Hello."), user("Rain?"), answer("", OSLO, ROME, **options)),
            *(*results("wet", "dry"), answer("Only in Oslo."), user("Thanks"), answer("Fine.")),
        ],
        "last": [user("Rain?"), answer("", OSLO, ROME, **options)],
    }


def contents(messages):
    """Return role, text, reasoning and calls of each message, without ids, which may be lost."""
    shown = []
    for m in messages:
        calls = []
        for call in m.get("tool_calls", ()):
            arguments = call["function"]["arguments"]
            known = json.loads(arguments) if isinstance(arguments, str) else arguments
            calls.append((call["function"]["name"], known))
        shown.append((m["role"], m["content"], m.get("reasoning_content"), calls))
    return shown


MANY = (
    *("XML", "JSON text, with ids", "Qwen 2.5", CHATML),
    *("GLM: the next role ends a turn", "Nemotron: thought in every turn, begun by the prompt"),
)


@pytest.mark.parametrize("talk", talks())
@pytest.mark.parametrize("name", MANY)
def test_tool_calls_are_recovered(name, talk):
    inverse = inverse_of(name)
    known = talks(as_text=name.startswith("JSON text"))[talk]
    ids = inverse.chat.encode(inverse.chat.render(known)).ids
    found = inverse.messages_of_tokens(ids)
    assert contents(found) == contents(known)
    assert inverse.chat.encode(inverse.chat.render(found)).ids == ids


@pytest.mark.parametrize("name", [CHATML, "GLM: the next role ends a turn"])
def test_reasoning_before_calls_is_recovered(name):
    inverse = inverse_of(name)
    known = [
        *(user("Rain?"), answer("", OSLO, ROME, reasoning_content="Both, then.")),
        *(*results("wet", "dry"), answer("Only in Oslo.", reasoning_content="I see.")),
    ]
    ids = inverse.chat.encode(inverse.chat.render(known)).ids
    assert contents(inverse.messages_of_tokens(ids)) == contents(known)


def test_rendered_ids_and_names_are_recovered():
    known = talks(as_text=True)["two"]
    inverse = inverse_of("JSON text, with ids")
    assert inverse.messages_of_tokens(inverse.chat.encode(inverse.chat.render(known)).ids) == known


def test_calls_with_unquoted_numbers_are_left_as_text():
    """This template writes numbers without quotes, so that their end cannot be found."""
    inverse = inverse_of("Python")
    strings = [user("Rain?"), answer("", OSLO, OSLO), *results("wet", "wet"), answer("It rains.")]
    ids = inverse.chat.encode(inverse.chat.render(strings)).ids
    assert contents(inverse.messages_of_tokens(ids)) == contents(strings)
    numbers = [user("Rain?"), answer("", ("weather", {"days": 2, "city": "Oslo"}))]
    known = [*numbers, *results("wet"), answer("It rains.")]
    found = inverse.messages_of_tokens(inverse.chat.encode(inverse.chat.render(known)).ids)
    words = "[weather(days=2, city='Oslo')]"
    assert [m["content"] for m in found] == ["Rain?", words, "wet", "It rains."]


texts = st.text(st.sampled_from("ab \n<>/{}\"'=(),é|"), max_size=12) | st.sampled_from(
    ["</parameter>", "</tool_call>", "<|im_end|>", "\n</parameter>\n<parameter=x>\n", '"}', "2"]
)


@settings(max_examples=150, deadline=None)
@given(
    st.sampled_from(MANY), st.dictionaries(st.sampled_from("ab"), texts), texts, texts, st.data()
)
def test_recovered_calls_render_to_the_same_tokens(name, arguments, result, question, data):
    inverse = inverse_of(name)
    options = {"text_arguments": name.startswith("JSON text")}
    known = [
        *(
            user(question),
            answer("", ("weather", arguments), OSLO, **options),
            *results(result, "wet"),
        ),
        answer("Only in Oslo."),
    ]
    ids = inverse.chat.encode(inverse.chat.render(known)).ids
    found = inverse.messages_of_tokens(ids)
    if found is not None:
        assert inverse.chat.encode(inverse.chat.render(found)).ids == ids
        assert found[-1]["content"].endswith("Only in Oslo.")
    cut = data.draw(st.integers(1, len(ids)))
    part = inverse.messages_of_tokens(ids[:cut])
    for call in (c for m in part or () for c in m.get("tool_calls", ())):
        assert not inverse.chat.added.search(json.dumps(call, ensure_ascii=False))


# The inverse of DeepSeek-R1's template is not reliable; Gemma's gives up at two results in a row.
NOT_RECOVERED = {
    "DeepSeek-R1: thought is left out": tuple(talks()),
    "Gemma: contents are trimmed, the system turn joins the question": (
        *("two", "said, and two", "no arguments", "later"),
    ),
}
FIRST_CALL_IS_RENDERED = (
    *("gpt-oss: channels", "Llama 3: headers"),
    "Mistral: the question's end is the answer's beginning",
)


@pytest.mark.parametrize("name", [n for n in FORMS if n not in MANY])
def test_messages_of_other_templates_are_recovered_or_none_are(name):
    inverse = inverse_of(name)
    for talk, known in talks().items():
        ids = inverse.chat.encode(inverse.chat.render(known)).ids
        found = inverse.messages_of_tokens(ids)
        if talk in NOT_RECOVERED.get(name, ()):
            assert found is None, talk
            continue
        assert inverse.chat.encode(inverse.chat.render(found)).ids == ids
        assert contents(found)[0] == contents(known)[0]
        if name in FIRST_CALL_IS_RENDERED and talk in ("one", "one after the other"):
            assert contents(found) == contents(known)


DEPTH = 200_000  # deeper than any Python reads JSON
DEEP = '{"a": ' + "[" * DEPTH + "1" + "]" * DEPTH + "}"


@pytest.mark.parametrize("name", ["JSON text, with ids", "Qwen 2.5", "Llama 3: headers"])
def test_too_deeply_nested_arguments_are_left_as_text(name):
    inverse = inverse_of(name)
    arguments = '{"a": "b"}' if name.startswith("JSON text") else {"a": "b"}
    known = [user("Rain?"), answer("")]
    called = {"name": "weather", "arguments": arguments}
    known[1]["tool_calls"] = [{"type": "function", "id": "number_00", "function": called}]
    rendered = inverse.chat.render(known)
    assert contents(inverse.messages(rendered)) == contents(known)
    found = inverse.messages(rendered.replace('{"a": "b"}', DEEP))
    assert "tool_calls" not in found[1]
    assert DEEP in found[1]["content"]


@pytest.mark.parametrize("depth", [3000, DEPTH])  # Python 3.12 and newer read the first
def test_too_deeply_nested_arguments_end_before_the_next_control_token(depth):
    deep = '{"a": ' + "[" * depth + "1" + "]" * depth + "}"
    text = f"<c>weather {json.dumps(deep)}</c>"
    place = (0, text.index("weather"), text.index("weather") + len("weather"), len(text))
    ((start, end),) = call_spans(text, place, deep, re.compile("</?c>"))
    assert text[start:end] == f"weather {json.dumps(deep)}"


def test_probe_values_that_are_rendered_in_another_order_are_not_used():
    made, slots = probe_conversation(
        ["user", "thinking+answer"], "thinking", as_text=False, linked=False
    )
    marks = [made[0]["content"], made[1]["thinking"], made[1]["content"]]
    assert pieces_of("<{}|{}|{}>".format(*marks), slots) == (slots, ["<", "|", "|", ">"])
    for wrong in ("{0}|{2}", "{0}|{2}|{1}", "{0}|{0}|{1}|{2}"):
        assert pieces_of(wrong.format(*marks), slots) is None


@pytest.mark.parametrize("name", ["XML", "Llama 3: headers"])
def test_two_answers_in_a_row_are_recovered(name):
    inverse = inverse_of(name)
    known = [user("Help me?"), answer(""), answer("Sure!"), user("So?"), answer("An apple.")]
    assert inverse.messages_of_tokens(inverse.chat.encode(inverse.chat.render(known)).ids) == known


def test_text_that_contains_another_answer_is_not_one_turn():
    inverse = inverse_of("XML")
    text = (
        "<|im_start|>user\nRain?<|im_end|>\n<|im_start|>assistant\nNo.<|eot|>"
        "<|im_start|>assistant\nYes."
    )
    assert inverse.reliable
    assert inverse.messages(text) is None


def test_an_answer_without_the_reasoning_of_the_prompt_is_not_part_of_a_result():
    """This form of Nemotron's template opens no reasoning if the answer already has one."""
    form = "Nemotron: thought in every turn, begun by the prompt"
    template = chat_of(form).chat_template or chat_of(form).tokenizer.chat_template
    begins = "{%- if m.role == 'assistant' %}"
    assert template.count(begins) == 1
    template = template.replace(begins, begins[:-3] + " and '</think>' not in m.content %}")
    inverse = TemplateInverse(chat_of(form).tokenizer, template)
    known = [user("Rain?"), answer("", OSLO), *results("wet"), answer("I see.</think>It rains.")]
    assert inverse.reliable
    found = inverse.messages(inverse.chat.render(known))
    assert found is None or found[-1] == known[-1]
    plain = [user("Rain?"), answer("I see.</think>It rains."), user("So?"), answer("Yes.")]
    found = inverse.messages(inverse.chat.render(plain))
    assert found is None or found[-1] == plain[-1]
    assert inverse.messages(inverse.chat.render([user("Rain?"), answer("It rains.")])) is not None
