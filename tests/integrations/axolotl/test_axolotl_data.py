"""Every kind of data that Axolotl finetunes on: which tokens are trained, what the guard reads."""

import pytest
from axolotl_runs import (
    ANSWERS,
    PROMPTS,
    _light_runs,  # noqa: F401
    chat,
    configuration,
    data_of,
    loaded,
    multi_turn,
    single_turn,
    trained,
    write_rows,
)

from star_dss_plugin import DataError
from star_dss_plugin.data.columns import SCORES_COLUMN
from star_dss_plugin.data.provenance import provenance_of
from star_dss_plugin.data.templates.tokenized import trained_runs


def scored(folder, model_dir, *datasets, **changes):
    config = configuration(folder, model_dir, datasets=list(datasets), **changes)
    meta = data_of(loaded(folder, config))
    for dataset in (meta.train_dataset, meta.eval_dataset):
        if dataset is not None:
            check(dataset)
    return meta


def check(dataset):
    """Check for one score per token, 1 at tokens that are not trained, and no column "messages"."""
    for row in dataset:
        assert len(row[SCORES_COLUMN]) == len(row["input_ids"]) == len(row["labels"])
        outside = [s for s, label in zip(row[SCORES_COLUMN], row["labels"]) if label == -100]
        assert all(s == 1.0 for s in outside)
    assert "messages" not in dataset.column_names


def responses(dataset, tokenizer):
    """Return the trained texts of all rows in order, each with the scores of its tokens."""
    found = []
    for row in dataset:
        for start, end in trained_runs(row["labels"]):
            text = tokenizer.decode(row["input_ids"][start:end])
            found.append((text, row[SCORES_COLUMN][start:end]))
    return found


def check_scores_fall_at_the_word(found):
    for text, scores in found:
        assert scores[0] == pytest.approx(0.1 if text.startswith("bad") else 0.9)
        assert scores[-1] == pytest.approx(0.1 if "bad" in text else 0.9)


def test_single_turn_chat(tmp_path, model_dir, tokenizer, asked):
    meta = scored(tmp_path, model_dir, chat(tmp_path / "a.jsonl"))
    found = responses(meta.train_dataset, tokenizer)
    assert sorted(text for text, _ in found) == sorted(a + "<|im_end|>" for a in ANSWERS)
    check_scores_fall_at_the_word(found)
    expected = [([{"role": "user", "content": p}], a) for p, a in zip(PROMPTS, ANSWERS)]
    assert sorted(asked, key=str) == sorted(expected, key=str)
    assert provenance_of(meta.train_dataset)["raw_contexts"] == 0


def test_chat_with_several_turns(tmp_path, model_dir, tokenizer, asked):
    meta = scored(tmp_path, model_dir, chat(tmp_path / "a.jsonl", multi_turn()))
    assert len(responses(meta.train_dataset, tokenizer)) == 16
    wanted = [
        (row["messages"][:k], row["messages"][k]["content"]) for row in multi_turn() for k in (2, 4)
    ]
    assert sorted(asked, key=str) == sorted(wanted, key=str)


@pytest.mark.parametrize(
    ("options", "trained_texts"),
    [
        ({"train_on_eos": "none"}, {"2", "2 yes"}),
        ({"train_on_eos": "last"}, {"2", "2 yes<|im_end|>"}),
        (
            {"train_on_eos": "all"},
            {"<|im_end|>", "2<|im_end|>", "2 yes<|im_end|>"},
        ),
        ({"roles_to_train": ["gpt"]}, {"2<|im_end|>", "2 yes<|im_end|>"}),
    ],
)
def test_what_is_trained_of_a_conversation(tmp_path, model_dir, tokenizer, options, trained_texts):
    rows = multi_turn()[2:3] * 2  # the answer is "2"
    data = chat(tmp_path / "a.jsonl", rows, **options)
    found = responses(scored(tmp_path, model_dir, data).train_dataset, tokenizer)
    assert {text for text, _ in found} == trained_texts


