"""Training resumes from complete checkpoints, and names the fault of incomplete ones."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from support.models import tiny_llama
from transformers import Trainer, TrainingArguments

from star_dss_plugin import CheckpointError, attach

TEXTS = ["hello world.", "a bad word", "how are you?", "the lazy dog is bad", "no!", "yes fine"]


def rows(tokenizer):
    ids = tokenizer(TEXTS)["input_ids"]
    return Dataset.from_dict(
        {
            "input_ids": ids,
            "labels": [[-100, *row[1:]] for row in ids],
            "star_scores": [[0.25] * len(row) for row in ids],
        }
    )


def trainer_in(folder, tokenizer, **changes):
    arguments = TrainingArguments(
        str(folder),
        max_steps=4,
        save_steps=2,
        per_device_train_batch_size=1,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        seed=1,
        **changes,
    )
    plain = Trainer(
        tiny_llama(len(tokenizer)),
        arguments,
        train_dataset=rows(tokenizer),
        processing_class=tokenizer,
    )
    return attach(plain, score_cache_dir=str(folder / "cache"))


@pytest.fixture(scope="module")
def trained(tmp_path_factory, tokenizer):
    folder = tmp_path_factory.mktemp("trained")
    trainer_in(folder, tokenizer).train()
    return folder


@pytest.fixture
def run(tmp_path, trained):
    """Return a folder with checkpoints 2 and 4 of a finished run."""
    shutil.copytree(trained, tmp_path / "run")
    return tmp_path / "run"


def error_of(run: Path, tokenizer, asked=True) -> str:
    with pytest.raises(CheckpointError) as caught:
        trainer_in(run, tokenizer).train(resume_from_checkpoint=asked)
    return str(caught.value)


LOST = ["trainer_state.json", "optimizer.pt", "scheduler.pt", "rng_state.pth"]


@pytest.mark.parametrize("name", LOST)
def test_what_a_killed_save_did_not_write_is_named(run, tokenizer, name):
    (run / "checkpoint-4" / name).unlink()
    said = error_of(run, tokenizer)
    assert f"checkpoint {run / 'checkpoint-4'}: it was not written to its end ({name}" in said
    assert "Remove that folder." in said
    assert f"The newest whole checkpoint is {run / 'checkpoint-2'}: resume from that one." in said


def test_weights_that_are_missing_are_named(run, tokenizer):
    (run / "checkpoint-4" / "model.safetensors").unlink()
    assert "(every file of weights is missing)" in error_of(run, tokenizer)


@pytest.mark.parametrize("keep", [0.0, 0.5, 0.99])
@pytest.mark.parametrize("name", [*LOST, "model.safetensors", "config.json"])
def test_what_was_half_written_is_named(run, tokenizer, name, keep):
    path = run / "checkpoint-4" / name
    data = path.read_bytes()
    path.write_bytes(data[: int(keep * len(data))])
    assert f"({name} cannot be read to its end)" in error_of(run, tokenizer)


def test_a_part_of_the_weights_that_is_missing_is_named(run, tokenizer):
    folder = run / "checkpoint-4"
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    weights = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weights}))
    assert "(model-00002-of-00002.safetensors is missing)" in error_of(run, tokenizer)


def test_only_a_whole_checkpoint_is_recommended(run, tokenizer):
    (run / "checkpoint-4" / "trainer_state.json").unlink()
    (run / "checkpoint-2" / "optimizer.pt").write_bytes(b"")
    said = error_of(run, tokenizer, str(run / "checkpoint-4"))
    assert "no whole checkpoint beside it, so start without resume_from_checkpoint" in said


def test_the_advice_works(run, tokenizer):
    (run / "checkpoint-4" / "optimizer.pt").unlink()
    error_of(run, tokenizer)
    shutil.rmtree(run / "checkpoint-4")
    trainer = trainer_in(run, tokenizer)
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 4
    assert (run / "checkpoint-4" / "trainer_state.json").exists()


def test_a_checkpoint_that_is_not_there_is_named(run, tokenizer, tmp_path):
    said = error_of(run, tokenizer, "true")
    assert "resume_from_checkpoint is 'true', which is no folder" in said
    assert f"The newest whole checkpoint is {run / 'checkpoint-4'}" in said
    said = error_of(tmp_path / "new", tokenizer)
    assert f"{tmp_path / 'new'} holds no checkpoint" in said


def test_a_finished_run_that_is_resumed_is_finished(tmp_path, tokenizer):
    """The run was killed between its last checkpoint and saving; 4 steps are part of an epoch."""
    constant = {"lr_scheduler_type": "constant", "learning_rate": 0.1}
    finished = trainer_in(tmp_path, tokenizer, **constant)
    finished.train()
    resumed = trainer_in(tmp_path, tokenizer, **constant)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 4
    for a, b in zip(finished.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_checkpoint_of_the_model_alone_is_whole(tmp_path, tokenizer):
    trainer_in(tmp_path, tokenizer, save_only_model=True).train()
    shutil.rmtree(tmp_path / "checkpoint-4")
    trainer = trainer_in(tmp_path, tokenizer)
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 4


def test_other_files_are_nobodys_business(run, tokenizer):
    """Callbacks may write their own files to a checkpoint."""
    for name in ("vocab.bin", "data.pt", "other.pth"):
        (run / "checkpoint-2" / name).write_bytes(b"no zip archive")
    (run / "checkpoint-2" / "other.index.json").write_text("{}")
    trainer = trainer_in(run, tokenizer)
    trainer.train(resume_from_checkpoint=str(run / "checkpoint-2"))
    assert trainer.state.global_step == 4


def test_an_optimizer_is_no_model(run, tokenizer):
    folder = run / "checkpoint-4"
    (folder / "optimizer.pt").rename(folder / "optimizer.bin")
    (folder / "model.safetensors").unlink()
    assert "(every file of weights is missing)" in error_of(run, tokenizer)
