"""Tokens and labels of rows: TRL's tokens, and labels only for the assistant's turns."""

import copy
import importlib

import pytest
from datasets import Dataset
from hypothesis import example, given, settings
from hypothesis import strategies as st
from support.conversations import CONVERSATIONS, GENERATION, chat, spoken
from support.models import tiny_llama
from tokenizers import processors
from transformers import AutoTokenizer

from star_dss_plugin.data.host_labels import assistant_labels, needs_assistant_labels
from star_dss_plugin.data.templates.chat import ChatTokenizer
from star_dss_plugin.data.templates.tokenized import labels_of
from star_dss_plugin.data.tokenization import read_row, tokenize_row, truncate_row

TRIMMED = GENERATION.replace("m.content", "m.content|trim")


@pytest.fixture(scope="module")
def generating_tokenizer(tokenizer):
    """Return the tiny tokenizer with a template that marks the assistant's tokens."""
    found = copy.deepcopy(tokenizer)
    found.chat_template = GENERATION
    return found


def answers_with_end(messages, end="<|im_end|>"):
    """Return the assistant's texts with their end-of-turn token."""
    return [m["content"] + end for m in messages if m["role"] == "assistant"]


# Compared with TRL


@pytest.fixture(scope="module")
def by_trl(tmp_path_factory):
    """Return a function from rows to the (input_ids, labels) that SFTTrainer makes of them."""
    trl = pytest.importorskip("trl")

    def prepare(rows, tokenizer, **changes):
        options = {
            "output_dir": str(tmp_path_factory.mktemp("trl")),
            "report_to": "none",
            "bf16": False,
            "use_cpu": True,
            "max_length": None,
            "gradient_checkpointing": False,
            "disable_tqdm": True,
            "shuffle_dataset": False,
            **changes,
        }
        trainer = trl.SFTTrainer(
            tiny_llama(len(tokenizer), num_hidden_layers=1),
            args=trl.SFTConfig(**options),
            train_dataset=Dataset.from_list(rows),
            processing_class=copy.deepcopy(tokenizer),
        )
        return [(row["input_ids"], row["labels"]) for row in trainer.train_dataset]

    return prepare


def by_plugin(rows, tokenizer, **kwargs):
    """Return the (input_ids, labels) that this package makes of rows."""
    made = [tokenize_row(row, ChatTokenizer(tokenizer), **kwargs) for row in rows]
    return [(row["input_ids"], row["labels"]) for row in made]


PLAIN = [
    {"prompt": "how are you?", "completion": " i am fine"},
    {"prompt": "how are you? ", "completion": "i am fine<|im_end|>"},
    {"prompt": "", "completion": "hello world"},
    {"prompt": "is this bad?\n\n", "completion": "no"},
    {"prompt": "the same", "completion": ""},
    {"prompt": "a<|im_end|>", "completion": "<|im_end|>b"},
    {"prompt": "👩‍👩", "completion": "‍👧🛡️"},
]


def test_plain_prompt_and_completion_as_trl(tokenizer, by_trl):
    rows = PLAIN
    if not hasattr(importlib.import_module("trl.data_utils"), "common_prefix_length"):
        # Older TRL counts the prompt's own tokens, also where they merge with the completion's.
        rows = [r for r in PLAIN if not r["prompt"].endswith((" ", "\n", "👩"))]
    assert by_plugin(rows, tokenizer) == by_trl(rows, tokenizer)


def test_text_as_trl(tokenizer, by_trl):
    rows = [{"text": t} for t in ("the quick fox", "ends<|im_end|>", "", "a\n\nb 👩‍👩‍👧")]
    assert by_plugin(rows, tokenizer) == by_trl(rows, tokenizer)


def test_conversational_prompt_and_completion_as_trl(tokenizer, by_trl):
    rows = [
        {"prompt": messages[:-1], "completion": messages[-1:]}
        for name, messages in CONVERSATIONS.items()
        if name != "two answers in a row"  # the rendered prompt ends with an answer
    ]
    assert by_plugin(rows, tokenizer) == by_trl(rows, tokenizer)


@pytest.mark.parametrize("template", [GENERATION, TRIMMED], ids=["as is", "trimmed"])
def test_conversations_as_trl_with_assistant_only_loss(generating_tokenizer, by_trl, template):
    tokenizer = copy.deepcopy(generating_tokenizer)
    tokenizer.chat_template = template
    rows = [{"messages": messages} for messages in CONVERSATIONS.values()]
    if template is TRIMMED:
        rows += [
            {"messages": chat("u: hi\n", "a:\n fine \n\n", "u:\tok", "a: ok ")},
            {"messages": chat("u:hi", "a:fine\n", "u:hi", "a:fine\n")},
        ]
    assert by_plugin(rows, tokenizer) == by_trl(rows, tokenizer, assistant_only_loss=True)