@pytest.mark.parametrize("whose", ["assistant", "user"])
def test_turns_that_rows_choose_to_train(tmp_path, model_dir, tokenizer, asked, whose):
    """Turns of the assistant may be left out; turns of the user are refused."""
    rows = multi_turn()
    for row in rows:
        for k, message in enumerate(row["messages"]):
            message["train"] = message["role"] == whose and k > 2
    data = chat(tmp_path / "a.jsonl", rows, message_field_training="train", train_on_eos="none")
    if whose == "user":
        with pytest.raises(DataError, match="are trained, and the user says them"):
            scored(tmp_path, model_dir, data)
        return
    found = responses(scored(tmp_path, model_dir, data).train_dataset, tokenizer)
    assert sorted(text for text, _ in found) == sorted(a + " yes" for a in ANSWERS)
    assert all(len(context) == 4 for context, _ in asked)


def test_chat_with_other_fields_and_roles(tmp_path, model_dir, asked):
    rows = [
        {"dialogue": [{"from": "human", "value": p}, {"from": "gpt", "value": a}]}
        for p, a in zip(PROMPTS, ANSWERS)
    ]
    mapping = {"role": "from", "content": "value"}
    data = chat(
        tmp_path / "a.jsonl", rows, field_messages="dialogue", message_property_mappings=mapping
    )
    scored(tmp_path, model_dir, data)
    assert ([{"role": "user", "content": "how are you?"}], ANSWERS[0]) in asked


def test_alpaca(tmp_path, model_dir, tokenizer, asked, caplog):
    rows = [{"instruction": p, "input": "", "output": a} for p, a in zip(PROMPTS, ANSWERS)]
    file = write_rows(tmp_path / "a.jsonl", rows)
    data = {"path": file, "ds_type": "json", "type": "alpaca"}
    found = responses(scored(tmp_path, model_dir, data).train_dataset, tokenizer)
    assert sorted(text for text, _ in found) == sorted(a + "<|im_end|>" for a in ANSWERS)
    check_scores_fall_at_the_word(found)
    expected = [([{"role": "user", "content": p}], a) for p, a in zip(PROMPTS, ANSWERS)]
    assert sorted(asked, key=str) == sorted(expected, key=str)
    assert "for 8 of them the guard read the messages, for 0 the raw prompt" in caplog.text


def test_completion(tmp_path, model_dir, tokenizer, asked, caplog):
    rows = [{"text": "user: " + p + " assistant: " + a} for p, a in zip(PROMPTS, ANSWERS)]
    file = write_rows(tmp_path / "a.jsonl", rows)
    data = {"path": file, "ds_type": "json", "type": "completion"}
    meta = scored(tmp_path, model_dir, data)
    assert all(-100 not in labels for labels in meta.train_dataset["labels"])
    assert all(context == [] for context, _ in asked)
    assert {text for _, text in asked} == {row["text"] for row in rows}
    assert "8 of 8 responses have nothing said before them" in caplog.text


def test_a_text_that_looks_like_a_conversation_is_a_text(tmp_path, model_dir):
    text = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\nhello<|im_end|>\n"
    file = write_rows(tmp_path / "a.jsonl", [{"text": text}] * 2)
    data = {"path": file, "ds_type": "json", "type": "completion"}
    meta = scored(tmp_path, model_dir, data)
    assert -100 not in meta.train_dataset["labels"][0]


def test_input_output(tmp_path, model_dir, tokenizer, asked):
    rows = [
        {
            "segments": [
                {"label": False, "text": "<|im_start|>Q: " + p + "\nA:"},
                {"label": True, "text": " " + a + "<|im_end|>"},
            ]
        }
        for p, a in zip(PROMPTS, ANSWERS)
    ]
    file = write_rows(tmp_path / "a.jsonl", rows)
    data = {"path": file, "ds_type": "json", "type": "input_output"}
    found = responses(scored(tmp_path, model_dir, data).train_dataset, tokenizer)
    assert sorted(text.strip() for text, _ in found) == sorted(a + "<|im_end|>" for a in ANSWERS)
    assert all("Q: " in context[0]["content"] for context, _ in asked)


