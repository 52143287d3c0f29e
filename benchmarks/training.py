"""Time a STAR-DSS step against TRL's own step, and against the authors' implementation.

    python benchmarks/training.py lora
    python benchmarks/training.py full
    python benchmarks/training.py lora --shape 1b --device cuda --dtype bfloat16 --length 2048

SmolLM2-135M-Instruct (or with --shape 1b a random Llama-3.2-1B), random tokens with random scores,
responses of 40 to 400 tokens (or --length for every row).

Contenders:
  stock        TRL's SFTTrainer on the same rows
  precomputed  StarDSSTrainer, the reference's log-probabilities as a column
  second       like precomputed, with a second forward pass at each step, without gradients: the
               adapter switched off (lora) or a frozen copy (full)
  full KL      second pass, divergence over the whole vocabulary
  authors      a second model next to the policy, its forward pass with gradients, complete logits
               of both

Time: all contenders run in one process, one step each in turn, on the same batch. Reported is the
median over the rounds of each one's time over stock's. Memory: each contender runs alone in a
separate process; reported is its largest resident set (on a GPU the allocator's peak) over stock's.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import transformers
import trl
from datasets import Dataset
from peft import LoraConfig
from star_dss_trl import StarDSSConfig, StarDSSTrainer
from transformers import LlamaConfig, LlamaForCausalLM
from trl import SFTConfig, SFTTrainer

from star_dss_plugin.guards.demo.smollm2 import load_smollm2
from star_dss_plugin.loss import star_dss_loss

ARMS = ("stock", "precomputed", "second", "full KL", "authors")
LLAMA_1B = LlamaConfig(
    vocab_size=128256,
    hidden_size=2048,
    intermediate_size=8192,
    num_hidden_layers=16,
    num_attention_heads=32,
    num_key_value_heads=8,
    head_dim=64,
    tie_word_embeddings=True,
)


class AuthorsTrainer(SFTTrainer):  # type: ignore[misc]
    """Compute the loss as the authors' first code does."""

    reference: Any

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        self._signature_columns += ["star_scores"]

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        scores, labels = inputs.pop("star_scores"), inputs.pop("labels")
        logits = model(**inputs, use_cache=False).logits
        ref_logits = self.reference(**inputs, use_cache=False).logits
        return star_dss_loss(
            logits, labels, scores, ref_logits=ref_logits, num_items_in_batch=num_items_in_batch
        ).loss


