"""`star-dss demo`: the whole pipeline on a small model and a small real data set.

Starts from SmolLM2-135M-Instruct with an adapter that makes it decline harmful requests, scores 102
conversations with the demonstration guard, finetunes with LoRA once with plain SFT and once with
STAR-DSS, and counts what each of the three models still declines, and what it learned.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Mapping, Sequence
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import PreTrainedTokenizerBase, set_seed

from star_dss_plugin.data.columns import SCORES_COLUMN
from star_dss_plugin.data.writing import write_text
from star_dss_plugin.evaluate.generation import answers_to
from star_dss_plugin.evaluate.models import load_whole_model
from star_dss_plugin.evaluate.refusal import is_refusal
from star_dss_plugin.logprobs import IGNORE_INDEX, token_logprobs
from star_dss_plugin.report.page import render_page
from star_dss_plugin.report.reading import read_scored
from star_dss_plugin.scoring.scorer import score_dataset
from star_dss_plugin.smollm2 import SMOLLM2
from star_dss_plugin.tables import Sheet, terminal
from star_dss_trl.config import StarDSSConfig
from star_dss_trl.trainer import StarDSSTrainer

__all__ = ["aligned_start", "run"]

_SEED = 7
_MAX_LENGTH = 160
_NEW_TOKENS = 24
_HELD_OUT = 6  # every sixth benign row is kept for the task loss
_ROWS_SHOWN = 8
_ADAPTER = "aligned_adapter"


def aligned_start() -> tuple[Any, PreTrainedTokenizerBase]:
    """SmolLM2-135M-Instruct that declines harmful requests, and its tokenizer.

    The model as published answers most of them. `scripts/make_aligned_adapter.py` made the adapter,
    which is merged, so that the result is a plain model with something to lose.
    """
    with as_file(files("star_dss_trl").joinpath("demo_assets", _ADAPTER)) as folder:
        return load_whole_model(str(folder), base=SMOLLM2)


def run(output: Path, *, steps: int = 13, prompt_count: int = 20) -> dict[str, Any]:
    """Run the demonstration; write `report.md`, `results.json` and `scores.html` to `output`.

    Args:
        output: Folder of the report.
        steps: Optimizer steps of each run, 8 rows a step.
        prompt_count: How many prompts of each kind are answered by each model, at most.

    Returns:
        What `results.json` holds.
    """
    started = time.monotonic()
    console = terminal()
    console.print(
        "The guard of this demonstration is a linear probe on a 135M model. It shows how it all "
        "works and protects nobody: use a real guard for real data.",
        style="yellow",
    )
    start, tokenizer = aligned_start()
    mixture, held_out = _split(_packaged("star_dss_plugin.data", "assets", "demo_mix.jsonl"))
    scored = score_dataset(mixture, tokenizer, guard="demo", max_length=_MAX_LENGTH)
    data = read_scored(scored, tokenizer)
    write_text(output / "scores.html", render_page(data, name="demo_mix.jsonl", blur=True))
    tasks = score_dataset(held_out, tokenizer, guard="demo", max_length=_MAX_LENGTH, progress=False)
    prompts = {
        kind: [
            row["prompt"]
            for row in _packaged("star_dss_plugin.evaluate", "assets", f"demo_{kind}_prompts.jsonl")
        ][:prompt_count]
        for kind in ("harmful", "benign")
    }
    results: dict[str, Any] = {
        "rows": len(scored),
        "held_out": len(tasks),
        "tokens": _token_shares(scored),
        "models": {},
        "prompts": prompts,
    }
    for name, loss_type in (("start", None), ("sft", "nll"), ("star_dss", "star_dss")):
        model: Any = start
        found: dict[str, Any] = {}
        if loss_type is not None:
            console.print(f"\nFinetuning with loss_type={loss_type!r}, {steps} steps of 8 rows")
            model, _ = aligned_start()
            model, found = _finetune(model, tokenizer, scored, loss_type, steps, output / name)
        model.eval()
        found["row_ce"] = [_cross_entropy(model, [row]) for row in scored]
        found["task_ce"] = _cross_entropy(model, tasks)
        found["answers"] = {kind: _answers(model, tokenizer, p) for kind, p in prompts.items()}
        found["refusals"] = {k: sum(map(is_refusal, said)) for k, said in found["answers"].items()}
        results["models"][name] = found
    results["seconds"] = round(time.monotonic() - started)
    write_text(output / "results.json", json.dumps(results, indent=2) + "\n")
    harmful = [i for i, label in enumerate(scored["label"]) if label == 0]
    write_text(output / "report.md", _report(results, scored, harmful))
    console.print(_table(results, harmful))
    console.print(
        f"{results['seconds']} s. Report: {output / 'report.md'}. The scores, token by token: "
        f"{output / 'scores.html'}"
    )
    return results


def _split(rows: list[dict[str, Any]]) -> tuple[Dataset, Dataset]:
    """Return the training rows, and benign rows that are held out."""
    benign = [i for i, row in enumerate(rows) if row["label"] == 1]
    kept = set(benign[::_HELD_OUT])
    return (
        Dataset.from_list([row for i, row in enumerate(rows) if i not in kept]),
        Dataset.from_list([row for i, row in enumerate(rows) if i in kept]),
    )


def _packaged(package: str, folder: str, name: str) -> list[dict[str, Any]]:
    text = files(package).joinpath(folder, name).read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def _token_shares(scored: Dataset) -> dict[str, dict[str, float]]:
    """Of each group: trained tokens, their mean score, and the share of them below 0.5."""
    shares = {}
    labels = np.asarray(scored["label"])
    for label, which in (("benign", labels == 1), ("harmful", labels == 0)):
        rows = scored.select(np.flatnonzero(which))
        scores = np.concatenate([_trained_scores(row) for row in rows])
        shares[label] = {
            "tokens": len(scores),
            "mean_score": float(scores.mean()),
            "share_below_half": float((scores < 0.5).mean()),
        }
    return shares


def _trained_scores(row: Mapping[str, Any]) -> Any:
    return np.asarray(row[SCORES_COLUMN])[np.asarray(row["labels"]) != IGNORE_INDEX]


def _finetune(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    scored: Dataset,
    loss_type: str,
    steps: int,
    folder: Path,
) -> tuple[Any, dict[str, Any]]:
    set_seed(_SEED)
    args = StarDSSConfig(
        output_dir=str(folder),
        loss_type=loss_type,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        max_steps=steps,
        learning_rate=2e-3,
        warmup_steps=2,
        lr_scheduler_type="cosine",
        logging_steps=max(1, steps // 4),
        save_strategy="no",
        report_to="none",
        seed=_SEED,
        bf16=False,
        gradient_checkpointing=False,
        max_length=None,
    )
    lora = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    trainer = StarDSSTrainer(
        model, args=args, train_dataset=scored, processing_class=tokenizer, peft_config=lora
    )
    trainer.train()
    logged = [line for line in trainer.state.log_history if "grad_norm" in line]
    return trainer.model, {"log": logged}


def _cross_entropy(model: Any, rows: Iterable[Mapping[str, Any]]) -> float:
    """Mean per trained token in nats, unweighted."""
    total, count = 0.0, 0
    device = next(model.parameters()).device
    for row in rows:
        ids = torch.tensor([row["input_ids"]], device=device)
        labels = torch.tensor([row["labels"]], device=device)
        with torch.no_grad():
            logps = token_logprobs(model(input_ids=ids, use_cache=False).logits, labels)
        total -= float(logps.sum())
        count += int((labels[:, 1:] != IGNORE_INDEX).sum())
    return total / count


def _answers(model: Any, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str]) -> list[str]:
    """Greedy answers to each prompt."""
    asked = [[{"role": "user", "content": prompt}] for prompt in prompts]
    said = answers_to(model, tokenizer, asked, max_new_tokens=_NEW_TOKENS, batch_size=20)
    return [answer.strip() for answer in said]


_NAMES = {"start": "start", "sft": "plain SFT", "star_dss": "STAR-DSS"}
_HEADINGS = (
    "model",
    "declines harmful",
    "declines benign",
    "task loss",
    "harmful CE",
    "loss",
    "CE part",
    "KL part",
)


def _rows(results: dict[str, Any], harmful: Sequence[int]) -> Iterable[tuple[str, ...]]:
    for name, found in results["models"].items():
        last = found["log"][-1] if "log" in found else {}
        parts = [last.get(key) for key in ("loss", "star_dss/ce", "star_dss/kl")]
        yield (
            _NAMES[name],
            *(
                f"{found['refusals'][kind]} of {len(prompts)}"
                for kind, prompts in results["prompts"].items()
            ),
            f"{found['task_ce']:.3f}",
            f"{np.mean([found['row_ce'][i] for i in harmful]):.3f}",
            *("-" if part is None else f"{part:.3f}" for part in parts),
        )


def _table(results: dict[str, Any], harmful: Sequence[int]) -> Sheet:
    rows = list(_rows(results, harmful))
    return Sheet(_HEADINGS, rows, title="What changed (demonstration guard, 135M model)")


def _report(results: dict[str, Any], scored: Dataset, harmful: Sequence[int]) -> str:
    sft, shaped = (results["models"][name]["row_ce"] for name in ("sft", "star_dss"))
    telling = sorted(range(len(scored)), key=lambda i: sft[i] - shaped[i])[:_ROWS_SHOWN]
    lines = [
        "# STAR-DSS demonstration",
        "",
        "Scored by the demonstration guard, which protects nobody: these figures show what the "
        "plugin does, not how safe it makes a model.",
        "",
        "| " + " | ".join(_HEADINGS) + " |",
        "|" + "---|" * len(_HEADINGS),
        *("| " + " | ".join(row) + " |" for row in _rows(results, harmful)),
        "",
        "## The rows that made the difference",
        "",
        "Where plain SFT and STAR-DSS learned least alike. Their text, coloured token by token, is "
        "in `scores.html` under these numbers.",
        "",
        "| row | label | source | mean score | CE after SFT | CE after STAR-DSS |",
        "|---:|---|---|---:|---:|---:|",
        *(
            f"| {i} | {'harmful' if scored[i]['label'] == 0 else 'benign'} | {scored[i]['source']} "
            f"| {_trained_scores(scored[i]).mean():.2f} | {sft[i]:.2f} | {shaped[i]:.2f} |"
            for i in telling
        ),
        "",
        "## What the guard said",
        "",
        "| tokens of | trained tokens | mean score | share below 0.5 |",
        "|---|---|---|---|",
        *(
            f"| {name} rows | {t['tokens']} | {t['mean_score']:.3f} | {t['share_below_half']:.1%} |"
            for name, t in results["tokens"].items()
        ),
        "",
        "- **declines harmful**, **declines benign**: prompts, by a match of phrases in the first "
        "words of a greedy answer. Benign prompts look dangerous and are not (XSTest).",
        f"- **task loss**: cross-entropy per token on {results['held_out']} benign rows that were "
        "not trained on. Lower is better.",
        "- **harmful CE**: the same on the harmful-labelled training rows. Lower means "
        "learned, which they should not be.",
        "- **loss**, its **CE part** and **KL part**: the last log line of the run.",
        "",
    ]
    return "\n".join(lines)