def test_data_that_is_tokenized_already(tmp_path, model_dir, asked):
    """The messages are found in tokens of the tokenizer's own template."""
    meta = scored(tmp_path, model_dir, chat(tmp_path / "a.jsonl"))
    columns = ["input_ids", "attention_mask", "labels"]
    rows = meta.train_dataset.select_columns(columns).to_list()
    first = sorted(asked, key=str)
    asked.clear()
    file = write_rows(tmp_path / "tokens.jsonl", rows)
    data = {"path": file, "ds_type": "json", "type": None}
    other = {"star_dss": {"guard": {"preset": "test-words", "safe": 0.8}}}
    scored(tmp_path, model_dir, data, **other)
    assert sorted(asked, key=str) == first


def test_mixed_data_with_an_evaluation_split(tmp_path, model_dir, asked, caplog):
    alpaca = [{"instruction": p, "input": "", "output": a} for p, a in zip(PROMPTS, ANSWERS)]
    file = write_rows(tmp_path / "b.jsonl", alpaca)
    mixed = [
        chat(tmp_path / "a.jsonl", multi_turn()),
        {"path": file, "ds_type": "json", "type": "alpaca"},
    ]
    config = configuration(tmp_path, model_dir, datasets=mixed, val_set_size=4)
    trainer = trained(tmp_path, config)
    state = trainer.star_dss_state
    assert state.summaries["train"].rows == 12
    assert state.summaries["eval"].rows == 4
    raw = sum(
        provenance_of(d)["raw_contexts"] for d in (trainer.train_dataset, trainer.eval_dataset)
    )
    assert raw == 0
    check(trainer.train_dataset)
    check(trainer.eval_dataset)


def test_two_chat_templates_in_one_run(tmp_path, model_dir, asked):
    datasets = [
        chat(tmp_path / "a.jsonl", single_turn()),
        chat(tmp_path / "b.jsonl", multi_turn(), chat_template="llama3", train_on_eos="none"),
    ]
    meta = scored(tmp_path, model_dir, *datasets)
    assert provenance_of(meta.train_dataset)["raw_contexts"] == 0
    assert ([{"role": "user", "content": "is this bad?"}], ANSWERS[1]) in asked
    row = multi_turn()[1]["messages"]
    assert (row[:4], row[4]["content"]) in asked


def test_rows_that_are_cut_keep_their_context(tmp_path, model_dir, tokenizer, asked):
    rows = [
        {
            "messages": [
                {"role": "user", "content": "say it"},
                {"role": "assistant", "content": "bad " * 40},
            ]
        }
    ] * 4
    config = {"sequence_len": 24, "excess_length_strategy": "truncate"}
    meta = scored(tmp_path, model_dir, chat(tmp_path / "a.jsonl", rows), **config)
    assert all(len(ids) == 24 for ids in meta.train_dataset["input_ids"])
    assert {str(context) for context, _ in asked} == {"[{'role': 'user', 'content': 'say it'}]"}


def test_the_guard_reads_tools(tmp_path, model_dir, asked):
    tool = {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "tells the weather",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
        },
    }
    messages = [
        {"role": "user", "content": "rain in oslo?"},
        {"role": "assistant", "content": "i look it up"},
        {"role": "tool", "content": "no rain"},
        {"role": "assistant", "content": "it is dry"},
    ]
    rows = [{"messages": messages, "tools": [tool]}] * 2
    data = chat(tmp_path / "a.jsonl", rows, chat_template="qwen_25")
    config = {"sequence_len": 1024, "chat_template": "qwen_25"}
    meta = scored(tmp_path, model_dir, data, **config)
    assert provenance_of(meta.train_dataset)["raw_contexts"] == 0
    assert [text for _, text in asked] == ["i look it up", "it is dry"]
    context = asked[1][0]
    assert [m["role"] for m in context] == ["system", "user", "assistant", "tool"]
    assert "tells the weather" in context[0]["content"]
    assert "no rain" in context[3]["content"]
