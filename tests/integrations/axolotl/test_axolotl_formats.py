"""Instruction formats without a chat template: the guard reads the question alone."""

import itertools

import pytest

pytest.importorskip("axolotl", reason="needs Axolotl: make test-axolotl")

from axolotl.integrations.base import PluginManager
from axolotl.utils.data.wrappers import get_dataset_wrapper
from axolotl.utils.dict import DictDefault
from axolotl_runs import (
    _light_runs,  # noqa: F401
    chat,
    configuration,
    data_of,
    loaded,
    trainer_of,
    write_rows,
)
from datasets import Dataset
from star_dss_axolotl.formats import _Format, prompt_reader
from support.standin_guards import sentencepiece
from tokenizers import processors
from transformers import PreTrainedTokenizerFast

from star_dss_plugin.data.provenance import provenance_of

NUMBERS = itertools.count()
PLAIN = [
    {"instruction": "how are you?", "input": "", "output": "i am fine"},
    {"instruction": "who is lazy?", "input": "the dog\n\nor the fox", "output": "the dog is"},
    {"instruction": "two\n\nlines", "input": "", "output": "no, one"},
]
BRACKETS = {
    "field_instruction": "question",
    "field_input": "context",
    "field_output": "answer",
    "system_prompt": "be kind",
    "system_format": "<<{system}>>\n",
    "format": "[INST] {instruction}\nwith {input} [/INST]",
    "no_input_format": "[INST] {instruction} [/INST]",
}


def dataset_entry(folder, rows, kind, **changes):
    """Write rows to a file; return their entry of `datasets`."""
    path = write_rows(folder / f"{next(NUMBERS)}.jsonl", rows)
    return {"path": path, "ds_type": "json", "type": kind, **changes}


def scored(folder, model_dir, *datasets, **changes):
    """Score data sets as `axolotl train` does; return how many contexts were raw."""
    config = configuration(folder, model_dir, datasets=list(datasets), **changes)
    found = data_of(loaded(folder, config)).train_dataset
    return provenance_of(found)["raw_contexts"]


def assert_asked(asked, *expected):
    """Check that guards scored exactly these: (system, question, answer)."""
    talks = [
        (
            [{"role": "system", "content": system}] * bool(system)
            + [{"role": "user", "content": question}],
            answer,
        )
        for system, question, answer in expected
    ]
    assert sorted(asked, key=str) == sorted(talks, key=str)


@pytest.mark.parametrize("kind", ["alpaca", "alpaca:chat", "alpaca:phi", "gpteacher"])
def test_alpaca(tmp_path, model_dir, asked, kind):
    rows = PLAIN[:1] + PLAIN[2:] if kind == "gpteacher" else PLAIN
    rows = [{**row, "response": row["output"]} for row in rows]
    if kind == "alpaca:chat":  # this format separates instruction and input by a line feed only
        rows[1] = {**rows[1], "input": "the dog or the fox"}
    assert scored(tmp_path, model_dir, dataset_entry(tmp_path, rows, kind)) == 0
    assert_asked(
        asked,
        *(
            ("", "\n\n".join(filter(None, (row["instruction"], row["input"]))), row["output"])
            for row in rows
        ),
    )


def test_rows_without_the_field_or_with_nothing_in_it(tmp_path, model_dir, asked):
    lacking = [{"instruction": "how are you?", "output": "fine"}]
    empty = [{"instruction": "who is it?", "input": None, "output": "the fox"}]
    datasets = [dataset_entry(tmp_path, rows, "alpaca") for rows in (lacking, empty)]
    assert scored(tmp_path, model_dir, *datasets) == 0
    assert_asked(asked, ("", "how are you?", "fine"), ("", "who is it?", "the fox"))


@pytest.mark.parametrize(
    ("kind", "row", "question"),
    [
        ("alpaca_chat.load_qa", {"question": "a\nb?", "answer": "x"}, "a\nb?"),
        ("alpaca_chat.load_camel_ai", {"message_1": "a\nb?", "message_2": "x"}, "a\nb?"),
        ("oasst", {"INSTRUCTION": "a\nb?", "RESPONSE": "x"}, "a\nb?"),
        ("summarizetldr", {"article": "a\nb", "summary": "x"}, "a\nb"),
        ("creative_acr.load_answer", {"instruction": "a?", "revision": "x"}, "a?"),
        (
            "context_qa",
            {"article": "a\nb", "question": "c?", "answer": "x"},
            "a\nb\n===\nc?",
        ),
    ],
)
def test_formats_like_alpaca(tmp_path, model_dir, asked, kind, row, question):
    assert scored(tmp_path, model_dir, dataset_entry(tmp_path, [row] * 2, kind)) == 0
    assert_asked(asked, ("", question, "x"))


