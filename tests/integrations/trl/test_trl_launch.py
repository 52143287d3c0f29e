"""`accelerate launch -m star_dss_trl.sft` with recipes like those of alignment-handbook.

They differ from the published ones in the model, the data and the settings that a CPU needs.
"""

import importlib.util
import json
import os
import re
import subprocess
import sys

import pytest

pytest.importorskip("trl")

import yaml
from support.guards import WordGuard, write_words_plugin
from support.paths import ROOT, TESTS
from support.trl_runs import ANSWERS, PROMPTS
from transformers import AutoModelForCausalLM

pytestmark = pytest.mark.slow

ACCELERATE = {
    "compute_environment": "LOCAL_MACHINE",
    "debug": False,
    "downcast_bf16": "no",
    "machine_rank": 0,
    "main_training_function": "main",
    "mixed_precision": "no",  # published: bf16
    "num_machines": 1,
    "num_processes": 2,  # published: 8
    "rdzv_backend": "static",
    "same_network": True,
    "use_cpu": True,
}


def zero(stage):
    config = {"zero_stage": stage, "offload_optimizer_device": "none"}
    if stage == 3:
        config |= {
            "offload_param_device": "none",
            "zero3_init_flag": True,
            "zero3_save_16bit_model": True,
        }
    return {"distributed_type": "DEEPSPEED", "deepspeed_config": config}


FSDP2 = {
    "distributed_type": "FSDP",
    "fsdp_config": {
        "fsdp_version": 2,
        "fsdp_auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
        "fsdp_reshard_after_forward": True,
        "fsdp_state_dict_type": "FULL_STATE_DICT",
        "fsdp_cpu_ram_efficient_loading": True,
    },
}
RUNS = {
    "fsdp2": (FSDP2, {"packing": True}),
    "zero2": (
        zero(2),
        {"use_peft": True, "lora_r": 4, "lora_target_modules": ["q_proj", "v_proj"]},
    ),
    # Without a GPU TRL before 1.10 places models (device_map="auto"), which ZeRO-3 refuses.
    "zero3": (zero(3), {"model_init_kwargs": {"device_map": None}}),
}
# Without `shard_on_cpus` (sharding_kinds.py) accelerate does not shard over gloo. DeepSpeed would
# compile its communication operations.
SITE = """
import os, sys
sys.path.insert(0, {tests!r})
if os.environ.get("LOCAL_RANK"):
    from support import sharding_kinds
    if os.environ.get("ACCELERATE_USE_FSDP") == "true":
        import torch
        torch.distributed.init_process_group("gloo")
        sharding_kinds.shard_on_cpus()
    else:
        import deepspeed
        deepspeed.ops.__compatible_ops__.clear()
"""
MAIN = """
import os, sys
from star_dss_trl.sft import main
main()
import torch
from accelerate.state import AcceleratorState
print(AcceleratorState().distributed_type, flush=True)
if torch.distributed.is_initialized():
    torch.distributed.barrier()
    sys.stdout.flush()
    os._exit(0)  # gloo's threads may abort a process that ends in the usual way
"""


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """Return a folder for PYTHONPATH with the tests' guard as an installed plugin."""
    folder = write_words_plugin(tmp_path_factory.mktemp("site"))
    (folder / "launched.py").write_text(SITE.format(tests=str(TESTS)) + MAIN)
    return folder


