"""Triton kernels of Liger, and of Axolotl for LoRA, in runs with STAR-DSS.

Triton's interpreter computes them on a CPU. Runs are compared with those without the kernels.
"""

import importlib.util
import json
import os
import subprocess
import sys

import pytest
from axolotl_runs import KERNELS, LORA, PLUGIN, chat, configuration, single_turn, write_config
from support.models import make_tokenizer, tiny_llama
from support.paths import ROOT, TESTS
from support.verdict_guards import describe
from torch import nn

for package in ("triton", "liger_kernel"):
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"needs {package}, which Axolotl brings on Linux", allow_module_level=True)

pytestmark = pytest.mark.slow  # the interpreter takes minutes

LIGER = {
    "plugins": ["axolotl.integrations.liger.LigerPlugin", PLUGIN],
    "liger_rope": True,
    "liger_rms_norm": True,
    "liger_glu_activation": True,
    "liger_layer_norm": True,
    "liger_fused_linear_cross_entropy": True,
}
TARGETS = {
    "lora_target_linear": None,
    "lora_target_modules": [
        *("q_proj", "k_proj", "v_proj", "o_proj"),
        *("gate_proj", "up_proj", "down_proj", "embed_tokens"),
    ],
}


def block(**options):
    return {"guard": "test-words", "chunk_size": 2, "kl_coef": 2.0} | options


STREAM = {"streaming": True, "curriculum_sampling": True, "shuffle_merged_datasets": False}
ADAPTER = LORA | TARGETS | {"star_dss": block(reference="adapter")}


def logged_steps(folder):
    """Return what a run logged at each step, unrounded, from its checkpoint."""
    state = json.loads((folder / "out/checkpoint-2/trainer_state.json").read_text())
    return [
        {
            name: value
            for name, value in line.items()
            if name in ("loss", "grad_norm") or name.startswith("star_dss/")
        }
        for line in state["log_history"]
    ]


def llama_guard(folder):
    """Save a guard of the trained model's architecture, with biases that Liger's MLP lacks."""
    tokenizer = make_tokenizer()
    model = tiny_llama(len(tokenizer), seed=1, mlp_bias=True)
    for name, weight in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(weight)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return describe(folder)


@pytest.fixture(scope="module")
def runs(tmp_path_factory, model_dir, environment):
    """Train configurations with and without kernels; return their folder and the output."""
    folder = tmp_path_factory.mktemp("runs")
    # The guard of a stream scores rows while the model trains, when Liger has patched transformers.
    options = block(guard=llama_guard(folder / "guard"), reference=str(model_dir), stream_buffer=2)
    stream = STREAM | {"star_dss": options, "learning_rate": 2e-3}
    configs = {
        "stream": stream,
        "stream-kernels": stream | LIGER,
        "full": {},
        "full-kernels": LIGER,
        "lora": ADAPTER,
        "lora-kernels": ADAPTER | KERNELS,
        "lora-kernels-named": ADAPTER | KERNELS | {"star_dss": block(reference=str(model_dir))},
    }
    paths = []
    for name, changes in configs.items():
        settings = {
            **{"datasets": [chat(folder / "chat.jsonl", single_turn()[:4])]},
            **{"save_strategy": "steps", "save_steps": 2, "micro_batch_size": 2},
            **{"sequence_len": 128, "attn_implementation": "sdpa"},
            **changes,
        }
        config = configuration(folder / name, model_dir, **settings)
        paths.append(str(write_config(folder / name, config)))
    path = [ROOT, ROOT / "integrations", TESTS, environment["PYTHONPATH"]]
    done = subprocess.run(
        [sys.executable, str(TESTS / "integrations/axolotl/axolotl_interpreted.py"), *paths],
        env={**environment, "PYTHONPATH": os.pathsep.join(map(str, path))},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=900,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-6000:]
    return folder, done.stdout


@pytest.mark.parametrize(
    ("kernels", "stock"),
    [
        ("full-kernels", "full"),
        ("stream-kernels", "stream"),
        ("lora-kernels", "lora"),
        ("lora-kernels-named", "lora"),
    ],
)
def test_kernels_change_nothing(runs, kernels, stock):
    """Losses, gradient norms and metrics are equal, also with a named reference."""
    folder, _ = runs
    ours, theirs = logged_steps(folder / kernels), logged_steps(folder / stock)
    assert len(ours) == len(theirs) == 2
    assert theirs[1]["star_dss/kl"] > 1e-4
    for one, other in zip(ours, theirs):
        assert one == pytest.approx(other, rel=1e-5, abs=1e-5)


def test_the_kernels_were_used(runs):
    _, said = runs
    assert said.count("Patched attention class with LoRA optims: LlamaAttention") == 2
    assert said.count("Applying LIGER to llama") == 2
    assert said.count("liger_fused_linear_cross_entropy switched off") == 2