class Collator:
    """Extend TRL's collator: pad the scores like the tokens."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner

    def __call__(self, rows: list[dict[str, Any]]) -> Any:
        batch = self.inner([{k: r[k] for k in ("input_ids", "labels")} for r in rows])
        scores = torch.ones(batch["input_ids"].shape)
        for i, row in enumerate(rows):
            scores[i, : len(row["star_scores"])] = torch.tensor(row["star_scores"])
        return {**batch, "star_scores": scores}


def rows(args: argparse.Namespace, vocab: int) -> Dataset:
    """Return rows whose prompt is a third of the tokens, and in which every second score is 1."""
    generator = torch.Generator().manual_seed(0)
    made = []
    for i in range(args.batch * args.rounds):
        length = args.length or 60 + (i * 83) % 540
        ids = torch.randint(10, vocab - 10, (length,), generator=generator).tolist()
        scores = torch.rand(length, generator=generator)
        scores = torch.where(scores < 0.5, scores, torch.ones(())).tolist()
        prompt = length // 3
        made.append(
            {
                "input_ids": ids,
                "labels": [-100] * prompt + ids[prompt:],
                "star_scores": [1.0] * prompt + scores[prompt:],
            }
        )
    return Dataset.from_list(made)


def model_of(args: argparse.Namespace) -> Any:
    if args.shape == "1b":
        torch.manual_seed(0)
        model = LlamaForCausalLM(LLAMA_1B)
    else:
        model = load_smollm2()[0]
    return model.to(args.device, getattr(torch, args.dtype))


def trainer_of(arm: str, args: argparse.Namespace, folder: str) -> Any:
    model, tokenizer = model_of(args), load_smollm2()[1]
    options: dict[str, Any] = {
        "output_dir": folder,
        "per_device_train_batch_size": args.batch,
        "report_to": "none",
        "use_cpu": args.device == "cpu",
        "bf16": False,
        "max_length": None,
        "disable_tqdm": True,
        "gradient_checkpointing": args.checkpointing,
        "max_steps": 1,
        "save_strategy": "no",
        "shuffle_dataset": False,
        "remove_unused_columns": True,
    }
    config: Any = SFTConfig(**options)
    cls: Any = {"stock": SFTTrainer, "authors": AuthorsTrainer}.get(arm, StarDSSTrainer)
    if cls is StarDSSTrainer:
        second = "adapter" if args.finetuning == "lora" else "copy"
        config = StarDSSConfig(
            **options,
            guard="demo",
            reference="precomputed" if arm == "precomputed" else second,
            kl_estimator="full" if arm == "full KL" else "k2",
            score_cache_dir=folder,
        )
    lora = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    trainer = cls(
        model,
        args=config,
        train_dataset=rows(args, model.config.vocab_size),
        processing_class=tokenizer,
        peft_config=lora if args.finetuning == "lora" else None,
    )
    if arm == "authors":
        trainer.reference = model_of(args)
        trainer.data_collator = Collator(trainer.data_collator)
    trainer.create_optimizer()
    trainer.model.train()
    return trainer


def step(trainer: Any, batch: Any, args: argparse.Namespace) -> float:
    """Return the seconds of one complete step: forward, backward, optimizer."""
    items = (batch["labels"][:, 1:] != -100).sum()
    synchronize(args)
    start = time.perf_counter()
    trainer.training_step(trainer.model, dict(batch), items)
    trainer.optimizer.step()
    trainer.model.zero_grad()
    if hasattr(trainer, "reference"):
        trainer.reference.zero_grad()
    synchronize(args)
    return time.perf_counter() - start


def synchronize(args: argparse.Namespace) -> None:
    if args.device == "cuda":
        torch.cuda.synchronize()


def times(args: argparse.Namespace) -> dict[str, list[float]]:
    with tempfile.TemporaryDirectory() as folder:
        trainers = {arm: trainer_of(arm, args, folder) for arm in args.arms}
        loaders = {a: iter(t.get_train_dataloader()) for a, t in trainers.items()}
        found: dict[str, list[float]] = {arm: [] for arm in trainers}
        for i in range(args.rounds):
            batches = {arm: next(loader) for arm, loader in loaders.items()}
            order = list(args.arms)[i % len(args.arms) :] + list(args.arms)[: i % len(args.arms)]
            for arm in order:
                seconds = step(trainers[arm], batches[arm], args)
                if i:  # the first round is a warm-up
                    found[arm].append(seconds)
        return found


def memory(arm: str, args: argparse.Namespace) -> float:
    """Return the peak memory of a few steps, in GiB."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = trainer_of(arm, args, folder)
        if args.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        for batch in list(trainer.get_train_dataloader())[: args.rounds]:
            step(trainer, batch, args)
        if args.device == "cuda":
            return torch.cuda.max_memory_allocated() / 2**30
        # Not getrusage: its peak includes that of the process that started this one.
        status = Path("/proc/self/status").read_text()
        return int(status.split("VmHWM:")[1].split()[0]) / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("finetuning", choices=("lora", "full"))
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=ARMS)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=0)
    parser.add_argument("--shape", choices=("smollm2", "1b"), default="smollm2")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument("--memory-of", choices=ARMS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.memory_of:
        print(json.dumps(memory(args.memory_of, args)))
        return
    print(
        f"{args.finetuning}, {args.shape}, {args.dtype} on {args.device}, batch {args.batch}, "
        f"{args.rounds - 1} rounds; torch {torch.__version__} with {torch.get_num_threads()} "
        f"threads, transformers {transformers.__version__}, trl {trl.__version__}, "
        f"{platform.machine()}"
    )
    found = times(args)
    peaks = {}
    for arm in args.arms:
        command = [sys.executable, __file__, *sys.argv[1:], "--memory-of", arm]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        peaks[arm] = json.loads(done.stdout.splitlines()[-1])
    print("| arm | s per step | × stock | peak GiB | × stock |")
    print("| --- | ---: | ---: | ---: | ---: |")
    for arm in args.arms:
        ratios = [a / b for a, b in zip(found[arm], found["stock"], strict=True)]
        print(
            f"| {arm} | {statistics.median(found[arm]):.3f} | {statistics.median(ratios):.2f} "
            f"| {peaks[arm]:.2f} | {peaks[arm] / peaks['stock']:.2f} |"
        )


if __name__ == "__main__":
    main()
