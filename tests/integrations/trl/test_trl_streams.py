"""Streams in TRL: rows are scored as they are read, and train as rows of a data set do."""

import json
import logging

import pytest
import torch
import yaml

pytest.importorskip("trl")

from datasets import Dataset, IterableDataset, interleave_datasets, load_from_disk
from star_dss_trl import StarDSSTrainer
from star_dss_trl.sft import main
from support.guards import WordGuard
from support.models import tiny_llama
from support.trl_runs import (
    ANSWERS,
    Stop,
    arguments,
    conversations,
    history,
    lora_config,
    make,
    prompt_completion,
)
from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments
from trl import SFTConfig, SFTTrainer

from star_dss_plugin import ConfigError, DataError, GuardError, attach, score_dataset
from star_dss_plugin.training.rows import known_rows

IN_ORDER = {"train_sampling_strategy": "sequential", "stream_buffer": 3}
"""A data set is read in the order of a stream; buffers do not fit batches."""
WRAPPED = {"packing": True, "packing_strategy": "wrapped", "max_length": 32, "stream_buffer": 8}


@pytest.fixture
def model_folder(tmp_path, tokenizer):
    folder = tmp_path / "model"
    tiny_llama(len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def asked(monkeypatch):
    """Return the texts that guards have been asked about, over all guards."""
    texts = []
    scores = WordGuard.token_scores

    def note(self, responses):
        texts.extend(text for _, text in responses)
        return scores(self, responses)

    monkeypatch.setattr(WordGuard, "token_scores", note)
    return texts


def trained(tmp_path, tokenizer, data, **changes):
    trainer = make(tmp_path, tokenizer, data, **{**IN_ORDER, **changes})
    trainer.train()
    return trainer


def same(one, other):
    torch.testing.assert_close(
        torch.tensor(history(one)), torch.tensor(history(other)), rtol=1e-6, atol=1e-6
    )


@pytest.mark.parametrize("rows", [prompt_completion, conversations])
@pytest.mark.parametrize(
    ("reference", "lora", "changes"),
    [
        ("adapter", True, {}),
        ("auto", True, {"kl_estimator": "full"}),
        ("auto", False, {"gradient_accumulation_steps": 2}),
        ("MODEL", False, {"unsafe_lookahead": 1}),
        ("MODEL", False, {"packing": True, "max_length": 64, "stream_buffer": 8}),
        ("auto", False, WRAPPED),
    ],
    ids=["lora", "lora-full-kl", "copy", "named", "packed", "wrapped"],
)
def test_a_stream_trains_as_its_rows_do(
    tmp_path, tokenizer, model_folder, rows, reference, lora, changes
):
    changes = {
        **changes,
        "reference": model_folder if reference == "MODEL" else reference,
        "kl_coef": 2.0,
        "learning_rate": 2e-3,
        "peft_config": lora_config() if lora else None,
    }
    ours = trained(tmp_path / "a", tokenizer, rows().to_iterable_dataset(), **changes)
    twin = trained(tmp_path / "b", tokenizer, rows(), **changes)
    same(ours, twin)
    assert ours.state.log_history[2]["star_dss/kl"] > 1e-6
    data = json.loads((tmp_path / "a/out/star_dss.json").read_text())["data"]["train"]
    whole = json.loads((tmp_path / "b/out/star_dss.json").read_text())["data"]["train"]
    for name in ("rows", "responses", "trained_tokens", "below_threshold"):
        assert data[name] == whole[name]
    for name in ("guard_identity", "prefixes", "raw_contexts", "guard_errors"):
        assert data["provenance"][name] == whole["provenance"][name]


def test_scores_are_those_of_score_dataset_to_the_byte(tmp_path, tokenizer):
    trainer = make(tmp_path, tokenizer, conversations().to_iterable_dataset(), **IN_ORDER)
    scored = score_dataset(conversations(), tokenizer, guard="test-words", chunk_size=2)
    for ours, wanted in zip(trainer.train_dataset, scored, strict=True):
        for name in ("input_ids", "labels", "star_scores"):
            assert ours[name] == wanted[name]


def test_what_is_not_read_is_not_scored(tmp_path, tokenizer, asked):
    def rows():
        i = 0
        while True:
            i += 1
            yield {"prompt": f"{i} + 1 =", "completion": f" {i + 1}"}

    stream = IterableDataset.from_generator(rows)
    trained(tmp_path, tokenizer, stream, max_steps=3, per_device_train_batch_size=2)
    assert 6 <= len(asked) <= 12  # the loader is one batch ahead


@pytest.mark.parametrize("streamed", [True, False])
def test_texts_without_a_question_are_told_of_once(tmp_path, tokenizer, caplog, streamed):
    rows = Dataset.from_list([{"text": f"user: {i} + 1? assistant: no"} for i in range(8)])
    rows = rows.to_iterable_dataset() if streamed else rows
    trained(tmp_path, tokenizer, rows, max_steps=2, **IN_ORDER)
    said = [m for m in caplog.messages if "have nothing said before them" in m]
    count = 3 if streamed else 8  # of the first buffer
    assert [m.partition(" have")[0] for m in said] == [f"{count} of {count} responses"]


def test_a_resumed_stream_asks_the_guard_nothing_again(tmp_path, tokenizer, asked):
    changes = {
        "max_steps": 4,
        "per_device_train_batch_size": 2,
        "save_strategy": "steps",
        "save_steps": 2,
        "stream_buffer": 2,
    }
    whole = trained(tmp_path / "a", tokenizer, prompt_completion().to_iterable_dataset(), **changes)
    asked.clear()
    cache = str(tmp_path / "cache")
    stopped = make(
        tmp_path / "b",
        tokenizer,
        prompt_completion().to_iterable_dataset(),
        score_cache_dir=cache,
        **IN_ORDER | changes,
    )
    stopped.add_callback(Stop())
    stopped.train()
    before = list(asked)
    resumed = make(
        tmp_path / "b",
        tokenizer,
        prompt_completion().to_iterable_dataset(),
        score_cache_dir=cache,
        **IN_ORDER | changes,
    )
    resumed.train(resume_from_checkpoint=True)
    assert history(resumed)[-2:] == history(whole)[-2:]
    assert 4 <= len(before) < 8
    assert sorted(asked) == sorted(ANSWERS)


def test_it_is_said_what_was_read(tmp_path, tokenizer, capsys):
    trainer = make(tmp_path, tokenizer, prompt_completion().to_iterable_dataset(), **IN_ORDER)
    trainer.create_model_card()
    trainer.train()
    trainer.create_model_card()
    out = capsys.readouterr().out
    assert "the training data is a stream, scored 3 rows at a time" in out
    assert "the guard stays in memory" in out
    assert "of its first 3 rows: 3 responses scored" in out
    assert "STAR-DSS has read 8 rows of the stream: 8 responses scored" in out
    card = (tmp_path / "out/README.md").read_text()
    assert card.count("## STAR-DSS") == 1
    assert "8 responses, " in card
    assert " in 8 rows of a stream" in card


def test_what_holds_for_all_rows_is_said_once(tmp_path, tokenizer, caplog):
    with caplog.at_level(logging.WARNING, "star_dss_plugin"):
        trained(tmp_path, tokenizer, conversations().to_iterable_dataset())
    said = [record for record in caplog.records if "what the user says was trained" in record.msg]
    assert len(said) == 1


def test_a_guard_that_dies_stops_the_run_with_the_row(tmp_path, tokenizer, monkeypatch):
    scores = WordGuard.token_scores

    def dies(self, responses):
        if any("fox" in text for _, text in responses):
            raise GuardError("the guard is gone")
        return scores(self, responses)

    monkeypatch.setattr(WordGuard, "token_scores", dies)
    data = prompt_completion().to_iterable_dataset()
    changes = {"per_device_train_batch_size": 1, "stream_buffer": 2, "max_steps": 8}
    trainer = make(tmp_path, tokenizer, data, **changes)
    with pytest.raises(GuardError, match="The train stream: Row 4: the guard is gone"):
        trainer.train()
    assert 0 < trainer.state.global_step <= 4
    trainer = make(tmp_path / "b", tokenizer, data, on_guard_error="unsafe", **changes)
    with pytest.raises(GuardError, match="the guard is gone"):
        trainer.train()


def test_streams_may_be_mapped_shuffled_and_interleaved_before(tmp_path, tokenizer):
    rows = prompt_completion()
    one, two = rows.select(range(4)).to_iterable_dataset(), rows.select(range(4, 8))
    stream = interleave_datasets(
        [one, two.to_iterable_dataset()], stopping_strategy="all_exhausted"
    )
    stream = stream.map(lambda row: row).shuffle(seed=3, buffer_size=4)
    as_read = Dataset.from_list(list(stream))
    assert as_read["completion"] != rows["completion"]
    same(
        trained(tmp_path / "a", tokenizer, stream, max_steps=2),
        trained(tmp_path / "b", tokenizer, as_read, max_steps=2),
    )


def test_a_stream_that_brings_scores_needs_no_guard(tmp_path, tokenizer, asked):
    scored = score_dataset(prompt_completion(), tokenizer, guard="test-words", chunk_size=2)
    scored.save_to_disk(tmp_path / "scored")
    asked.clear()
    stream = load_from_disk(tmp_path / "scored").to_iterable_dataset()
    stream.info.description = scored.info.description  # as load_scored(streaming=True) has it
    changes = {"max_length": 16, "monotone": True, "guard": None}
    ours = trained(
        tmp_path / "a", tokenizer, stream, score_cache_dir=str(tmp_path / "c"), **changes
    )
    same(ours, trained(tmp_path / "b", tokenizer, load_from_disk(tmp_path / "scored"), **changes))
    assert not asked
    assert not ours.star_dss_state.kept_guard.loaded


def test_scores_that_only_some_rows_bring_are_not_said_to_be_the_guards(tmp_path, tokenizer):
    scored = score_dataset(prompt_completion(), tokenizer, guard="test-words", chunk_size=2)

    def rows():
        for i, row in enumerate(scored):
            names = ("input_ids", "labels", *(["star_scores"] if i > 3 else []))
            yield {name: row[name] for name in names}

    stream = IterableDataset.from_generator(rows)
    trained(tmp_path, tokenizer, stream, stream_buffer=4)
    data = json.loads((tmp_path / "out/star_dss.json").read_text())["data"]["train"]
    assert data["guard"] == "test-words and unknown (star_scores column given)"
    assert data["rows"] == 8


@pytest.mark.parametrize("score_eval", [True, False])
def test_evaluation_data_may_be_streams(tmp_path, tokenizer, score_eval, caplog):
    rows = prompt_completion()
    found = []
    for name, kind in (("a", lambda rows: rows), ("b", Dataset.to_iterable_dataset)):
        trainer = StarDSSTrainer(
            tiny_llama(len(tokenizer)),
            args=arguments(
                tmp_path / name, score_eval=score_eval, reference="copy", kl_estimator="full"
            ),
            train_dataset=rows,
            eval_dataset={"held": kind(rows.select(range(5)))},
            processing_class=tokenizer,
        )
        found.append([trainer.evaluate(), trainer.evaluate(kind(rows.select(range(6))))])
    for one, other in zip(*found, strict=True):
        for key in [key for key in one if key.endswith("loss") or "star_dss" in key]:
            assert one[key] == pytest.approx(other[key], abs=1e-6)


@pytest.mark.parametrize("stock", [SFTTrainer, Trainer])
def test_attach_takes_a_trainer_with_a_stream(tmp_path, tokenizer, stock, caplog):
    def rows():
        for row in score_dataset(prompt_completion(), tokenizer, guard="test-words"):
            yield {"input_ids": row["input_ids"], "labels": row["labels"]}

    found = []
    for name, data in (
        ("a", IterableDataset.from_generator(rows)),
        ("b", Dataset.from_list(list(rows()))),
    ):
        changes = {"train_sampling_strategy": "sequential", "dataloader_num_workers": 2}
        if stock is Trainer:
            cls, extra = TrainingArguments, {"data_collator": DataCollatorForSeq2Seq(tokenizer)}
        else:
            cls, extra = SFTConfig, {}
        changes["dataloader_prefetch_factor"] = 4
        args = arguments(tmp_path / name, cls, **changes)
        model = tiny_llama(len(tokenizer))
        trainer = stock(model, args=args, train_dataset=data, processing_class=tokenizer, **extra)
        attach(trainer, guard="test-words", chunk_size=2, reference="copy", stream_buffer=3)
        trainer.train()
        found.append(trainer)
    same(*found)
    assert "dataloader_num_workers is 2 and taken for 0" in caplog.text


REFUSED = {
    "precomputed": (
        {"reference": "precomputed"},
        ConfigError,
        "train data set is a stream, for whose rows",
    ),
    "probed": ({"trajectory": "probed"}, ConfigError, "a sample of all the data"),
    "buffer": ({"stream_buffer": 0}, ConfigError, "stream_buffer is 0"),
    "cut": ({"max_length": 2}, DataError, "a stream that gives no row"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_a_stream_cannot_go_with_is_refused(tmp_path, tokenizer, name):
    changes, error, words = REFUSED[name]
    with pytest.raises(error, match=words):
        make(tmp_path, tokenizer, prompt_completion().to_iterable_dataset(), **changes)


def test_only_what_is_read_must_have_one_form(tmp_path, tokenizer):
    def rows():
        for i, row in enumerate(prompt_completion()):
            yield {**row, "meta": i if i % 2 else {"source": str(i)}}

    def talks():
        yield {
            "messages": [{"role": "assistant", "content": "one"}],
            "input_ids": [1],
            "labels": [1],
        }
        yield {"messages": "two", "input_ids": [1], "labels": [1]}

    trainer = make(tmp_path, tokenizer, IterableDataset.from_generator(rows), **IN_ORDER)
    trainer.train()
    assert [row["meta"] for row in trainer.train_dataset][:2] == [{"source": "0"}, 1]
    with pytest.raises(DataError, match="The train stream: Row 0, 1: rows .* differ in form"):
        make(tmp_path, tokenizer, IterableDataset.from_generator(talks))


def test_a_stream_that_trains_nothing_is_refused(tmp_path, tokenizer):
    rows = [{"input_ids": [1, 2, 3], "labels": [-100] * 3}] * 4
    stream = Dataset.from_list(rows).to_iterable_dataset()
    with pytest.raises(DataError, match="None of the first 4 rows of the train stream"):
        make(tmp_path, tokenizer, stream, max_length=None, guard="test-words")


def test_a_stream_without_steps_is_refused(tmp_path, tokenizer):
    with pytest.raises(ValueError, match="max_steps"):
        make(tmp_path, tokenizer, prompt_completion().to_iterable_dataset(), max_steps=-1)


def test_a_stream_that_comes_late_needs_a_live_reference(tmp_path, tokenizer):
    trainer = make(tmp_path, tokenizer)
    with pytest.raises(ConfigError, match="reference of this run was computed before"):
        trainer.evaluate(prompt_completion().to_iterable_dataset())


@pytest.mark.parametrize("scored", [True, False])
def test_a_stream_that_takes_the_place_of_another_does_not_train(tmp_path, tokenizer, scored):
    stream = prompt_completion().to_iterable_dataset()
    trainer = make(tmp_path, tokenizer, stream)
    own = trainer.train_dataset
    trainer.train_dataset = own.map(lambda row: row) if scored else stream
    with pytest.raises(DataError, match="a stream that took the place"):
        trainer.train()


def test_a_row_that_is_changed_on_its_way_to_the_batch_stops_the_run(tmp_path, tokenizer):
    trainer = make(tmp_path, tokenizer, prompt_completion().to_iterable_dataset(), **IN_ORDER)
    stream, inner = trainer.star_dss_state.streams[0], trainer.train_dataset

    class Changed(IterableDataset):
        def __init__(self):
            super().__init__(inner._ex_iterable)

        def __iter__(self):
            for row in inner:
                yield {**row, "star_scores": [1.0] * len(row["star_scores"])}

    trainer.train_dataset = stream.dataset = trainer.star_dss_state.train_dataset = Changed()
    with pytest.raises(DataError, match="A row of a batch is not one that was scored"):
        trainer.train()


def test_rows_are_known_while_they_may_still_be_trained_on(tmp_path, tokenizer, monkeypatch):
    """Digests do not grow with the stream."""
    monkeypatch.setattr(known_rows, "_RECENT_ROWS", 6)
    data = {"prompt": [str(i) for i in range(48)], "completion": ANSWERS * 6}
    rows = Dataset.from_dict(data)
    trainer = trained(
        tmp_path, tokenizer, rows.to_iterable_dataset(), stream_buffer=1, max_steps=12
    )
    assert len(trainer.star_dss_state.rows._recent["train"]) == 12


def test_a_long_evaluation_in_the_midst_of_a_buffer_stops_nothing(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(known_rows, "_RECENT_ROWS", 6)
    data = {"prompt": [str(i) for i in range(64)], "completion": ANSWERS * 8}
    rows = Dataset.from_dict(data)
    trainer = StarDSSTrainer(
        tiny_llama(len(tokenizer)),
        args=arguments(tmp_path, eval_strategy="steps", eval_steps=1, stream_buffer=16),
        train_dataset=prompt_completion().to_iterable_dataset(),
        eval_dataset=rows.to_iterable_dataset(),
        processing_class=tokenizer,
    )
    trainer.train()
    assert trainer.state.global_step == 3


def test_a_guard_that_scores_nothing_stops_the_run_however_small_buffers_are(
    tmp_path, tokenizer, monkeypatch
):
    def fails(self, responses):
        raise GuardError("no such row", request=0)

    monkeypatch.setattr(WordGuard, "token_scores", fails)
    data = {"prompt": [str(i) for i in range(64)], "completion": ANSWERS * 8}
    stream = Dataset.from_dict(data).to_iterable_dataset()
    changes = {"stream_buffer": 2, "on_guard_error": "unsafe", "max_steps": 16}
    trainer = make(tmp_path, tokenizer, stream, **changes)
    with pytest.raises(GuardError, match="could not score a single one of 22 responses"):
        trainer.train()


@pytest.mark.parametrize("changed", ["workers", "dispatch"])
def test_settings_of_the_loader_that_are_changed_back_are_refused(tmp_path, tokenizer, changed):
    trainer = make(tmp_path, tokenizer, prompt_completion().to_iterable_dataset())
    if changed == "workers":
        trainer.args.dataloader_num_workers = 1
    else:
        trainer.accelerator.dataloader_config.dispatch_batches = True
    with pytest.raises(ConfigError, match="Set dataloader_num_workers=0 and dispatch_batches"):
        trainer.train()


def test_columns_that_the_first_row_lacks_do_not_disturb_packing(tmp_path, tokenizer):
    def rows():
        for i, row in enumerate(prompt_completion()):
            yield row | ({"source": str(i), "weight": i} if i > 3 else {})

    changes = {"packing": True, "max_length": 64, "stream_buffer": 8}
    ours = trained(tmp_path / "a", tokenizer, IterableDataset.from_generator(rows), **changes)
    same(ours, trained(tmp_path / "b", tokenizer, prompt_completion(), **changes))


@pytest.mark.parametrize("mixture", [False, True])
def test_the_command_line_streams(tmp_path, model_folder, mixture, capsys):
    data = tmp_path / "chat.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in conversations()))
    recipe = {
        "model_name_or_path": model_folder,
        "output_dir": str(tmp_path / "out"),
        "max_steps": 2,
        "per_device_train_batch_size": 2,
        "report_to": "none",
        "use_cpu": True,
        "bf16": False,
        "guard": "test-words",
        "chunk_size": 2,
        "stream_buffer": 4,
    }
    if mixture:
        recipe["datasets"] = [{"path": "json", "data_files": {"train": str(data)}}]
        recipe["streaming"] = True
    else:
        recipe |= {"dataset_name": str(data), "dataset_streaming": True}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(recipe))
    main(["--config", str(tmp_path / "run.yaml")])
    assert "of its first 4 rows: 8 responses scored" in capsys.readouterr().out
