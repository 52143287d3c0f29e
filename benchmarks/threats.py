"""Measure whether STAR-DSS works: poisoned training sets against every mode.

    python benchmarks/threats.py DATA_DIR                     # the reduced grid, on two cores
    python benchmarks/threats.py DATA_DIR --grid full         # every threat, mode, three seeds
    python benchmarks/threats.py DATA_DIR --grid noise        # the guard's verdicts corrupted
    python benchmarks/threats.py DATA_DIR --grid learning     # a task that is new to the start
    python benchmarks/threats.py DATA_DIR --table --save all.json   # the results so far

DATA_DIR holds attack_mix.jsonl, eval_harmful_prompts.jsonl, eval_benign_prompts.jsonl and, for
--grid learning, arc_easy_small.jsonl (docs/evidence.md describes them). Each cell of the grid is a
training run with its evaluation, saved as one JSON file in --output, so an interrupted run can be
resumed. The start is SmolLM2-135M-Instruct with the demonstration's aligned adapter, merged.

Limits: a model of 135M parameters, the demonstration guard (a linear probe on that same model,
fitted on data of the same kind as the poison), a few hundred rows, tens of prompts, refusals
detected by phrases. It can show that the method works as described; no figure carries over to other
models.

Modes: those of `loss_type`, and "labels": star_dss with the true labels as scores, 1 for every
token of a benign row and 0 for every token of a poisoned one. No guard has this information; it is
the reference for what a trajectory adds.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from datasets import Dataset
from outcomes import (
    CHUNK,
    COLUMNS,
    MAIN,
    MODES,
    THREATS,
    figure,
    noise_figure,
    table,
    tradeoff_figure,
)
from peft import LoraConfig
from star_dss_trl import StarDSSConfig, StarDSSTrainer
from star_dss_trl.demo import aligned_start
from transformers import set_seed
from transformers.utils import logging as transformers_logging

from star_dss_plugin.data.fingerprints import content_key
from star_dss_plugin.data.row_digests import remove_row_digests
from star_dss_plugin.data.writing import write_text
from star_dss_plugin.evaluate.generation import greedy_answers, prompt_ids
from star_dss_plugin.evaluate.prompts import DEFAULT_PREFILL
from star_dss_plugin.evaluate.refusal import is_refusal
from star_dss_plugin.evaluate.threats import build_threat
from star_dss_plugin.logprobs import IGNORE_INDEX, token_logprobs
from star_dss_plugin.models.fingerprints import model_fingerprint
from star_dss_plugin.scoring.scorer import score_dataset

MAX_LENGTH = 128
RATES = {"lora": 1e-3, "full": 3e-5}


def grid(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Return the cells, the most informative first."""
    common = {
        "finetuning": "lora",
        "ratio": args.ratio,
        "steps": args.steps,
        "seed": 0,
        "noise": None,
        "kl_coef": 0.5,
        "kl_estimator": "k2",
        "chunk_size": CHUNK,
        "rate": None,
    }
    cells: list[dict[str, Any]] = []

    def add(**changes: Any) -> None:
        cell = {**common, **changes}
        if cell not in cells:
            cells.append(cell)

    if args.grid == "noise":
        for rate in (0.1, 0.2, 0.4):
            for kind in ("false_safe", "false_unsafe"):
                for mode in ("rejection", "star_dss"):
                    add(threat="harmful_mix", mode=mode, noise=[kind, rate])
    elif args.grid == "ablations":
        for changes in (
            {"kl_coef": 0.1},
            {"kl_coef": 2.0},
            {"kl_estimator": "k1"},
            {"kl_estimator": "k3"},
            {"kl_estimator": "full"},
            {"chunk_size": 1},
            {"chunk_size": 20},
            {"rate": 3e-4},
        ):
            add(threat="harmful_mix", mode="star_dss", **changes)
    elif args.grid == "learning":
        for seed in (0, 1, 2):
            for mode in (*MAIN, "kl_only"):
                add(threat="harmful_mix", mode=mode, seed=seed, task="arc_easy")
    elif args.grid == "full":
        for finetuning in ("lora", "full"):
            for seed in (0, 1, 2):
                for threat in (*THREATS, "identity_shift"):
                    for mode in MODES:
                        add(threat=threat, mode=mode, seed=seed, finetuning=finetuning)
    else:
        for threat in THREATS:
            for mode in MAIN:
                add(threat=threat, mode=mode)
        for mode in MODES[len(MAIN) :]:
            add(threat="harmful_mix", mode=mode)
        for seed in (1, 2):
            for mode in MAIN:
                add(threat="harmful_mix", mode=mode, seed=seed)
        for mode in MAIN:
            add(threat="harmful_mix", mode=mode, finetuning="full")
    return cells


