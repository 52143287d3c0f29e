"""Train the demonstration's aligned start: a LoRA adapter with which SmolLM2-135M refuses.

Usage: python scripts/make_aligned_adapter.py DATA_DIR [--output FOLDER]

SmolLM2-135M-Instruct answers most harmful requests, so it has no alignment that training could
remove. This script teaches it to decline them: plain SFT on `align_sft.jsonl` of the developers'
data (see NOTICE for the sources). Only MIT, Apache-2.0 and CC-BY-4.0 rows are used; of eight rows
three are refusals, three are plain tasks and two are questions that look dangerous and are
answered. Seeds are fixed; a run takes about ten minutes on two cores. The weights are stored in
float16.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from transformers import set_seed
from trl import SFTConfig, SFTTrainer

from star_dss_plugin.smollm2 import load_smollm2

OPEN = ("MIT", "Apache-2.0", "CC-BY-4.0")
SEED = 5
STEPS, ROWS_A_STEP = 150, 8
LENGTH = 160
DEFAULT = (
    Path(__file__).resolve().parents[1]
    / "integrations"
    / "star_dss_trl"
    / "demo_assets"
    / "aligned_adapter"
)


def conversations(folder: Path) -> list[dict[str, Any]]:
    """Return as many rows as the steps need, in the order in which they are learned."""
    with (folder / "align_sft.jsonl").open(encoding="utf-8") as file:
        rows = [row for row in map(json.loads, file) if row["licence"] in OPEN]
    draw = random.Random(SEED)
    pools = {
        "refusal": [r for r in rows if r["kind"] == "harmful->refusal"],
        "sensitive": [r for r in rows if r["source"] == "caia-ai-safety"],
        "plain": [
            r for r in rows if r["kind"] != "harmful->refusal" and r["source"] != "caia-ai-safety"
        ],
    }
    for pool in pools.values():
        draw.shuffle(pool)
    order = ("refusal", "plain", "sensitive", "refusal", "plain", "refusal", "plain", "sensitive")
    taken = []
    for i in range(STEPS * ROWS_A_STEP):
        pool = pools[order[i % len(order)]]
        pool.append(pool.pop(0))
        taken.append(pool[-1])
    return [
        {
            "prompt": [{"role": "user", "content": row["prompt"]}],
            "completion": [{"role": "assistant", "content": row["response"]}],
        }
        for row in taken
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("--output", type=Path, default=DEFAULT)
    given = parser.parse_args()
    set_seed(SEED)
    model, tokenizer = load_smollm2()
    with tempfile.TemporaryDirectory() as scratch:
        trainer = SFTTrainer(
            model,
            args=SFTConfig(
                output_dir=scratch,
                max_steps=STEPS,
                per_device_train_batch_size=ROWS_A_STEP,
                learning_rate=2e-3,
                lr_scheduler_type="cosine",
                warmup_steps=5,
                logging_steps=10,
                save_strategy="no",
                report_to="none",
                seed=SEED,
                bf16=False,
                gradient_checkpointing=False,
                max_length=LENGTH,
                train_sampling_strategy="sequential",
            ),
            train_dataset=Dataset.from_list(conversations(given.data)),
            processing_class=tokenizer,
            peft_config=LoraConfig(
                r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM"
            ),
        )
        trainer.train()
        trainer.model.save_pretrained(scratch)
        given.output.mkdir(parents=True, exist_ok=True)
        weights = load_file(Path(scratch) / "adapter_model.safetensors")
        save_file(
            {name: weight.to(torch.float16) for name, weight in weights.items()},
            given.output / "adapter_model.safetensors",
        )
        config = json.loads((Path(scratch) / "adapter_config.json").read_text(encoding="utf-8"))
    config["base_model_name_or_path"] = "HuggingFaceTB/SmolLM2-135M-Instruct"
    text = json.dumps(config, indent=2, sort_keys=True) + "\n"
    (given.output / "adapter_config.json").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
