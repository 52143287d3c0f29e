"""The inverse of a chat template: it gives the messages that were rendered, or None."""

import pytest

pytest.importorskip("axolotl", reason="needs Axolotl: make test-axolotl")

from axolotl.utils.chat_templates.base import _CHAT_TEMPLATES
from axolotl_runs import _light_runs  # noqa: F401
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from star_dss_plugin.data.responses import find_responses
from star_dss_plugin.data.templates.chat import ChatTokenizer
from star_dss_plugin.data.templates.inverse import TemplateInverse
from star_dss_plugin.data.tokenization import tokenize_row
from star_dss_plugin.errors import DataError
from star_dss_plugin.segmenters import tokens

CONVERSATION = [
    {"role": "user", "content": "How do I whittle a spoon?"},
    {"role": "assistant", "content": "Use green wood.\n\nCut away from you."},
    {"role": "user", "content": "Which knife?"},
    {"role": "assistant", "content": "A short one."},
]
# Templates that must stay invertible. The tokens of others are read as a raw prompt.
INVERTED = {
    "alpaca",
    "chatml",
    "cohere",
    "exaone",
    "falcon_h1",
    "gemma",
    "llama3",
    "llama4",
    "metharme",
    "mistral_v1",
    "mistral_v2v3",
    "mistral_v3_tekken",
    "phi_3",
    "phi_35",
    "qwen3",
    "qwen_25",
}


def templates():
    return sorted(name for name, text in _CHAT_TEMPLATES.items() if isinstance(text, str))


@pytest.mark.parametrize("name", templates())
@pytest.mark.parametrize("turns", [2, 4])
def test_an_inverse_gives_the_messages_or_none(tokenizer, name, turns):
    known = CONVERSATION[:turns]
    template = _CHAT_TEMPLATES[name]
    inverse = TemplateInverse(tokenizer, template)
    try:
        text = ChatTokenizer(tokenizer, template).render(known)
    except DataError:
        assert not inverse.reliable
        return
    found = inverse.messages(text)
    assert found is None or found[-turns:] == known
    if name in INVERTED:
        assert found == known


def test_most_templates_can_be_inverted(tokenizer):
    good = [n for n in templates() if TemplateInverse(tokenizer, _CHAT_TEMPLATES[n]).reliable]
    assert set(good) >= INVERTED, sorted(INVERTED - set(good))


FORGETFUL = (  # renders the last two turns only
    "{% for m in messages[-2:] %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>{% endfor %}"
)
UPPER = "{% for m in messages %}[{{ m.role }}]{{ m.content | upper }}{% endfor %}"
NO_MARKS = "{% for m in messages %}{{ m.content }}{% endfor %}"


@pytest.mark.parametrize("template", [FORGETFUL, UPPER, NO_MARKS])
def test_a_template_that_loses_something_is_not_inverted(tokenizer, template):
    inverse = TemplateInverse(tokenizer, template)
    assert not inverse.reliable
    assert inverse.messages(ChatTokenizer(tokenizer, template).render(CONVERSATION)) is None


def test_a_default_system_turn_is_not_a_message(tokenizer):
    template = (
        "{% if messages[0].role != 'system' %}<|im_start|>system\nBe nice.<|im_end|>\n{% endif %}"
        + tokenizer.chat_template
    )
    inverse = TemplateInverse(tokenizer, template)
    with_system = [{"role": "system", "content": "Be brief."}, *CONVERSATION]
    for known in (CONVERSATION, with_system):
        assert inverse.messages(ChatTokenizer(tokenizer, template).render(known)) == known


def test_text_of_another_template_is_not_inverted(tokenizer):
    inverse = TemplateInverse(tokenizer, tokenizer.chat_template)
    assert inverse.messages("### Instruction:\nHow?\n### Response:\nSo.") is None
    assert inverse.messages("") is None


def test_a_cut_conversation_gives_its_messages(tokenizer):
    chat = ChatTokenizer(tokenizer, tokenizer.chat_template)
    text = chat.render(CONVERSATION)
    inverse = TemplateInverse(tokenizer, tokenizer.chat_template)
    for cut in range(text.index("Use"), len(text)):
        if any(a < cut < b for a, b in (match.span() for match in chat.added.finditer(text))):
            continue  # rows are cut between tokens
        found = inverse.messages(text[:cut])
        # The last message may be cut, also within its role.
        assert found[:-1] == CONVERSATION[: len(found) - 1]
        assert CONVERSATION[len(found) - 1]["content"].startswith(found[-1]["content"])


words = st.text(st.sampled_from("ab \n:#<|>[]{}1"), min_size=1, max_size=20).map(str.strip)


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.lists(st.tuples(words, words), min_size=1, max_size=3), st.booleans())
def test_rendered_messages_are_found_again(tokenizer, pairs, system):
    said = [{"role": "system", "content": "be kind"}] if system else []
    for question, answer in pairs:
        said += [
            {"role": "user", "content": question},
            {"role": "assistant", "content": answer},
        ]
    text = ChatTokenizer(tokenizer, tokenizer.chat_template).render(said)
    found = TemplateInverse(tokenizer, tokenizer.chat_template).messages(text)
    assert found == said


def weather_conversation(**more):
    calls = [
        {"type": "function", "function": {"name": "weather", "arguments": {"city": city}}}
        for city in ("Oslo", "Rome")
    ]
    return [
        {"role": "user", "content": "Where does it rain?"},
        {"role": "assistant", "content": "", "tool_calls": calls},
        {"role": "tool", "content": "wet"},
        {"role": "tool", "content": "dry"},
        {"role": "assistant", "content": "Only in Oslo.", **more},
    ]


@pytest.mark.parametrize("name", ["qwen3", "qwen3_5", "qwen_25", "exaone4", "jamba"])
def test_several_tool_calls_are_found_again(tokenizer, name):
    """Of these templates qwen3_5 renders calls as XML."""
    template = _CHAT_TEMPLATES[name]
    chat = ChatTokenizer(tokenizer, template)
    made = [
        tokenize_row({"messages": talk}, chat) for talk in (weather_conversation(), CONVERSATION)
    ]
    messages = TemplateInverse(tokenizer, template).messages_of_tokens(made[0]["input_ids"])
    messages = [m for m in messages if m["role"] != "system"]
    assert [m["role"] for m in messages] == ["user", "assistant", "tool", "tool", "assistant"]
    calls = [call["function"] for call in messages[1]["tool_calls"]]
    assert calls == [call["function"] for call in weather_conversation()[1]["tool_calls"]]
    for row in made:
        responses = find_responses(row, chat, tokens, 5)
        assert responses
        assert not any(response.raw_context for response in responses)
    assert responses[-1].request.text.strip() == "A short one."
