"""Vision-language runs in TRL: rows are scored as text, and collators align the scores."""

import subprocess
import sys

import pytest

pytest.importorskip("trl")

import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from star_dss_trl import StarDSSTrainer
from support.paths import TESTS
from support.run_differences import history
from support.trl_runs import ANSWERS, PROMPTS, Stop, arguments, lora_config
from support.vision_models import MAKE, gemma3, smolvlm
from support.vision_runs import (
    asked_and_answered,
    batch_of,
    each_model,
    numbers,
    talk,
    talks,
    vision_trainer,
)

from star_dss_plugin.data.columns import SCORES_COLUMN
from star_dss_plugin.training.rows.raw_rows import FillerRows, RawRowsCollator


@each_model
@pytest.mark.parametrize("data", [talks, asked_and_answered])
def test_a_run_trains(tmp_path, capsys, caplog, name, data):
    trainer = vision_trainer(tmp_path, MAKE[name](), data())
    trainer.train()
    assert "STAR-DSS is active" in capsys.readouterr().out
    found = history(trainer)
    assert len(found) == 3
    assert found[-1][0] < found[0][0]
    assert "the guard reads the mark [image]" in caplog.text


def test_text_rows_train_as_they_do_without_a_processor(tmp_path):
    rows = [talk(p, a, 0) for p, a in zip(PROMPTS, ANSWERS, strict=True)]
    model, processor = smolvlm()
    late = vision_trainer(tmp_path, (model, processor), Dataset.from_list(rows))
    tokenizer = processor.tokenizer
    tokenizer.chat_template = processor.chat_template
    plain = StarDSSTrainer(
        smolvlm()[0],
        args=arguments(tmp_path, max_length=None),
        train_dataset=Dataset.from_list([{"messages": row["messages"]} for row in rows]),
        processing_class=tokenizer,
    )
    assert plain.star_dss_state.reference.kind == "precomputed"
    assert late.star_dss_state.reference.kind == "copy"
    one, two = batch_of(late, range(8)), batch_of(plain, range(8))
    for column in ("input_ids", "labels", SCORES_COLUMN):
        assert torch.equal(one[column], two[column])
    late.train()
    plain.train()
    assert numbers(late) == pytest.approx(numbers(plain), abs=1e-6)
    assert late.state.log_history[-2]["star_dss/kl"] > 0


@each_model
@pytest.mark.parametrize("estimator", ["k2", "full"])
def test_an_adapter_is_switched_off_for_the_reference(tmp_path, name, estimator):
    trainer = vision_trainer(tmp_path, MAKE[name](), talks(), lora_config(), kl_estimator=estimator)
    assert trainer.star_dss_state.reference.kind == "adapter"
    trainer.train()
    assert len(history(trainer)) == 3


@each_model
def test_a_named_reference_reads_images_too(tmp_path, name):
    parts = MAKE[name]()
    folder = tmp_path / "start"
    parts[0].save_pretrained(folder)
    parts[1].tokenizer.save_pretrained(folder)
    trainer = vision_trainer(tmp_path, parts, talks(), reference=str(folder))
    assert trainer.star_dss_state.reference.kind == "model"
    trainer.train()
    copied = vision_trainer(tmp_path, MAKE[name](), talks(), reference="copy")
    copied.train()
    assert numbers(trainer) == pytest.approx(numbers(copied), abs=1e-5)


def test_evaluation_data_is_scored_too(tmp_path):
    model, processor = smolvlm()
    trainer = StarDSSTrainer(
        model,
        args=arguments(tmp_path, max_length=None),
        train_dataset=talks(),
        eval_dataset=talks().select(range(4)),
        processing_class=processor,
    )
    one = trainer.evaluate()
    two = trainer.evaluate(talks().select(range(4)))
    assert one["eval_loss"] == pytest.approx(two["eval_loss"], abs=1e-6)
    assert trainer.star_dss_state.summaries["eval"].responses == 8


def test_adapters_on_both_towers_train(tmp_path):
    config = LoraConfig(r=4, target_modules="all-linear", exclude_modules=["lm_head"])
    trainer = vision_trainer(tmp_path, gemma3(), talks(), config)
    trainer.train()
    assert len(history(trainer)) == 3


