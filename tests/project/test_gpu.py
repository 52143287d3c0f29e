"""Tests that need a GPU: benchmarks/gpu.sh runs them, and without a GPU they are skipped."""

import importlib.util
import os
import subprocess

import pytest
import torch

pytest.importorskip("trl")

from datasets import Dataset
from support.engine_models import one_pass_per_sequence, prompts, shapes
from support.models import make_tokenizer, tiny_llama
from support.paths import ROOT
from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments

from star_dss_plugin import attach
from star_dss_plugin.engines.local import LocalEngine

DEVICE = os.environ.get("STAR_DSS_TEST_DEVICE", "cuda" if torch.cuda.is_available() else None)
on_device = pytest.mark.skipif(DEVICE is None, reason="needs a GPU")
LABELS = [11, 12]


def engine_model(dtype):
    model = tiny_llama(64, hidden_size=128, num_attention_heads=8, num_key_value_heads=4)
    return model.to(DEVICE, dtype).eval()


@on_device
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("attention", ["sdpa", "flex_attention"])
def test_shared_prefixes_equal_one_pass_per_sequence(dtype, attention):
    """On a GPU, FlexAttention is compiled."""
    if attention == "flex_attention" and DEVICE == "cpu":
        pytest.skip("FlexAttention is compiled on a GPU only")
    model = engine_model(dtype)
    model.set_attn_implementation(attention)
    exact = engine_model(torch.float32)
    engine = LocalEngine(model)
    for name, sequences in {**shapes(), "long": prompts()}.items():
        found = engine.label_logprobs([sequences], LABELS)[0]
        wanted = one_pass_per_sequence(exact, sequences, LABELS)
        alone = one_pass_per_sequence(model, sequences, LABELS)
        found, wanted, alone = (torch.as_tensor(x).float() for x in (found, wanted, alone))
        # The error may be twice that of one pass per sequence in the same precision.
        bound = 2e-4 + 2 * (alone - wanted).abs().max()
        assert (found - wanted).abs().max() < bound, name


def rows(tokenizer, length):
    """Return four equal rows of this length, with scores."""
    ids = tokenizer("the lazy dog is fine " * length)["input_ids"][:length]
    half = length // 2
    row = {
        "input_ids": ids,
        "labels": [-100] * half + ids[half:],
        "star_scores": [1.0] * half + [0.3] * (length - half),
        "attention_mask": [1] * length,
    }
    return Dataset.from_list([row] * 4)


def losses(folder, device, dtype, **changes):
    """Return the losses of three steps."""
    tokenizer = make_tokenizer()
    trainer = Trainer(
        tiny_llama(len(tokenizer), max_position_embeddings=2048).to(device, dtype),
        args=TrainingArguments(
            str(folder),
            max_steps=3,
            per_device_train_batch_size=2,
            learning_rate=1e-3,
            logging_steps=1,
            use_cpu=device == "cpu",
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
            **changes,
        ),
        train_dataset=rows(tokenizer, 1200),
        data_collator=DataCollatorForSeq2Seq(tokenizer),
        processing_class=tokenizer,
    )
    attach(trainer, score_cache_dir=str(folder / "cache")).train()
    return [line["loss"] for line in trainer.state.log_history if "grad_norm" in line]


@on_device
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_losses_equal_those_of_a_cpu(tmp_path, dtype):
    found = losses(tmp_path / "one", DEVICE, dtype)
    wanted = losses(tmp_path / "two", "cpu", torch.float32)
    assert found == pytest.approx(wanted, rel=3e-2 if dtype == torch.bfloat16 else 1e-3)


@on_device
@pytest.mark.skipif(importlib.util.find_spec("liger_kernel") is None, reason="needs Liger")
def test_losses_are_the_same_with_ligers_other_kernels(tmp_path):
    if DEVICE == "cpu":
        pytest.skip("Liger's kernels need a GPU")
    found = losses(tmp_path / "one", DEVICE, torch.float32, use_liger_kernel=True)
    wanted = losses(tmp_path / "two", DEVICE, torch.float32)
    assert found == pytest.approx(wanted, rel=1e-3)


def test_the_script_has_valid_syntax():
    subprocess.run(["bash", "-n", str(ROOT / "benchmarks/gpu.sh")], check=True)
