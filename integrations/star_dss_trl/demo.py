"""`star-dss demo`: the whole pipeline on a small model and a small real data set.

Scores 96 conversations with the demonstration guard, finetunes SmolLM2-135M-Instruct with LoRA once
with plain SFT and once with STAR-DSS, and compares both with the model as it was.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from peft import LoraConfig
from rich.console import Console
from rich.table import Table
from transformers import PreTrainedTokenizerBase, set_seed

from star_dss_plugin.collation import SCORES_COLUMN
from star_dss_plugin.files import write_text
from star_dss_plugin.logprobs import IGNORE_INDEX, token_logprobs
from star_dss_plugin.probe import is_refusal
from star_dss_plugin.report.page import render_page
from star_dss_plugin.report.reading import read_scored
from star_dss_plugin.scorer import score_dataset
from star_dss_plugin.smollm2 import load_smollm2
from star_dss_trl.config import StarDSSConfig
from star_dss_trl.trainer import StarDSSTrainer

__all__ = ["run"]

_SEED = 7
_MAX_LENGTH = 160
_NEW_TOKENS = 40


def run(output: Path, *, steps: int = 12, prompt_count: int = 8) -> dict[str, Any]:
    """Runs the demonstration; writes `report.md`, `results.json` and `scores.html` to `output`.

    Args:
        output: Folder of the report.
        steps: Optimizer steps of each run, 8 rows a step.
        prompt_count: How many prompts are answered before and after.

    Returns:
        What `results.json` holds.
    """
    started = time.monotonic()
    console = Console()
    console.print(
        "The guard of this demonstration is a linear probe on a 135M model. It shows how it all "
        "works and protects nobody: use a real guard for real data.", style="yellow",
    )  # fmt: skip
    _, tokenizer = load_smollm2()
    mixture = Dataset.from_list(_packaged("demo_mix.jsonl"))
    scored = score_dataset(mixture, tokenizer, guard="demo", max_length=_MAX_LENGTH)
    data = read_scored(scored, tokenizer)
    write_text(output / "scores.html", render_page(data, name="demo_mix.jsonl", blur=True))
    prompts = [row["prompt"] for row in _packaged("demo_prompts.jsonl")][:prompt_count]
    results: dict[str, Any] = {
        "rows": len(scored),
        "tokens": _token_shares(scored),
        "models": {},
        "prompts": prompts,
    }
    for name, loss_type in (("start", None), ("sft", "nll"), ("star_dss", "star_dss")):
        model, _ = load_smollm2()
        found: dict[str, Any] = {}
        if loss_type is not None:
            console.print(f"\nFinetuning with loss_type={loss_type!r}, {steps} steps of 8 rows")
            model, found = _finetune(model, tokenizer, scored, loss_type, steps, output / name)
        model.eval()
        found["ce"] = {label: _mean_ce(model, rows) for label, rows in _by_label(scored)}
        found["answers"] = _answers(model, tokenizer, prompts)
        found["refusals"] = sum(map(is_refusal, found["answers"]))
        results["models"][name] = found
    results["seconds"] = round(time.monotonic() - started)
    output.mkdir(parents=True, exist_ok=True)
    (output / "results.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    (output / "report.md").write_text(_report(results), encoding="utf-8")
    console.print(_table(results))
    console.print(
        f"{results['seconds']} s. Report: {output / 'report.md'}. The scores, token by token: "
        f"{output / 'scores.html'}"
    )
    return results


def _packaged(name: str) -> list[dict[str, Any]]:
    text = files("star_dss_plugin").joinpath("data", name).read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def _by_label(scored: Dataset) -> list[tuple[str, Dataset]]:
    labels = np.asarray(scored["label"])
    return [
        ("benign", scored.select(np.flatnonzero(labels == 1))),
        ("harmful", scored.select(np.flatnonzero(labels == 0))),
    ]


def _token_shares(scored: Dataset) -> dict[str, dict[str, float]]:
    """Of each group: trained tokens, their mean score, and the share of them below 0.5."""
    shares = {}
    for label, rows in _by_label(scored):
        scores = np.concatenate([
            np.asarray(r[SCORES_COLUMN])[np.asarray(r["labels"]) != IGNORE_INDEX] for r in rows
        ])  # fmt: skip
        shares[label] = {
            "tokens": len(scores),
            "mean_score": float(scores.mean()),
            "share_below_half": float((scores < 0.5).mean()),
        }
    return shares


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
        learning_rate=1e-3,
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


def _mean_ce(model: Any, rows: Dataset) -> float:
    """Mean cross-entropy per trained token, unweighted."""
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
    """Greedy answers to each prompt, all in one batch."""
    texts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
        )
        for prompt in prompts
    ]
    inputs = tokenizer(
        texts, return_tensors="pt", add_special_tokens=False, padding=True, padding_side="left"
    ).to(model.device)
    with torch.no_grad():
        ids = model.generate(
            **inputs, max_new_tokens=_NEW_TOKENS, do_sample=False,
            pad_token_id=tokenizer.pad_token_id,
        )  # fmt: skip
    answers: list[str] = tokenizer.batch_decode(ids[:, inputs["input_ids"].shape[1] :], True)
    return [answer.strip() for answer in answers]


_NAMES = {"start": "start (SmolLM2-135M)", "sft": "plain SFT (nll)", "star_dss": "STAR-DSS"}


def _rows(results: dict[str, Any]) -> Iterable[tuple[str, ...]]:
    for name, found in results["models"].items():
        last = found["log"][-1] if "log" in found else {}
        parts = [last.get(f"star_dss/{key}") for key in ("ce", "kl", "share_below_threshold")]
        yield (
            _NAMES[name],
            f"{last['loss']:.3f}" if last else "-",
            *("-" if part is None else f"{part:.3f}" for part in parts),
            f"{found['ce']['benign']:.3f}",
            f"{found['ce']['harmful']:.3f}",
            f"{found['refusals']} of {len(results['prompts'])}",
        )


_HEADINGS = (
    "model", "loss", "its CE part", "its KL part", "tokens below 0.5", "CE benign", "CE harmful",
    "refusals",
)  # fmt: skip


def _table(results: dict[str, Any]) -> Table:
    table = Table(*_HEADINGS, title="What changed (demonstration guard, 135M model: no evidence)")
    for row in _rows(results):
        table.add_row(*row)
    return table


def _report(results: dict[str, Any]) -> str:
    tokens = results["tokens"]
    lines = [
        "# STAR-DSS demonstration", "",
        "Scored by the demonstration guard, which protects nobody: these figures show what the "
        "plugin does, not how safe it makes a model.", "",
        "| tokens of | trained tokens | mean score | share below 0.5 |", "|---|---|---|---|",
        *(
            f"| {name} rows | {t['tokens']} | {t['mean_score']:.3f} | {t['share_below_half']:.1%} |"
            for name, t in tokens.items()
        ), "",
        "| " + " | ".join(_HEADINGS) + " |", "|" + "---|" * len(_HEADINGS),
        *("| " + " | ".join(row) + " |" for row in _rows(results)), "",
        "- **loss**, its **CE part** and its **KL part**: the last log line of the run.",
        "- **CE benign**, **CE harmful**: mean cross-entropy per token on the training rows of "
        "each label, without weights. Lower means learned; harmful rows should not be learned.",
        "- **refusals**: prompts declined (a match of phrases, greedy decoding).", "",
    ]  # fmt: skip
    return "\n".join(lines)