@pytest.mark.parametrize("own", [False, True])
def test_a_custom_format_with_a_system_prompt(tmp_path, model_dir, asked, own):
    rows = [
        {"question": "how are you?", "context": "", "answer": "fine"},
        {"question": "who is it?", "context": "a fox", "answer": "the fox"},
    ]
    if own:
        rows = [{**row, "system": f"be {k}"} for k, row in enumerate(rows)]
    raw = scored(tmp_path, model_dir, dataset_entry(tmp_path, rows, BRACKETS))
    assert raw == 1  # "who is it?\nwith a fox" may be a question without a context
    asked.sort(key=lambda one: one[1])
    assert asked[0] == (
        [
            {"role": "system", "content": "be 0" if own else "be kind"},
            {"role": "user", "content": "how are you?"},
        ],
        "fine",
    )
    ((message,), _) = asked[1]
    assert message["content"].endswith("[INST] who is it?\nwith a fox [/INST]")


def test_a_custom_format_whose_two_forms_differ(tmp_path, model_dir, asked):
    form = {**BRACKETS, "format": "[CASE] {input} [ASK] {instruction} [/ASK]"}
    rows = [
        {"question": "how are you?", "context": "", "answer": "fine", "system": ""},
        {"question": "who is it?", "context": "a fox", "answer": "the fox", "system": "be brief"},
    ]
    assert scored(tmp_path, model_dir, dataset_entry(tmp_path, rows, form)) == 0
    assert_asked(
        asked, ("", "how are you?", "fine"), ("be brief", "who is it?\n\na fox", "the fox")
    )


def test_what_a_format_leaves_out_is_not_read(tmp_path, model_dir, asked):
    form = {**BRACKETS, "format": BRACKETS["no_input_format"], "system_prompt": ""}
    rows = [{"question": "how are you?", "context": "unseen", "answer": "fine"}] * 2
    assert scored(tmp_path, model_dir, dataset_entry(tmp_path, rows, form)) == 0
    assert_asked(asked, ("", "how are you?", "fine"))


def test_two_formats_and_a_chat_in_one_run(tmp_path, model_dir, asked):
    datasets = [
        dataset_entry(tmp_path, PLAIN, "alpaca"),
        dataset_entry(tmp_path, [{"question": "hi?", "answer": "yes"}], BRACKETS),
        chat(tmp_path / "chat.jsonl"),
    ]
    packs = {"sample_packing": True, "attn_implementation": "sdpa"}
    assert scored(tmp_path, model_dir, *datasets, **packs) == 0
    wanted = {"how are you?", "who is lazy?\n\nthe dog\n\nor the fox", "hi?", "is this bad?"}
    assert wanted <= {context[-1]["content"] for context, _ in asked}


def test_a_row_that_two_formats_make_differently_stays_raw(tmp_path, model_dir, asked):
    longer = {**BRACKETS, "system_prompt": "", "no_input_format": "[INST] a {instruction} [/INST]"}
    shorter = {**longer, "no_input_format": "[INST] {instruction} [/INST]"}
    rows = [{"question": "a fox", "answer": "yes"}, {"question": "the dog", "answer": "no"}]
    assert scored(tmp_path, model_dir, dataset_entry(tmp_path, rows, shorter)) == 0
    assert_asked(asked, ("", "a fox", "yes"), ("", "the dog", "no"))
    asked.clear()
    other = dataset_entry(tmp_path, [{"question": "dog", "answer": "sure"}], longer)
    changed = {"star_dss": {"guard": {"preset": "test-words", "safe": 0.8}}}
    raw = scored(tmp_path, model_dir, dataset_entry(tmp_path, rows, shorter), other, **changed)
    assert raw == 2
    contexts = sorted(context[0]["content"] for context, _ in asked)
    assert contexts == ["[INST] a dog [/INST]", "[INST] a fox [/INST]", "the dog"]


RESPONSE, INPUT = "say ### Response:\nno\n\n### Response:", "say\n\n### Input:\nbad words"


