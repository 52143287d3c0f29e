"""Time a STAR-DSS step against TRL's own step, and against the authors' implementation.

    python benchmarks/training.py lora
    python benchmarks/training.py full
    python benchmarks/training.py logits
    python benchmarks/training.py stream
    python benchmarks/training.py lora --shape 1b --device cuda --dtype bfloat16 --length 2048

SmolLM2-135M-Instruct (or with --shape 1b a random Llama-3.2-1B), random tokens with random scores,
responses of 40 to 400 tokens (or --length for every row).

Contenders:
  stock        TRL's SFTTrainer on the same rows
  precomputed  StarDSSTrainer, the reference's log-probabilities as a column
  second       StarDSSTrainer, a forward pass of the reference without gradients at each step: the
               policy with its adapter switched off (lora) or a frozen copy (full)
  full KL      like second, with the KL over the whole vocabulary
  authors      a second model as the reference, its forward pass with gradients, complete logits of
               both models

Time: all contenders run in one process, one step each in turn, on the same batch; each ratio to
stock is a median over the rounds. Memory: each contender runs alone in a separate process; its
largest resident set (on a GPU the allocator's peak) is divided by that of stock.

`logits` measures the memory of a plain `transformers.Trainer` whose logits take most of it: a small
model with a vocabulary of 131,072, rows of 2,048 tokens of which half are trained.
  stock        one training step
  step         one STAR-DSS step alone, which applies the head in chunks
  run          `train()` and an evaluation: the check before the first step, the step, the rest

`stream` measures the CPU time of whole LoRA runs over 32 rows of the demonstration's data with its
guard: loading the guard, scoring, training, with an empty cache. The reference is the policy with
its adapter switched off, at each step of both.
  before       all rows are scored, then the model trains
  stream       rows are scored 8 at a time, as the Trainer asks for them
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import transformers
import trl
from datasets import Dataset
from peft import LoraConfig
from star_dss_trl import StarDSSConfig, StarDSSTrainer
from tokenizers import Tokenizer, models
from transformers import (
    DataCollatorForSeq2Seq,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
)
from trl import SFTConfig, SFTTrainer

from star_dss_plugin import attach
from star_dss_plugin.data.reading import read_dataset
from star_dss_plugin.loss import star_dss_loss
from star_dss_plugin.smollm2 import load_smollm2

ARMS = ("stock", "precomputed", "second", "full KL", "authors")
LOGITS_ARMS = ("stock", "step", "run")
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
RANDOM = {"1b": LLAMA_1B, "tiny": LlamaConfig(vocab_size=512, hidden_size=64, num_hidden_layers=2)}


class AuthorsTrainer(SFTTrainer):  # type: ignore[misc]
    """Compute the loss as the authors' first published code does."""

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
    """Extend TRL's collator to pad the scores like the tokens."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner

    def __call__(self, rows: list[dict[str, Any]]) -> Any:
        batch = self.inner([{k: r[k] for k in ("input_ids", "labels")} for r in rows])
        scores = torch.ones(batch["input_ids"].shape)
        for i, row in enumerate(rows):
            scores[i, : len(row["star_scores"])] = torch.tensor(row["star_scores"])
        return {**batch, "star_scores": scores}


def rows(args: argparse.Namespace, vocab: int) -> Dataset:
    """Return rows of random tokens: a third is the prompt, about half of the scores are 1."""
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
    if args.shape in RANDOM:
        torch.manual_seed(0)
        model = LlamaForCausalLM(RANDOM[args.shape])
    else:
        model = load_smollm2()[0]
    return model.to(args.device, getattr(torch, args.dtype))


def tokenizer_of(args: argparse.Namespace) -> Any:
    """Return the model's tokenizer, or for random tokens a minimal one that can pad."""
    if args.shape == "smollm2" and args.finetuning != "logits":
        return load_smollm2()[1]
    words = models.WordLevel({"<pad>": 0, "<end>": 1}, unk_token="<pad>")
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(words),
        pad_token="<pad>",
        eos_token="<end>",
        chat_template="{{ messages[0]['content'] }}",
    )


def trainer_of(arm: str, args: argparse.Namespace, folder: str) -> Any:
    model, tokenizer = model_of(args), tokenizer_of(args)
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