def launch_recipe(folder, model_dir, site, launcher, changes):
    """Launch a recipe; check that it succeeds, and return the finished process."""
    rows = [
        {"messages": [{"role": "user", "content": p}, {"role": "assistant", "content": a}]}
        for p, a in zip(PROMPTS, ANSWERS)
    ]
    folder.mkdir(exist_ok=True)
    data = folder / "chat.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = {
        "model_name_or_path": str(model_dir),
        "dtype": "float32",  # published: bfloat16
        "attn_implementation": "sdpa",  # published: flash_attention_2
        "dataset_name": str(data),
        "bf16": False,
        "use_cpu": True,
        "do_eval": False,
        "eval_strategy": "no",
        "gradient_accumulation_steps": 2,
        "gradient_checkpointing": True,
        "gradient_checkpointing_kwargs": {"use_reentrant": False},
        "learning_rate": 1.0e-3,
        "log_level": "info",
        "logging_steps": 1,
        "logging_strategy": "steps",
        "lr_scheduler_type": "cosine",
        "max_length": 128,
        "max_steps": 2,
        "num_train_epochs": 1,
        "output_dir": str(folder / "out"),
        "per_device_train_batch_size": 1,
        "push_to_hub": False,
        "report_to": "none",
        "save_strategy": "no",
        "seed": 42,
        "warmup_steps": 0.1,  # published: warmup_ratio, which transformers 5 has renamed
        "loss_type": "star_dss",
        "guard": WordGuard.name,
        "chunk_size": 2,
        "score_cache_dir": str(folder / "cache"),
        **changes,
    }
    (folder / "accelerate.yaml").write_text(yaml.safe_dump(ACCELERATE | launcher))
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    path = [str(site), str(ROOT), str(ROOT / "integrations"), str(TESTS)]
    done = subprocess.run(
        [
            *(sys.executable, "-m", "accelerate.commands.launch"),
            *("--config_file", str(folder / "accelerate.yaml"), "--main_process_port", "0"),
            *(str(site / "launched.py"), "--config", str(folder / "recipe.yaml")),
        ],
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join([*path, os.environ.get("PYTHONPATH", "")]),
            "OMP_NUM_THREADS": "1",
            "DS_ACCELERATOR": "cpu",
        },
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:] + done.stdout[-1000:]
    assert done.stdout.count("STAR-DSS is active: loss_type=star_dss") == 1
    return done


@pytest.mark.parametrize("kind", RUNS)
def test_a_published_recipe_trains(tmp_path, model_dir, site, kind):
    launcher, changes = RUNS[kind]
    if "deepspeed_config" in launcher and importlib.util.find_spec("deepspeed") is None:
        pytest.skip("needs DeepSpeed (pip install 'star-dss-plugin[test]')")
    done = launch_recipe(tmp_path, model_dir, site, launcher, changes)
    assert done.stdout.count(f"DistributedType.{launcher['distributed_type']}") == 2
    record = json.loads((tmp_path / "out/star_dss.json").read_text())
    assert record["data"]["train"]["responses"] == 8
    if "use_peft" not in changes:
        AutoModelForCausalLM.from_pretrained(tmp_path / "out")


# A stand-in for Liger in runs without a GPU: transformers checks that the package is installed, and
# which kernels this function accepts.
LIGER = """
import logging
def _apply_liger_kernel_to_instance(model, **kernels):
    logging.getLogger("liger_kernel").warning("stand-in: replaces %s", sorted(kernels.items()))
    if kernels.get("fused_linear_cross_entropy", True):
        model.forward = lambda *args, **kwargs: {"loss": 0.0}
"""


@pytest.fixture
def liger(tmp_path, monkeypatch):
    """Put a stand-in on PYTHONPATH if Liger is not installed; return the line that Liger logs."""
    if importlib.util.find_spec("liger_kernel"):
        return "Applying Liger kernels to model instance"
    package = tmp_path / "liger" / "liger_kernel"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "transformers.py").write_text(LIGER)
    info = tmp_path / "liger" / "liger_kernel-0.8.1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: liger-kernel\nVersion: 0.8.1\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "liger"), prepend=os.pathsep)
    return "stand-in: replaces [('cross_entropy', False), ('fused_linear_cross_entropy', False)"


def losses(done):
    return re.findall(r"'loss': '?([^',]+)'?, 'grad_norm': '?([^',]+)'?", done.stdout)


def test_a_recipe_with_liger_trains_with_the_loss_of_star_dss(tmp_path, model_dir, site, liger):
    """Only Liger's fused loss is requested, because its other kernels need a GPU."""
    launcher = {"distributed_type": "NO", "num_processes": 1}
    without = launch_recipe(tmp_path / "without", model_dir, site, launcher, {})
    kernels = {"rope": False, "rms_norm": False, "swiglu": False, "cross_entropy": False}
    fused = {"use_liger_kernel": True, "liger_kernel_config": kernels}
    done = launch_recipe(tmp_path / "with", model_dir, site, launcher, fused)
    said = done.stdout + done.stderr
    assert "STAR-DSS has switched off Liger's fused_linear_cross_entropy" in said
    assert liger in said
    assert len(losses(done)) == 2
    assert losses(done) == losses(without)