def test_open_labels_become_those_of_assistant_only_loss(generating_tokenizer, by_trl):
    rows = [{"messages": messages} for messages in CONVERSATIONS.values()]
    everything = by_trl(rows, generating_tokenizer)
    assert all(ids == labels for ids, labels in everything)
    ours = [
        assistant_labels(
            row | {"input_ids": ids, "labels": labels}, ChatTokenizer(generating_tokenizer)
        )
        for row, (ids, labels) in zip(rows, everything, strict=True)
    ]
    assert ours == [
        labels for _, labels in by_trl(rows, generating_tokenizer, assistant_only_loss=True)
    ]


@pytest.mark.parametrize("mode", ["keep_start", "keep_end"])
def test_open_labels_of_truncated_rows(generating_tokenizer, by_trl, mode):
    row = {"messages": CONVERSATIONS["two turns"]}
    length = (
        len(tokenize_row(row, ChatTokenizer(generating_tokenizer))["input_ids"]) - 4
    )  # ends within an answer
    cut = {"max_length": length, "truncation_mode": mode}
    ((ids, labels),) = by_trl([row], generating_tokenizer, **cut)
    ((_, masked),) = by_trl([row], generating_tokenizer, assistant_only_loss=True, **cut)
    assert labels == ids != masked
    open_labels = row | {"input_ids": ids, "labels": labels}
    assert assistant_labels(open_labels, ChatTokenizer(generating_tokenizer)) == masked
    if mode == "keep_start":
        assert by_plugin([row], generating_tokenizer, max_length=length) == [(ids, masked)]


# Labels of the assistant's turns


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_every_answer_is_trained_with_its_end_of_turn(tokenizer, name):
    messages = CONVERSATIONS[name]
    row = tokenize_row({"messages": messages}, ChatTokenizer(tokenizer))
    assert spoken(row, tokenizer) == answers_with_end(messages)
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    assert row["input_ids"] == tokenizer(text, add_special_tokens=False)["input_ids"]


hostile = st.lists(
    st.sampled_from(
        [
            "<|im_end|>",
            "<|im_start|>",
            "assistant\n",
            "<|im_end|>\n<|im_start|>assistant\n",
            "user",
            "\ue0f0",
            "\ue0f1",
            "\ue0f01\ue0f1",
            "\ue0f03\ue0f1",
            "0",
            "1",
            "\n",
            " ",
            "  ",
            "{{ 7 }}",
            "fine",
            "🛡️",
            "\ufffd",
            "",
        ]
    )
    | st.text(max_size=3),
    max_size=6,
).map("".join)


@settings(max_examples=150, deadline=None)
@given(st.lists(hostile, min_size=2, max_size=6), st.booleans())
@example(["\ue0f01\ue0f1", "\ue0f01\ue0f1<|im_end|>\n<|im_start|>assistant\n\ue0f01\ue0f1"], False)
@example(["hi", ""], False)
@example(["hi", "fine\n", "", "\n"], True)
def test_hostile_turns_change_no_other_turns_labels(tokenizer, contents, trims):
    """White space is not compared, because a token may join it to that of the template."""
    roles = ["user", "assistant"] * 3
    messages = [{"role": r, "content": c} for r, c in zip(roles, contents, strict=False)]
    template = TRIMMED if trims else None
    row = tokenize_row({"messages": messages}, ChatTokenizer(tokenizer, template))
    trained = "".join(spoken(row, tokenizer))
    assert "".join(trained.split()) == "".join("".join(answers_with_end(messages)).split())
    # all other text of the row is untrained
    untrained = [i for i, x in zip(row["input_ids"], row["labels"], strict=True) if x == -100]
    users = [m["content"] for m in messages if m["role"] == "user"]
    answers = len(messages) - len(users)
    scaffold = "<|im_start|>user<|im_end|>" * len(users) + "<|im_start|>assistant" * answers
    assert sorted("".join(tokenizer.decode(untrained).split())) == sorted(
        "".join((scaffold + "".join(users)).split())
    )


def test_spaces_outside_of_trimmed_offsets_are_trained(tokenizer):
    """GPT-2's and Llama 3's tokenizers trim offsets: a run of spaces has an empty one."""
    trimming = copy.deepcopy(tokenizer)
    trimming.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    messages = CONVERSATIONS["spaces inside"]
    encoded = trimming("a   b", add_special_tokens=False, return_offsets_mapping=True)
    assert any(a == b for a, b in encoded["offset_mapping"])
    row = tokenize_row({"messages": messages}, ChatTokenizer(trimming))
    assert spoken(row, trimming) == answers_with_end(messages)
    assert row == tokenize_row({"messages": messages}, ChatTokenizer(tokenizer))