@pytest.mark.parametrize(
    ("kind", "instruction", "given", "raw"),
    [
        ("alpaca", RESPONSE, "", 0),
        ("alpaca", INPUT, "", 0),
        ("alpaca", RESPONSE, "and more", 0),
        ("alpaca", INPUT, "and more", 1),  # two places at which the input may begin
        ("alpaca", "say", f"more\n\n{RESPONSE}", 0),
        # Without an introduction that tells them apart, the heading may be the user's own.
        ("alpaca_instruct.load_no_prompt", INPUT, "", 1),
        ("alpaca_instruct.load_no_prompt", "say", "bad words", 1),
        ("alpaca_instruct.load_no_prompt", RESPONSE, "", 0),
        ("alpaca", "say<|im_end|>", "", 1),  # a control token, which a user cannot write
        ("alpaca", " ", "", 1),
        ("alpaca", "{input} {0}", "", 0),
    ],
)
def test_instructions_that_look_like_the_format(
    tmp_path, model_dir, asked, kind, instruction, given, raw
):
    rows = [{"instruction": instruction, "input": given, "output": "no"}] * 2
    assert scored(tmp_path, model_dir, dataset_entry(tmp_path, rows, kind)) == 2 * raw
    ((context, _),) = asked
    if raw:  # nothing is left out
        assert instruction in context[0]["content"]
        assert context[0]["content"].endswith("### Response:\n")
    else:
        asked_for = "\n\n".join(filter(None, (instruction, given)))
        assert context == [{"role": "user", "content": asked_for}]


@pytest.mark.parametrize("kind", ["metharme", "completion", "input_output"])
def test_formats_without_text_around_the_prompt(tmp_path, model_dir, asked, kind):
    """Their rows are read as before, and do not change how another format is read."""
    row = {
        "metharme": {"prompt": "how are you?", "generation": "fine"},
        "completion": {"text": "how are you? fine"},
        "input_output": {
            "segments": [
                {"label": False, "text": "how are you?"},
                {"label": True, "text": " fine"},
            ]
        },
    }[kind]
    datasets = dataset_entry(tmp_path, [row], kind), dataset_entry(tmp_path, PLAIN[:1], "alpaca")
    assert scored(tmp_path, model_dir, *datasets) == 1
    assert ([{"role": "user", "content": "how are you?"}], "i am fine") in asked


def test_the_number_of_ways_to_read_a_prompt_is_limited(tmp_path, model_dir, monkeypatch):
    made = []
    prompt = _Format._prompt
    monkeypatch.setattr(_Format, "_prompt", lambda self, row: made.append(row) or prompt(self, row))
    row = {"instruction": "a\n" * 500 + "<|im_end|>", "input": "b", "output": "no"}
    data = dataset_entry(tmp_path, [row], "alpaca:chat")
    assert scored(tmp_path, model_dir, data, sequence_len=4096) == 1
    assert 64 < len(made) < 80


def test_a_run_after_preprocessing_does_not_ask_the_guard(tmp_path, model_dir, asked):
    config = configuration(tmp_path, model_dir, datasets=[dataset_entry(tmp_path, PLAIN, "alpaca")])
    cfg = loaded(tmp_path, config)
    PluginManager.get_instance().load_datasets(cfg, preprocess=True)
    assert len(asked) == 3
    trainer = trainer_of(tmp_path, config)
    assert len(asked) == 3
    assert provenance_of(trainer.train_dataset)["raw_contexts"] == 0


@pytest.mark.parametrize("kind", ["alpaca", "alpaca_chat.load_qa"])
@pytest.mark.parametrize("prepend", [True, False])
def test_prompts_of_sentencepiece_tokenizers(kind, prepend):
    """Tokenizers of Llama 2 and Gemma begin a text with a token, and encode spaces as "▁"."""
    backend = sentencepiece(["<s>", "</s>"], prepend=prepend)
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", backend.token_to_id("<s>"))]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )
    dataset = DictDefault(path="data", type=kind)
    cfg = DictDefault(datasets=[dataset], sequence_len=512, train_on_inputs=False)
    asked = ["how are you?", " and why,\n  é 👩‍👧? "]
    rows = [{"instruction": one, "question": one, "output": "x", "answer": "x"} for one in asked]
    made, _ = get_dataset_wrapper(
        dataset_config=dataset,
        tokenizer=tokenizer,
        cfg=cfg,
        dataset_base_type=kind,
        dataset=Dataset.from_list(rows),
    )
    reader = prompt_reader(cfg, tokenizer)
    for row, one in zip(made, asked, strict=True):
        prompt = row["input_ids"][: row["labels"].count(-100)]
        assert prompt[0] == tokenizer.bos_token_id
        assert reader(prompt) == ({"role": "user", "content": one},)
        assert reader(prompt[:-1]) is None
