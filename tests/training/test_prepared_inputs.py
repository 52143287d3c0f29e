"""Scores and reference reach the loss as precise as they were computed."""

from types import SimpleNamespace

import pytest

pytest.importorskip("trl")

import torch
from accelerate.state import AcceleratorState
from support.trl_runs import tiny_trainer

COLUMNS = ("star_scores", "ref_logps")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_deepspeed_in_16_bits_does_not_round_them(tmp_path, tokenizer, monkeypatch, dtype):
    trainer = tiny_trainer(tmp_path, tokenizer)
    batch = next(iter(trainer.get_train_dataloader()))
    plugin = SimpleNamespace(hf_ds_config=SimpleNamespace(dtype=lambda: dtype))
    monkeypatch.setattr(AcceleratorState, "deepspeed_plugin", plugin)
    monkeypatch.setattr(trainer, "is_deepspeed_enabled", True)
    other = torch.ones(2)
    prepared = trainer._prepare_inputs({**batch, "other": other})
    assert prepared["other"].dtype == dtype  # as the Trainer does it
    for name in COLUMNS:
        assert prepared[name].dtype == torch.float32, name
        assert torch.equal(prepared[name], batch[name]), name
    assert (batch["ref_logps"].to(dtype) != batch["ref_logps"]).any()