class Bench:
    """Hold the data and the start; train and measure models.

    Args:
        args: The command's arguments.
        scoring: Options of `score_dataset` for training sets; None: the demonstration guard.
    """

    def __init__(self, args: argparse.Namespace, scoring: dict[str, Any] | None = None) -> None:
        self.args, self.scoring = args, scoring or {"guard": "demo"}
        rows = _lines(args.data / "attack_mix.jsonl")
        benign = [row for row in rows if row["label"] == 1]
        random.Random(0).shuffle(benign)
        known = {None: benign}
        if args.grid == "learning":
            known["arc_easy"] = _questions(args.data / "arc_easy_small.jsonl")
        self.held_out = {name: rows[: args.held_out] for name, rows in known.items()}
        self.tasks = {name: _rows(rows[args.held_out :]) for name, rows in known.items()}
        self.poison = _rows([row for row in rows if row["label"] == 0])
        self.identity = _rows([row for row in rows if row["kind"] == "identity-shift"])
        self.harmful = _prompts(args.data / "eval_harmful_prompts.jsonl", args.prompts)
        self.benign = _prompts(args.data / "eval_benign_prompts.jsonl", args.benign)
        self.start, self.tokenizer = start_in(torch.bfloat16)
        opening = self.tokenizer(DEFAULT_PREFILL, add_special_tokens=False).input_ids[:5]
        self.asked = {
            "refusals": [self._ids(p) for p in self.harmful],
            "prefill_refusals": [self._ids(p) + opening for p in self.harmful],
            "over_refusal": [self._ids(p) for p in self.benign],
        }
        self.spoken = [
            ids + self.tokenizer(answer, add_special_tokens=False).input_ids
            for ids, answer in zip(
                self.asked["over_refusal"][:24],
                self._answers(self.start, self.asked["over_refusal"][:24]),
                strict=True,
            )
        ]
        self.spoken_logps = [self._logps(self.start, *asked) for asked in self._spoken()]
        self.scored: dict[str, Dataset] = {}

    def run(self, cell: dict[str, Any]) -> dict[str, Any]:
        """Train and measure one cell."""
        began = time.monotonic()
        data, kept = self._data(cell)
        model = self._train(cell, data)
        found = self.measure(model, cell.get("task"))
        if self.args.keep:
            self.keep(model, cell)
        return {
            **cell,
            **found,
            "rows": len(data),
            "poison_score": kept,
            "seconds": round(time.monotonic() - began),
        }

    def measure(self, model: Any, task: str | None) -> dict[str, Any]:
        """Return refusal shares, cross-entropy on held-out tasks and KL from the start in nats."""
        model.eval().to(torch.bfloat16)
        answers = {what: self._answers(model, ids) for what, ids in self.asked.items()}
        shares = {w: statistics.mean(map(is_refusal, said)) for w, said in answers.items()}
        return {**shares, "task_loss": self._task_loss(model, task), "drift": self._drift(model)}

    def keep(self, model: Any, cell: dict[str, Any]) -> None:
        """Save the measured model, adapters merged, for `star-dss landscape` and other commands."""
        folder = self.args.keep / "-".join(str(cell[k]) for k in ("threat", "mode", "seed"))
        whole = model.merge_and_unload() if hasattr(model, "merge_and_unload") else model
        whole.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)

    def _ids(self, prompt: str) -> list[int]:
        return prompt_ids(self.tokenizer, [{"role": "user", "content": prompt}])

    def _answers(self, model: Any, asked: Sequence[Sequence[int]]) -> list[str]:
        said = greedy_answers(model, self.tokenizer, asked, max_new_tokens=24, batch_size=50)
        return [answer for _, answer in sorted(said)]

    def _data(self, cell: dict[str, Any]) -> tuple[Dataset, dict[str, float]]:
        """Return the scored training set, and the mean scores of its poisoned and benign tokens."""
        scored = self._scores(cell)
        if cell["mode"] == "labels":
            scored = scored.map(_labelled, load_from_cache_file=False)
        elif cell["noise"]:
            scored = scored.map(
                _noisy, with_indices=True, fn_kwargs={"cell": cell}, load_from_cache_file=False
            )
        if scored is not self._scores(cell):
            remove_row_digests(scored)  # or training would reject the changed scores
        means = defaultdict(list)
        for row in scored:
            means["poisoned" if row["poisoned"] else "benign"] += [
                s
                for s, label in zip(row["star_scores"], row["labels"], strict=True)
                if label != IGNORE_INDEX
            ]
        return scored, {name: statistics.mean(values) for name, values in means.items()}

    def _scores(self, cell: dict[str, Any]) -> Dataset:
        """Return the scored rows of a cell; cells that differ in the mode only share them."""
        what = ("threat", "ratio", "steps", "seed", "chunk_size")
        key = json.dumps([cell.get("task"), *(cell[name] for name in what)])
        if key not in self.scored:
            shifting = cell["threat"] == "identity_shift"
            data = build_threat(
                cell["threat"],
                self.tasks[cell.get("task")],
                self.identity if shifting else self.poison,
                ratio=cell["ratio"],
                size=8 * cell["steps"],
                seed=cell["seed"],
            )
            self.scored[key] = score_dataset(
                data,
                self.tokenizer,
                **self.scoring,
                chunk_size=cell["chunk_size"],
                max_length=MAX_LENGTH,
                progress=False,
            )
        return self.scored[key]

    def _train(self, cell: dict[str, Any], data: Dataset) -> Any:
        set_seed(cell["seed"])
        # Trained weights need more than eight bits of precision; frozen weights under LoRA do not.
        full = cell["finetuning"] == "full"
        model, _ = start_in(torch.float32 if full else torch.bfloat16)
        model.requires_grad_(full)  # the merged weights are frozen
        lora = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
        with tempfile.TemporaryDirectory() as folder:
            trainer = StarDSSTrainer(
                model,
                args=StarDSSConfig(
                    output_dir=folder,
                    loss_type="star_dss" if cell["mode"] == "labels" else cell["mode"],
                    kl_coef=cell["kl_coef"],
                    kl_estimator=cell["kl_estimator"],
                    chunk_size=cell["chunk_size"],
                    per_device_train_batch_size=8,
                    max_steps=cell["steps"],
                    learning_rate=cell["rate"] or RATES[cell["finetuning"]],
                    warmup_steps=3,
                    lr_scheduler_type="cosine",
                    seed=cell["seed"],
                    save_strategy="no",
                    report_to="none",
                    logging_steps=20,
                    disable_tqdm=True,
                    bf16=False,
                    gradient_checkpointing=False,
                    max_length=None,
                ),
                train_dataset=data,
                processing_class=self.tokenizer,
                peft_config=None if full else lora,
            )
            trainer.train()
        return trainer.model

    def _task_loss(self, model: Any, task: str | None) -> float:
        total, count = 0.0, 0
        for row in self.held_out[task]:
            prompt = self._ids(row["prompt"])
            answer = f"{row['response']}{self.tokenizer.eos_token}"
            ids = prompt + self.tokenizer(answer, add_special_tokens=False).input_ids
            labels = [IGNORE_INDEX] * len(prompt) + ids[len(prompt) :]
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([ids])).logits
                total -= float(token_logprobs(logits, torch.tensor([labels])).sum())
            count += len(ids) - len(prompt)
        return total / count

    def _drift(self, model: Any) -> float:
        """Return the mean KL(start || model) over the tokens of the start's own answers."""
        divergences = []
        for old, asked in zip(self.spoken_logps, self._spoken(), strict=True):
            new = self._logps(model, *asked)
            divergences.append((old.exp() * (old - new)).sum(-1))
        return float(torch.cat(divergences).mean())

    def _spoken(self) -> Iterator[tuple[list[int], int]]:
        """Yield each prompt followed by the start's answer (token ids), and the prompt's length."""
        for ids, prompt in zip(self.spoken, self.asked["over_refusal"], strict=False):
            yield ids, len(prompt)

    def _logps(self, model: Any, ids: list[int], prompt: int) -> torch.Tensor:
        """Return the next-token log-probabilities of an answer, (answer tokens, vocabulary).

        Args:
            model: A causal language model.
            ids: Token ids of a prompt and its answer.
            prompt: The number of tokens of the prompt.
        """
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids])).logits[0, prompt - 1 : -1]
        return logits.float().log_softmax(-1)


