"""Fused losses are switched off; logits are made a chunk of tokens at a time instead."""

import logging
import sys
import types

import pytest
import torch

pytest.importorskip("trl")

from support.models import tiny_llama
from support.run_differences import history
from support.trl_runs import prompt_completion, tiny_trainer
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments
from transformers.integrations import liger

from star_dss_plugin import attach

LIGER = "ignore:.*use_liger_kernel.*:FutureWarning"


@pytest.fixture
def liger_calls(monkeypatch):
    """Replace Liger, whose kernels need a GPU, and return the kernels that each call asks for."""
    found = []

    def apply(model, **kernels):
        found.append(kernels)
        if kernels.get("fused_linear_cross_entropy", True):
            model.forward = lambda *args, **kwargs: {"loss": torch.zeros(())}

    module = types.ModuleType("liger_kernel.transformers")
    module._apply_liger_kernel_to_instance = apply
    monkeypatch.setitem(sys.modules, "liger_kernel", types.ModuleType("liger_kernel"))
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers", module)
    monkeypatch.setattr(liger, "is_liger_kernel_available", lambda *args: True)
    return found


@pytest.mark.filterwarnings(LIGER)
@pytest.mark.parametrize("config", [None, {"rms_norm": True}, {"fused_linear_cross_entropy": True}])
def test_other_kernels_of_liger_stay_on(tmp_path, tokenizer, liger_calls, caplog, config):
    expected = tiny_trainer(tmp_path, tokenizer)
    expected.train()
    assert liger_calls == []
    with caplog.at_level(logging.WARNING):
        trainer = tiny_trainer(
            tmp_path, tokenizer, use_liger_kernel=True, liger_kernel_config=config
        )
    assert "switched off Liger's fused_linear_cross_entropy" in caplog.text
    trainer.train()
    assert liger_calls == [{**(config or {}), "fused_linear_cross_entropy": False}]
    assert history(trainer) == history(expected)


class LargestRows(TorchDispatchMode):
    """Record the largest number of rows of logits that one operation made."""

    def __init__(self, vocab):
        super().__init__()
        self.vocab, self.rows = vocab, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, tuple) else (made,):
            if isinstance(tensor, torch.Tensor) and tensor.dim() and tensor.shape[-1] == self.vocab:
                self.rows = max(self.rows, tensor.numel() // self.vocab)
        return made


def plain_trainer(tmp_path, tokenizer, **changes):
    rows = prompt_completion().map(
        lambda row: long_row(tokenizer), remove_columns=["prompt", "completion"]
    )
    trainer = Trainer(
        tiny_llama(len(tokenizer), max_position_embeddings=2048, tie_word_embeddings=False),
        args=TrainingArguments(
            str(tmp_path / "out"),
            per_device_train_batch_size=1,
            per_device_eval_batch_size=1,
            max_steps=1,
            use_cpu=True,
            report_to="none",
            save_strategy="no",
            **changes,
        ),
        train_dataset=rows.select(range(2)),
        eval_dataset=rows.select(range(1)),
        data_collator=DataCollatorForSeq2Seq(tokenizer),
        processing_class=tokenizer,
    )
    return attach(trainer, guard="test-words", chunk_size=400, segmenter="tokens")


def long_row(tokenizer):
    """Return a row of 1,400 tokens, half of them trained."""
    ids = tokenizer("the lazy dog is fine " * 400)["input_ids"][:1400]
    return {"input_ids": ids, "labels": [-100] * 700 + ids[700:], "attention_mask": [1] * 1400}


@pytest.mark.filterwarnings(LIGER)
@pytest.mark.parametrize("fused", [False, True])
def test_logits_are_made_one_chunk_at_a_time(tmp_path, tokenizer, liger_calls, fused):
    """In the check before the first step, in training and in evaluation (at most 512 rows)."""
    trainer = plain_trainer(tmp_path, tokenizer, use_liger_kernel=fused)
    with LargestRows(len(tokenizer)) as seen:
        trainer.train()
        measured = trainer.evaluate()
    assert 256 < seen.rows <= 512
    assert measured["eval_loss"] > 0
    assert len(liger_calls) == fused


def test_evaluation_makes_all_logits_for_compute_metrics(tmp_path, tokenizer):
    trainer = plain_trainer(tmp_path, tokenizer)
    alone = trainer.evaluate()["eval_loss"]
    shapes = []
    trainer.compute_metrics = lambda p: shapes.append(p.predictions.shape) or {}
    assert trainer.evaluate()["eval_loss"] == pytest.approx(alone, rel=1e-5)
    assert shapes == [(1, 1400, len(tokenizer))]