def test_answers_are_trained_with_qwens_tokenizer(shared):
    tokenizer = AutoTokenizer.from_pretrained(shared / "guards" / "qwen3guard_gen")
    messages = [
        *CONVERSATIONS["spaces inside"],
        *CONVERSATIONS["emoji"],
        *CONVERSATIONS["a forged question in the answer"],
    ]
    row = tokenize_row({"messages": messages}, ChatTokenizer(tokenizer, GENERATION))
    found = [text.encode() for text in spoken(row, tokenizer)]
    assert found == [
        text.encode()
        for text in answers_with_end(
            [
                {**m, "content": m["content"].replace("e\u0301", "é")}
                for m in messages  # NFC
            ]
        )
    ]


def test_answers_without_a_control_token_at_their_end_are_trained(tokenizer):
    template = "{%- for m in messages %}{{- m.role + ': ' + m.content + '\n' }}{%- endfor %}"
    row = {"messages": chat("u:hi", "a:fine", "u:assistant: no", "a:fine")}
    row = tokenize_row(row, ChatTokenizer(tokenizer, template))
    assert [text.strip() for text in spoken(row, tokenizer)] == ["fine", "fine"]


def test_only_the_completions_answers_are_trained(tokenizer):
    messages = chat("u:hi", "a:not this", "u:ok", "a:this", "u:why?", "a:and this")
    row = {"prompt": messages[:3], "completion": messages[3:]}
    made = tokenize_row(row, ChatTokenizer(tokenizer))
    assert spoken(made, tokenizer) == ["this<|im_end|>", "and this<|im_end|>"]
    open_labels = row | made | {"labels": made["input_ids"]}
    assert needs_assistant_labels(open_labels)
    assert assistant_labels(open_labels, ChatTokenizer(tokenizer)) == made["labels"]


@pytest.mark.parametrize(
    "name", ["two turns", "the same answers", "a forged answer in the question"]
)
def test_truncation_keeps_labels_and_tokens_together(tokenizer, name):
    row = {"messages": CONVERSATIONS[name]}
    made = tokenize_row(row, ChatTokenizer(tokenizer))
    length = len(made["input_ids"])
    for n in range(1, length):
        head = {key: made[key][:n] for key in made}
        assert tokenize_row(row, ChatTokenizer(tokenizer), max_length=n) == head
        assert assistant_labels(row | head, ChatTokenizer(tokenizer)) == head["labels"]
    for n in range(8, length):  # shorter ends may look like a beginning
        tail = {key: made[key][length - n :] for key in made}
        assert assistant_labels(row | tail, ChatTokenizer(tokenizer)) == tail["labels"]


def test_typed_content_has_the_tokens_of_its_text(tokenizer):
    template = (
        "{%- for m in messages %}{{- '<|im_start|>' + m.role + '\n' }}"
        "{%- if m.content is string %}{{- m.content }}"
        "{%- else %}{%- for p in m.content %}{{- p.text }}{%- endfor %}{%- endif %}"
        "{{- '<|im_end|>\n' }}{%- endfor %}"
    )
    messages = chat("u:how are you?", "a:i am fine")
    typed = [{**m, "content": [{"type": "text", "text": m["content"]}]} for m in messages]
    assert tokenize_row({"messages": typed}, ChatTokenizer(tokenizer, template)) == tokenize_row(
        {"messages": messages}, ChatTokenizer(tokenizer)
    )


def test_tools_and_template_arguments_of_a_row_are_used(tokenizer):
    template = "{{- tools[0].name + mood + '\n' }}" + GENERATION
    row = {
        "messages": chat("u:hi", "a:fine"),
        "tools": '[{"name": "fox"}]',
        "chat_template_kwargs": {"mood": "lazy"},
    }
    made = tokenize_row(row, ChatTokenizer(tokenizer, template))
    assert tokenizer.decode(made["input_ids"]).startswith("foxlazy\n<|im_start|>user")
    assert spoken(made, tokenizer) == ["fine<|im_end|>"]
    assert assistant_labels(row | made, ChatTokenizer(tokenizer, template)) == made["labels"]


def test_rows_are_cut_at_the_given_end(tokenizer):
    row = {"prompt": "how are you?", "completion": " i am fine, thank you."}
    made = read_row(row, ChatTokenizer(tokenizer))
    ids, trained = truncate_row(made, None)
    labels = labels_of(ids, trained)
    assert (ids, labels) == (
        made.encoded.ids,
        tokenize_row(row, ChatTokenizer(tokenizer))["labels"],
    )
    assert truncate_row(made, len(ids) + 1, keep_end=True) == (ids, trained)
    for length in range(1, len(ids)):
        last, runs = truncate_row(made, length, keep_end=True)
        assert (last, labels_of(last, runs)) == (ids[-length:], labels[-length:])
        first, runs = truncate_row(made, length)
        assert (first, labels_of(first, runs)) == (ids[:length], labels[:length])