def test_a_resumed_run_equals_one_that_was_not_stopped(tmp_path):
    whole = vision_trainer(tmp_path / "whole", smolvlm(), talks(), max_steps=4)
    whole.train()
    steps = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    first = vision_trainer(tmp_path / "parts", smolvlm(), talks(), **steps)
    first.add_callback(Stop())
    first.train()
    second = vision_trainer(tmp_path / "parts", smolvlm(), talks(), **steps)
    second.train(resume_from_checkpoint=True)
    assert numbers(second) == pytest.approx(numbers(whole), abs=1e-5)


RANK = """
import multiprocessing, os, sys
from pathlib import Path
sys.path[:0] = {paths!r}


def main():
    from support.guards import register_guard
    from support.vision_models import smolvlm
    from support.vision_runs import numbers, talks, vision_trainer

    register_guard()
    workers = dict(per_device_train_batch_size=2, dataloader_num_workers=1)
    trainer = vision_trainer(Path(sys.argv[1]), smolvlm(), talks(), **workers)
    trainer.train()
    if trainer.is_world_process_zero():
        print("NUMBERS", *numbers(trainer), flush=True)
    trainer.accelerator.end_training()
    os._exit(0)  # gloo's threads may abort a process that ends in the usual way


if __name__ == "__main__":
    multiprocessing.set_start_method("spawn")  # a worker that is forked beside threads may hang
    main()
"""


@pytest.mark.slow
def test_two_ranks_with_workers_train_as_one_process(tmp_path):
    alone = vision_trainer(tmp_path / "alone", smolvlm(), talks())
    alone.train()
    script = tmp_path / "rank.py"
    script.write_text(RANK.format(paths=[str(TESTS)]))
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [sys.executable, *launch, str(script), str(tmp_path / "two")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("NUMBERS")]
    assert list(map(float, line.split()[1:])) == pytest.approx(numbers(alone), abs=1e-5)


def test_a_trained_adapter_of_the_vision_tower_is_not_taken_for_a_new_one(tmp_path):
    """Text does not pass through the vision tower, so the adapter would look like a new one."""
    model, processor = gemma3()
    config = LoraConfig(r=4, target_modules=r".*vision_tower.*q_proj")
    model = get_peft_model(model, config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    trainer = vision_trainer(tmp_path, (model, processor), talks())
    assert trainer.star_dss_state.reference.kind == "copy"


class TwoRanks:
    """The collator of a run on two ranks, and its rows for batches without images."""

    def __init__(self, trainer):
        self.fillers = FillerRows()
        self.fillers.add(trainer.train_dataset)
        inner = trainer.data_collator
        args = (inner.inner, inner.alignment, inner.known)
        self.collator = RawRowsCollator(*args, self.fillers)


@each_model
def test_a_batch_without_images_gets_a_filler_row_on_two_ranks(tmp_path, name):
    """The filler row has an image, and no token of it is trained."""
    trainer = vision_trainer(tmp_path, MAKE[name](), talks(), reference="copy")
    collator = TwoRanks(trainer).collator
    rows = [trainer.train_dataset[i] for i in (1, 6)]
    plain, carried = trainer.data_collator(rows), collator(rows)
    assert "pixel_values" not in plain
    assert len(carried["pixel_values"])
    assert carried["input_ids"].shape[0] == 3
    width = plain["input_ids"].shape[1]
    for column in ("input_ids", "labels", SCORES_COLUMN):
        assert torch.equal(carried[column][:2, :width], plain[column])
    assert (carried["labels"][2] == -100).all()
    assert (carried[SCORES_COLUMN][2] == 1).all()
    images = collator([trainer.train_dataset[i] for i in (0, 1)])
    assert images["input_ids"].shape[0] == 2
    losses, passed = [], []
    for batch in (plain, carried, images):
        trainer.model.zero_grad()
        loss = trainer.compute_loss(trainer.model, trainer._prepare_inputs(dict(batch)))
        loss.backward()
        losses.append(float(loss))
        passed.append({n for n, p in trainer.model.named_parameters() if p.grad is not None})
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)
    assert passed[0] < passed[1] == passed[2]