def logits_memory(arm: str, args: argparse.Namespace) -> float:
    """Return the peak GiB of a plain Trainer's step or run, with a vocabulary of 131,072."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=131072,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=4096,
    )
    model, tokenizer = LlamaForCausalLM(config).to(args.device), tokenizer_of(args)
    length = args.length or 2048
    generator = torch.Generator().manual_seed(0)
    made = []
    for _ in range(4):
        ids = torch.randint(10, 49000, (length,), generator=generator).tolist()
        scores = [1.0] * (length // 2) + torch.rand(length // 2, generator=generator).tolist()
        labels = [-100] * (length // 2) + ids[length // 2 :]
        made.append({"input_ids": ids, "labels": labels, "star_scores": scores})
    data = Dataset.from_list(made)
    with tempfile.TemporaryDirectory() as folder:
        trainer: Any = Trainer(
            model,
            args=TrainingArguments(
                folder,
                per_device_train_batch_size=1,
                per_device_eval_batch_size=1,
                max_steps=1,
                report_to="none",
                use_cpu=args.device == "cpu",
                save_strategy="no",
                disable_tqdm=True,
                optim="sgd",
            ),
            train_dataset=data,
            eval_dataset=data.select(range(1)),
            data_collator=DataCollatorForSeq2Seq(tokenizer),
            processing_class=tokenizer,
        )
        if arm != "stock":
            attach(trainer, score_cache_dir=folder)
        if arm == "run":
            trainer.train()
            trainer.evaluate()
        else:
            trainer.create_optimizer()
            step(trainer, next(iter(trainer.get_train_dataloader())), args)
    return peak(args)


def streamed(streams: bool, args: argparse.Namespace) -> float:
    """Return the CPU seconds of a whole run on a stream or on data scored before training."""
    model, tokenizer = model_of(args), tokenizer_of(args)
    lora = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    steps = 32 // args.batch
    data = read_dataset("demo").shuffle(seed=0).select(range(args.batch * steps))
    with tempfile.TemporaryDirectory() as folder, open(os.devnull, "w") as nowhere:
        begin = time.process_time()
        with contextlib.redirect_stdout(nowhere):
            trainer = StarDSSTrainer(
                model,
                args=StarDSSConfig(
                    output_dir=folder,
                    score_cache_dir=folder,
                    per_device_train_batch_size=args.batch,
                    max_steps=steps,
                    guard="demo",
                    reference="adapter",
                    stream_buffer=8,
                    train_sampling_strategy="sequential",
                    report_to="none",
                    use_cpu=args.device == "cpu",
                    bf16=False,
                    disable_tqdm=True,
                    gradient_checkpointing=args.checkpointing,
                    save_strategy="no",
                ),
                train_dataset=data.to_iterable_dataset() if streams else data,
                processing_class=tokenizer,
                peft_config=lora,
            )
            trainer.train()
        return time.process_time() - begin


def peak(args: argparse.Namespace) -> float:
    """Return this process's peak memory so far, in GiB."""
    if args.device == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    # Not getrusage: its peak is inherited from the process that started this one.
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 2**20


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
        return peak(args)


def peaks_of(arms: Iterable[str]) -> dict[str, float]:
    """Return the peak GiB of each contender, each run in its own process."""
    peaks = {}
    for arm in arms:
        command = [sys.executable, __file__, *sys.argv[1:], "--memory-of", arm]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        peaks[arm] = json.loads(done.stdout.splitlines()[-1])
    return peaks


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("finetuning", choices=("lora", "full", "logits", "stream"))
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=ARMS)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=0)
    parser.add_argument("--shape", choices=("smollm2", *RANDOM), default="smollm2")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument("--memory-of", choices=ARMS + LOGITS_ARMS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.memory_of:
        of = logits_memory if args.finetuning == "logits" else memory
        print(json.dumps(of(args.memory_of, args)))
        return
    print(
        f"{args.finetuning}, {args.shape}, {args.dtype} on {args.device}, batch {args.batch}, "
        f"{args.rounds - 1} rounds; torch {torch.__version__} with {torch.get_num_threads()} "
        f"threads, transformers {transformers.__version__}, trl {trl.__version__}, "
        f"{platform.machine()}"
    )
    if args.finetuning == "logits":
        peaks = peaks_of(LOGITS_ARMS)
        print("| arm | peak GiB | × stock | × step |")
        print("| --- | ---: | ---: | ---: |")
        for arm, gib in peaks.items():
            print(f"| {arm} | {gib:.2f} | {gib / peaks['stock']:.2f} | {gib / peaks['step']:.2f} |")
        return
    if args.finetuning == "stream":
        rounds = range(args.rounds - 1)
        runs = [[streamed(kind, args) for kind in (False, True)] for _ in rounds]
        before, stream = (statistics.median(one) for one in zip(*runs, strict=True))
        ratio = statistics.median(as_read / column for column, as_read in runs)
        print(f"CPU time: before {before:.1f} s, stream {stream:.1f} s, ratio {ratio:.2f}")
        return
    found = times(args)
    peaks = peaks_of(args.arms)
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
