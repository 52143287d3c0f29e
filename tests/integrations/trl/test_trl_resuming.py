"""TRL: runs that resume, and runs that share a cache."""

import errno
import os
import sys
import time

import pytest
import torch
from datasets import load_from_disk

pytest.importorskip("trl")
from support.forks import FORKS
from support.guards import WordGuard, register_guard
from support.run_differences import history
from support.trl_runs import Stop, prompt_completion, tiny_trainer
from transformers import AutoModelForCausalLM, AutoTokenizer

from star_dss_plugin import CheckpointError, ConfigError
from star_dss_plugin.cli import app as cli
from star_dss_plugin.data.cache import ScoreCache
from star_dss_plugin.data.columns import REF_COLUMN, SCORES_COLUMN
from star_dss_plugin.data.provenance import provenance_of


def test_resuming_equals_never_having_stopped(tmp_path, tokenizer):
    config = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "kl_coef": 2.0}
    whole = tiny_trainer(tmp_path / "a", tokenizer, **config)
    whole.train()
    stopped = tiny_trainer(tmp_path / "b", tokenizer, **config)
    stopped.add_callback(Stop())
    stopped.train()
    resumed = tiny_trainer(tmp_path / "b", tokenizer, **config)
    resumed.train(resume_from_checkpoint=True)
    assert history(resumed)[-2:] == history(whole)[-2:]
    for a, b in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_checkpoint_given_as_the_model_is_no_reference(tmp_path, tokenizer):
    """The reference would be the trained model, so the KL term would not hold the policy back."""
    config = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1}
    tiny_trainer(tmp_path, tokenizer, **config).train()
    record = (tmp_path / "out" / "star_dss.json").read_text()
    checkpoint = str(tmp_path / "out" / "checkpoint-1")
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    with pytest.raises(ConfigError, match="another model than the one that this run began with"):
        tiny_trainer(tmp_path, tokenizer, model=model, **config).train(
            resume_from_checkpoint=checkpoint
        )
    assert (tmp_path / "out" / "star_dss.json").read_text() == record
    tiny_trainer(tmp_path, tokenizer, **config).train(resume_from_checkpoint=checkpoint)


def test_an_incomplete_checkpoint_is_named(tmp_path, tokenizer):
    config = {"max_steps": 2, "save_strategy": "steps", "save_steps": 2}
    tiny_trainer(tmp_path, tokenizer, **config).train()
    (tmp_path / "out" / "checkpoint-2" / "trainer_state.json").unlink()
    with pytest.raises(CheckpointError, match="checkpoint-2: it was not written to its end"):
        tiny_trainer(tmp_path, tokenizer, **config).train(resume_from_checkpoint=True)


def test_a_complete_cache_may_be_read_only(tmp_path, tokenizer, monkeypatch):
    before = tiny_trainer(tmp_path, tokenizer).train_dataset

    def refuse(self, *args):
        raise OSError(errno.EROFS, "Read-only file system")

    for writer in ("lock", "flush", "_write"):
        monkeypatch.setattr(ScoreCache, writer, refuse)
    again = tiny_trainer(tmp_path, tokenizer).train_dataset
    for column in (SCORES_COLUMN, REF_COLUMN):
        assert list(again[column]) == list(before[column])


def score_in_process(by, folder, model_dir, start):
    os.environ["STAR_DSS_CACHE"] = str(folder / "cache")
    register_guard()
    answer = WordGuard.token_scores
    WordGuard.token_scores = lambda *args: time.sleep(0.5) or answer(*args)
    start.wait()
    if by == "command":
        sys.argv = [
            "star-dss",
            "score",
            str(folder / "chat.jsonl"),
            "--guard",
            "test-words",
            "-q",
            "--chunk-size",
            "2",
            "--tokenizer",
            str(model_dir),
            "-o",
            str(folder / by),
        ]
        cli.main()
    else:
        trainer = tiny_trainer(folder, AutoTokenizer.from_pretrained(model_dir))
        trainer.train_dataset.save_to_disk(folder / by)


def test_a_trainer_and_the_command_score_the_same_data_at_once(tmp_path, model_dir):
    prompt_completion().to_json(tmp_path / "chat.jsonl")
    start = FORKS.Barrier(2)
    both = [
        FORKS.Process(target=score_in_process, args=(by, tmp_path, model_dir, start))
        for by in ("command", "trainer")
    ]
    for process in both:
        process.start()
    for process in both:
        process.join()
    assert [process.exitcode for process in both] == [0, 0]
    command, trainer = (load_from_disk(tmp_path / by) for by in ("command", "trainer"))
    for column in ("input_ids", "labels", SCORES_COLUMN):
        assert list(command[column]) == list(trainer[column])
    assert provenance_of(command)["guard_identity"] == provenance_of(trainer)["guard_identity"]
    assert len(list((tmp_path / "cache").rglob("*.shard"))) == 2  # scores, reference
