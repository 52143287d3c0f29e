"""Score the demonstration's data, finetune its models, and measure them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import PreTrainedTokenizerBase, TrainerCallback, set_seed

from star_dss_plugin.data.columns import SCORES_COLUMN
from star_dss_plugin.data.reading import read_packaged
from star_dss_plugin.data.requests import PrefixRequest, Trajectory
from star_dss_plugin.evaluate.generation import greedy_answers, prompt_ids
from star_dss_plugin.evaluate.models import load_whole_model
from star_dss_plugin.evaluate.prompts import Prompt
from star_dss_plugin.guards.demo.guard import DemoGuard
from star_dss_plugin.logprobs import IGNORE_INDEX, token_logprobs
from star_dss_plugin.scoring.scorer import score_dataset
from star_dss_plugin.smollm2 import SMOLLM2
from star_dss_trl.config import StarDSSConfig
from star_dss_trl.trainer import StarDSSTrainer

__all__ = [
    "aligned_start",
    "answers",
    "cross_entropies",
    "finetune",
    "mixture",
    "scored",
    "trained_scores",
]

_SEED = 7
_MAX_LENGTH = 160
_NEW_TOKENS = 24
_HELD_OUT = 6  # every sixth benign row is kept for the task loss
_ADAPTER = "aligned_adapter"

Advance = Callable[[], None]


def aligned_start() -> tuple[Any, PreTrainedTokenizerBase]:
    """Return a SmolLM2-135M-Instruct that declines harmful requests, and its tokenizer.

    The published model answers most harmful requests. The adapter that makes it decline them, by
    `scripts/make_aligned_adapter.py`, is merged, so the result is a plain model with an alignment
    to lose.
    """
    with as_file(files("star_dss_trl").joinpath("demo_assets", _ADAPTER)) as folder:
        return load_whole_model(str(folder), base=SMOLLM2)


def mixture() -> tuple[Dataset, Dataset]:
    """Return the training rows, and the benign rows that are held out for the task loss."""
    rows = read_packaged("star_dss_plugin.data", "demo_mix.jsonl")
    benign = [i for i, label in enumerate(rows["label"]) if label == 1]
    kept = benign[::_HELD_OUT]
    return rows.select(sorted(set(range(len(rows))) - set(kept))), rows.select(kept)


class _Watched(DemoGuard):
    """Report the demonstration guard's progress, one call for each scored response."""

    def __init__(self, advance: Advance) -> None:
        super().__init__()
        self._advance = advance

    def trajectories(self, requests: Sequence[PrefixRequest]) -> list[Trajectory]:
        found = super().trajectories(requests)
        for _ in found:
            self._advance()
        return found


def scored(rows: Dataset, tokenizer: PreTrainedTokenizerBase, advance: Advance) -> Dataset:
    """Tokenize rows and score them with the demonstration guard; one step per response."""
    return score_dataset(
        rows, tokenizer, guard=_Watched(advance), max_length=_MAX_LENGTH, progress=False
    )


class _Steps(TrainerCallback):
    def __init__(self, advance: Advance) -> None:
        self._advance = advance

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self._advance()


def finetune(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    rows: Dataset,
    loss_type: str,
    steps: int,
    folder: Path,
    advance: Advance,
) -> tuple[Any, list[dict[str, Any]]]:
    """Finetune with LoRA, 8 rows a step; return the model and its log lines."""
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
        disable_tqdm=True,
    )
    lora = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    trainer = StarDSSTrainer(
        model,
        args=args,
        train_dataset=rows,
        processing_class=tokenizer,
        peft_config=lora,
        callbacks=[_Steps(advance)],
    )
    trainer.train()
    return trainer.model, [line for line in trainer.state.log_history if "grad_norm" in line]


def cross_entropies(
    model: Any, rows: Iterable[Mapping[str, Any]], advance: Advance
) -> list[tuple[float, int]]:
    """Return for each row the sum of −log π in nats and the number of its trained tokens."""
    found = []
    device = next(model.parameters()).device
    for row in rows:
        ids = torch.tensor([row["input_ids"]], device=device)
        labels = torch.tensor([row["labels"]], device=device)
        with torch.no_grad():
            logps = token_logprobs(model(input_ids=ids, use_cache=False).logits, labels)
        found.append((-float(logps.sum()), int((labels[:, 1:] != IGNORE_INDEX).sum())))
        advance()
    return found


def answers(
    model: Any, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Prompt], advance: Advance
) -> list[str]:
    """Return greedy answers, in the order of the prompts."""
    asked = [prompt_ids(tokenizer, prompt.messages) for prompt in prompts]
    said = [""] * len(asked)
    for i, answer in greedy_answers(
        model, tokenizer, asked, max_new_tokens=_NEW_TOKENS, batch_size=10
    ):
        said[i] = answer.strip()
        advance()
    return said


def trained_scores(row: Mapping[str, Any]) -> Any:
    """Return the scores of a row's trained tokens."""
    return np.asarray(row[SCORES_COLUMN])[np.asarray(row["labels"]) != IGNORE_INDEX]