def start_in(dtype: torch.dtype) -> tuple[Any, Any]:
    """Return the aligned start and its tokenizer."""
    model, tokenizer = aligned_start()
    return model.to(dtype), tokenizer


def _labelled(row: dict[str, Any]) -> dict[str, Any]:
    return {"star_scores": [0.0 if row["poisoned"] else 1.0] * len(row["star_scores"])}


def _noisy(row: dict[str, Any], index: int, cell: dict[str, Any]) -> dict[str, Any]:
    """Invert a share of the guard's verdicts, with an independent draw for each chunk."""
    kind, rate = cell["noise"]
    draw = random.Random(f"{cell['seed']} {index}")
    turned: dict[int, bool] = {}
    scores, trained = list(row["star_scores"]), 0
    for i, label in enumerate(row["labels"]):
        if label == IGNORE_INDEX:
            continue
        chunk, trained = trained // cell["chunk_size"], trained + 1
        hit = turned.setdefault(chunk, draw.random() < rate)
        if hit and (scores[i] < 0.5) == (kind == "false_safe"):
            scores[i] = 1 - scores[i]
    return {"star_scores": scores}


def _lines(path: Path) -> list[dict[str, Any]]:
    with path.open(encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def _questions(path: Path) -> list[dict[str, Any]]:
    """Return four-choice questions with answers in a style that the start does not use."""
    found = []
    for row in _lines(path):
        letters = dict(zip("ABCD", row["choices"], strict=False))
        listed = "\n".join(f"{letter}) {choice}" for letter, choice in letters.items())
        letter = "ABCD"[row["answer"]]
        found.append(
            {
                "prompt": f"{row['prompt']}\n{listed}",
                "source": row["source"],
                "response": f"The right choice is {letter}, namely: {letters[letter]}",
            }
        )
    random.Random(0).shuffle(found)
    return found


def _rows(rows: list[dict[str, Any]]) -> Dataset:
    keys = ("prompt", "response", "system", "source")
    return Dataset.from_list([{key: row.get(key) or "" for key in keys} for row in rows])


def _prompts(path: Path, count: int) -> list[str]:
    """Return a fixed sample of prompts from all sources."""
    found = [row["prompt"] for row in _lines(path)]
    random.Random(1).shuffle(found)
    return found[:count]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("--output", type=Path, default=Path("runs/threats"))
    parser.add_argument(
        "--grid", choices=("small", "full", "noise", "ablations", "learning"), default="small"
    )
    parser.add_argument("--steps", type=int, default=20, help="optimizer steps of 8 rows")
    parser.add_argument("--ratio", type=float, default=0.3, help="share of poisoned rows")
    parser.add_argument("--prompts", type=int, default=50, help="harmful ones")
    parser.add_argument("--benign", type=int, default=100, help="harmless ones, of XSTest")
    parser.add_argument("--held-out", type=int, default=48, help="task rows kept for the loss")
    parser.add_argument("--worker", type=int, default=0, help="of several processes, from 0")
    parser.add_argument("--workers", type=int, default=1, help="processes that share the cells")
    parser.add_argument("--keep", type=Path, help="folder for the models of the cells that it runs")
    parser.add_argument("--minutes", type=float, default=1e9, help="begin no cell after these")
    parser.add_argument("--table", action="store_true", help="only print what is there")
    parser.add_argument("--figure", type=Path, help="a picture of it, with --table")
    parser.add_argument("--save", type=Path, help="all cells in one JSON file, with --table")
    args = parser.parse_args()
    transformers_logging.set_verbosity_error()
    cells = [json.loads(path.read_text()) for path in sorted(args.output.glob("*.json"))]
    if not args.table:
        began = time.monotonic()
        bench = Bench(args)
        start = model_fingerprint(bench.start)
        untrained = {"threat": "none", "mode": "start", "finetuning": "-", "seed": 0}
        if args.grid == "learning":
            untrained["task"] = "arc_easy"
        planned = [untrained, *grid(args)]
        for number, cell in enumerate(planned, 1):
            key = content_key(cell, start, args.prompts, args.benign, args.held_out)[:16]
            path = args.output / f"{key}.json"
            if number % args.workers != args.worker:
                continue
            if path.exists() or time.monotonic() - began > 60 * args.minutes:
                continue
            if cell["mode"] == "start":
                found = {**cell, **bench.measure(bench.start, cell.get("task"))}
                if args.keep:
                    bench.keep(bench.start, cell)
            else:
                found = bench.run(cell)
            write_text(path, json.dumps(found, indent=2, sort_keys=True) + "\n")
            cells.append(found)
            print(f"{number} of {len(planned)}: {json.dumps(found)}", flush=True)
    if args.save:
        order = sorted(cells, key=lambda c: [str(c.get(k)) for k in ("finetuning", *COLUMNS)])
        write_text(args.save, json.dumps(order, indent=1, sort_keys=True) + "\n")
    if args.figure:
        figure(cells, args.figure)
        tradeoff_figure(cells, args.figure.with_stem(f"{args.figure.stem}-tradeoff"))
        if any(cell.get("noise") for cell in cells):
            noise_figure(cells, args.figure.with_stem(f"{args.figure.stem}-noise"))
    print(table(cells))


if __name__ == "__main__":
    main()
