"""Streams in TRL train as a data set of the same rows does."""

import json

import pytest
import yaml

pytest.importorskip("trl")

from datasets import Dataset, IterableDataset, interleave_datasets
from star_dss_trl import StarDSSTrainer
from star_dss_trl.sft import main
from support.models import tiny_llama
from support.trl_runs import arguments, conversations, lora_config, prompt_completion, tiny_trainer
from support.trl_streams import IN_ORDER, assert_same_history, train_in_order
from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments
from trl import SFTConfig, SFTTrainer

from star_dss_plugin import DataError, attach, score_dataset

WRAPPED = {"packing": True, "packing_strategy": "wrapped", "max_length": 32, "stream_buffer": 8}


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
def test_a_stream_trains_as_a_data_set_of_its_rows(
    tmp_path, tokenizer, model_dir, rows, reference, lora, changes
):
    changes = {
        **changes,
        "reference": str(model_dir) if reference == "MODEL" else reference,
        "kl_coef": 2.0,
        "learning_rate": 2e-3,
        "peft_config": lora_config() if lora else None,
    }
    ours = train_in_order(tmp_path / "a", tokenizer, rows().to_iterable_dataset(), **changes)
    twin = train_in_order(tmp_path / "b", tokenizer, rows(), **changes)
    assert_same_history(ours, twin)
    assert ours.state.log_history[2]["star_dss/kl"] > 1e-6
    data = json.loads((tmp_path / "a/out/star_dss.json").read_text())["data"]["train"]
    whole = json.loads((tmp_path / "b/out/star_dss.json").read_text())["data"]["train"]
    for name in ("rows", "responses", "trained_tokens", "below_threshold"):
        assert data[name] == whole[name]
    for name in ("guard_identity", "prefixes", "raw_contexts", "guard_errors"):
        assert data["provenance"][name] == whole["provenance"][name]


def test_scores_are_those_of_score_dataset_to_the_byte(tmp_path, tokenizer):
    trainer = tiny_trainer(tmp_path, tokenizer, conversations().to_iterable_dataset(), **IN_ORDER)
    scored = score_dataset(conversations(), tokenizer, guard="test-words", chunk_size=2)
    for ours, wanted in zip(trainer.train_dataset, scored, strict=True):
        for name in ("input_ids", "labels", "star_scores"):
            assert ours[name] == wanted[name]


def test_an_evaluation_set_may_be_named_like_the_training_set(tmp_path, tokenizer):
    trainer = StarDSSTrainer(
        tiny_llama(len(tokenizer)),
        args=arguments(tmp_path, **IN_ORDER),
        train_dataset=prompt_completion().to_iterable_dataset(),
        eval_dataset={"train": prompt_completion().select(range(4))},
        processing_class=tokenizer,
    )
    trainer.train()
    assert trainer.star_dss_state.reference.kind == "copy"
    assert trainer.evaluate()["eval_train_star_dss/mean_score"] < 0.9


def test_mapped_shuffled_and_interleaved_streams_train(tmp_path, tokenizer):
    rows = prompt_completion()
    one, two = rows.select(range(4)).to_iterable_dataset(), rows.select(range(4, 8))
    stream = interleave_datasets(
        [one, two.to_iterable_dataset()], stopping_strategy="all_exhausted"
    )
    stream = stream.map(lambda row: row).shuffle(seed=3, buffer_size=4)
    as_read = Dataset.from_list(list(stream))
    assert as_read["completion"] != rows["completion"]
    assert_same_history(
        train_in_order(tmp_path / "a", tokenizer, stream, max_steps=2),
        train_in_order(tmp_path / "b", tokenizer, as_read, max_steps=2),
    )


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
    assert_same_history(*found)
    assert "dataloader_num_workers is 2 and taken for 0" in caplog.text


def test_only_columns_that_are_read_must_have_one_type(tmp_path, tokenizer):
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

    trainer = tiny_trainer(tmp_path, tokenizer, IterableDataset.from_generator(rows), **IN_ORDER)
    trainer.train()
    assert [row["meta"] for row in trainer.train_dataset][:2] == [{"source": "0"}, 1]
    with pytest.raises(DataError, match="The train stream: Row 0, 1: rows .* differ in form"):
        tiny_trainer(tmp_path, tokenizer, IterableDataset.from_generator(talks))


def test_rows_with_more_columns_than_the_first_are_packed(tmp_path, tokenizer):
    def rows():
        for i, row in enumerate(prompt_completion()):
            yield row | ({"source": str(i), "weight": i} if i > 3 else {})

    changes = {"packing": True, "max_length": 64, "stream_buffer": 8}
    ours = train_in_order(
        tmp_path / "a", tokenizer, IterableDataset.from_generator(rows), **changes
    )
    assert_same_history(
        ours, train_in_order(tmp_path / "b", tokenizer, prompt_completion(), **changes)
    )


@pytest.mark.parametrize("mixture", [False, True])
def test_the_command_line_trains_on_streams(tmp_path, model_dir, mixture, capsys):
    data = tmp_path / "chat.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in conversations()))
    recipe = {
        "model_name_or_path": str(model_dir),
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
