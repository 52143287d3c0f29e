"""Runs of Axolotl in the process of the tests, by its own functions.

The tests with Axolotl have a folder of their own, and `make test-axolotl` runs them in a process of
their own, because importing Axolotl patches transformers and torch.
"""

import importlib.metadata
import importlib.util
import json
import os
import subprocess
import sys

os.environ.setdefault("AXOLOTL_DO_NOT_TRACK", "1")

import pytest

pytest.importorskip("axolotl", reason="needs Axolotl: make test-axolotl")

import axolotl.utils.data.sft
import transformers
import yaml
from axolotl.cli.config import load_cfg
from axolotl.common.datasets import load_datasets
from axolotl.integrations.base import PluginManager
from axolotl.train import setup_model_and_trainer
from support.paths import ROOT, TESTS
from support.sharding_kinds import deepspeed_config

VERSION = tuple(map(int, importlib.metadata.version("axolotl").split(".")[:2]))
PLUGIN = "star_dss_axolotl.StarDSSPlugin"
PROMPTS = ["how are you?", "is this bad?", "1 + 1 =", "hello world. who is lazy?"] * 2
ANSWERS = [
    "i am fine, thank you.",
    "no! it is a bad word, and words are words.",
    "2",
    "the dog is lazy",
    "the quick brown fox jumps",
    "bad",
    "it's 2 o'clock",
    "good words keep it safe",
]
LORA = {
    "adapter": "lora",
    "lora_r": 4,
    "lora_alpha": 8,
    "lora_target_linear": True,
    "lora_mlp_kernel": False,
    "lora_qkv_kernel": False,
    "lora_o_kernel": False,
    "lora_embedding_kernel": False,
}
KERNELS = {name: True for name in LORA if name.endswith("_kernel")}


def single_turn():
    return [
        {
            "messages": [
                {"role": "user", "content": prompt},
                {"role": "assistant", "content": answer},
            ]
        }
        for prompt, answer in zip(PROMPTS, ANSWERS)
    ]


def multi_turn():
    return [
        {
            "messages": [
                {"role": "system", "content": "be kind"},
                {"role": "user", "content": prompt},
                {"role": "assistant", "content": answer},
                {"role": "user", "content": "and " + prompt},
                {"role": "assistant", "content": answer + " yes"},
            ]
        }
        for prompt, answer in zip(PROMPTS, ANSWERS)
    ]


def write_rows(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def chat(path, rows=None, **changes):
    """Write conversations to a file; return their entry of `datasets`."""
    file = write_rows(path, rows if rows is not None else single_turn())
    return {"path": file, "ds_type": "json", "type": "chat_template", **changes}


def configuration(folder, model_dir, **changes):
    """Return the contents of a YAML that trains the tiny model on a CPU."""
    config = {
        "base_model": str(model_dir),
        "dataset_prepared_path": str(folder / "prepared"),
        "output_dir": str(folder / "out"),
        "sequence_len": 512,
        "sample_packing": False,
        "attn_implementation": "eager",
        "micro_batch_size": 8,
        "gradient_accumulation_steps": 1,
        "max_steps": 2,
        "num_epochs": 10,
        "learning_rate": 1e-2,
        "optimizer": "adamw_torch",
        "lr_scheduler": "constant",
        "bf16": False,
        "fp16": False,
        "dataset_num_proc": 1,
        "logging_steps": 1,
        "val_set_size": 0.0,
        "save_strategy": "no",
        "seed": 1,
        "plugins": [PLUGIN],
        "star_dss": {"guard": "test-words", "chunk_size": 2, "kl_coef": 2.0},
        **changes,
    }
    if "datasets" not in config:
        config["datasets"] = [chat(folder / "chat.jsonl")]
    return {key: value for key, value in config.items() if value is not None}


def write_config(folder, config):
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def loaded(folder, config):
    """Return the configuration as Axolotl loads and validates it, with its plugins."""
    PluginManager.get_instance().plugins.clear()
    return load_cfg(str(write_config(folder, config)))


def data_of(cfg):
    """Return the data sets as `axolotl train` gets them."""
    meta = PluginManager.get_instance().load_datasets(cfg) if cfg.plugins else None
    return meta if meta is not None else load_datasets(cfg=cfg)


def trainer_of(folder, config):
    cfg = loaded(folder, config)
    transformers.set_seed(1)  # a new adapter is drawn before the Trainer sets its seed
    return setup_model_and_trainer(cfg, data_of(cfg))[0]


def trained(folder, config):
    trainer = trainer_of(folder, config)
    trainer.train()
    return trainer


def train_in_one_process(folder, config):
    """Train, and save the model in `folder / "final"`; return the logs and evaluation losses."""
    trainer = trained(folder, config)
    trainer.save_model(str(folder / "final"))
    history = trainer.state.log_history
    logs = [(h["step"], h["loss"], h["grad_norm"]) for h in history if "grad_norm" in h]
    return logs, [h["eval_loss"] for h in history if "eval_loss" in h]


def output_of(process):
    """Wait for a command; check that it succeeds, and return its output."""
    out, _ = process.communicate(timeout=300)
    assert process.returncode == 0, out[-6000:]
    return out


def zero_file(folder, kind):
    """Write DeepSpeed's configuration of a kind (`zero2`); return its path."""
    path = folder / f"{kind}.json"
    path.write_text(json.dumps(deepspeed_config(int(kind[4]))))
    return str(path)


def on_two_ranks(folder, site, kind, configs, ranks=2):
    """Train configurations on several ranks; return the results of each, and the process."""
    if kind.startswith("zero") and importlib.util.find_spec("deepspeed") is None:
        pytest.skip("needs DeepSpeed (pip install 'star-dss-plugin[test]')")
    path = [site, ROOT, ROOT / "integrations", TESTS, os.environ.get("PYTHONPATH", "")]
    done = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
            *("--nproc_per_node", str(ranks), str(TESTS / "integrations/axolotl/axolotl_ranks.py")),
            *(kind, str(folder / "results"), *map(str, configs)),
        ],
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join(map(str, path)),
            "OMP_NUM_THREADS": "1",
            "STAR_DSS_CACHE": str(folder / "star-dss-cache"),
        },
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    results = [folder / f"results-{rank}.json" for rank in range(ranks)]
    assert all(path.exists() for path in results), done.stderr[-6000:] + done.stdout[-2000:]
    return [json.loads(path.read_text()) for path in results], done


@pytest.fixture(autouse=True)
def _light_runs(monkeypatch, tmp_path):
    """Write no prepared data, which takes a process and 15 s; run in a temporary folder."""
    monkeypatch.setattr(axolotl.utils.data.sft, "save_preprocessed_dataset", lambda *a, **k: None)
    monkeypatch.chdir(tmp_path)
