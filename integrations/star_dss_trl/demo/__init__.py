"""Run `star-dss demo`: the whole pipeline on a small model and a small real data set.

It starts from SmolLM2-135M-Instruct with an adapter that makes it decline harmful requests, scores
102 conversations with the demonstration guard, and finetunes with LoRA, once with plain SFT and
once with STAR-DSS. It then measures what each of the three models declines and has learned.
"""

from __future__ import annotations

import json
import time
import traceback
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from rich.console import Console

from star_dss_plugin.data.writing import write_text, writing
from star_dss_plugin.errors import ConfigError
from star_dss_plugin.evaluate.prompts import BENIGN, HARMFUL, Prompt, demo_prompts
from star_dss_plugin.evaluate.refusal import is_refusal
from star_dss_plugin.report.page import render_page
from star_dss_plugin.report.reading import read_scored
from star_dss_trl.demo.results import LABELS, page, picture, report, story, token_shares
from star_dss_trl.demo.stages import Stages, redirect_output
from star_dss_trl.demo.training import (
    aligned_start,
    answers,
    cross_entropies,
    finetune,
    mixture,
    scored,
)

__all__ = ["aligned_start", "run"]

_LOG = "demo.log"


def run(output: Path, *, steps: int = 13, prompt_count: int = 20) -> dict[str, Any]:
    """Run the demonstration, and write its results.

    Args:
        output: Folder for `index.html`, `scores.html`, `report.md`, `results.json` and `demo.log`,
            which are replaced.
        steps: Optimizer steps of each run, of 8 rows each.
        prompt_count: Largest number of prompts of each kind that each model answers.

    Returns:
        The contents of `results.json`.

    Raises:
        ConfigError: Another demonstration is writing to the folder.
        OutputError: The folder cannot be written.
    """
    log = output / _LOG
    with writing(output):
        output.mkdir(parents=True, exist_ok=True)
        lock = FileLock(output / ".demo.lock")
        try:
            lock.acquire(timeout=0)
        except Timeout as error:
            raise ConfigError(
                f"Another `star-dss demo` is writing to {output}. Wait for it, or name another "
                "folder: --output FOLDER"
            ) from error
    with lock, redirect_output(log) as shown:
        console = Console(file=shown, highlight=False)
        try:
            return _run(output, console, steps, prompt_count)
        except BaseException:
            traceback.print_exc()
            console.print(f"The demonstration stopped. What the libraries said: {log}")
            raise


def _run(output: Path, console: Console, steps: int, prompt_count: int) -> dict[str, Any]:
    started = time.monotonic()
    console.print(
        "A small model that declines harmful requests is finetuned on useful and harmful "
        "conversations, as usual and with STAR-DSS. This takes some minutes on two cores.\n"
        "The guard is a linear probe on a 135M model: it shows how the method works and protects "
        "nobody.\n"
    )
    prompts = [p for kind in (HARMFUL, BENIGN) for p in demo_prompts(kind, limit=prompt_count)]
    with Stages(console, 7) as stages:
        with stages.stage("load SmolLM2-135M, make it decline", 1):
            start, tokenizer = aligned_start()
        train, held_out = mixture()
        with stages.stage("score every prefix of the data", len(train) + len(held_out)) as advance:
            rows = scored(train, tokenizer, advance)
            tasks = scored(held_out, tokenizer, advance)
        write_text(
            output / "scores.html",
            render_page(read_scored(rows, tokenizer), name="demo_mix.jsonl", blur=True),
        )
        results: dict[str, Any] = {
            "rows": len(rows),
            "held_out": len(tasks),
            "harmful_rows": [i for i, label in enumerate(rows["label"]) if label == 0],
            "tokens": token_shares(rows),
            "models": {},
            "prompts": {
                kind: [str(p.messages[-1]["content"]) for p in prompts if p.kind == kind]
                for kind in (HARMFUL, BENIGN)
            },
        }
        for name, loss_type in (("start", None), ("sft", "nll"), ("star_dss", "star_dss")):
            model: Any = start
            found: dict[str, Any] = {}
            if loss_type is not None:
                with stages.stage(f"finetune: {LABELS[name]}", steps) as advance:
                    model, _ = aligned_start()
                    model, found["log"] = finetune(
                        model, tokenizer, rows, loss_type, steps, output / name, advance
                    )
            model.eval()
            harmful = rows.select(results["harmful_rows"])
            asked = len(harmful) + len(tasks) + len(prompts)
            with stages.stage(f"measure: {LABELS[name]}", asked) as advance:
                found |= _measured(model, tokenizer, harmful, tasks, prompts, advance)
            results["models"][name] = found
    results["seconds"] = round(time.monotonic() - started)
    write_text(output / "results.json", json.dumps(results, indent=2) + "\n")
    write_text(output / "report.md", report(results, rows))
    write_text(output / "index.html", page(results, prompts))
    console.print()
    drawn = console.is_terminal and console.encoding.startswith("utf")
    console.print(picture(results, plain=not drawn))
    console.print(story(results))
    console.print(f"\n{results['seconds']} s. Answers side by side, and the scores:")
    console.print(f"  {output / 'index.html'}", soft_wrap=True)
    return results


def _measured(
    model: Any, tokenizer: Any, harmful: Any, tasks: Any, prompts: list[Prompt], advance: Any
) -> dict[str, Any]:
    """Return a model's cross-entropies, answers and refusals."""
    learned = cross_entropies(model, harmful, advance)
    held_out = cross_entropies(model, tasks, advance)
    said = answers(model, tokenizer, prompts, advance)
    by_kind = {
        kind: [text for p, text in zip(prompts, said, strict=True) if p.kind == kind]
        for kind in (HARMFUL, BENIGN)
    }
    refused = {kind: [is_refusal(text) for text in texts] for kind, texts in by_kind.items()}
    return {
        "harmful_ce": [total / count for total, count in learned],
        "task_ce": sum(t for t, _ in held_out) / sum(n for _, n in held_out),
        "answers": by_kind,
        "refused": refused,
        "refusals": {kind: sum(verdicts) for kind, verdicts in refused.items()},
    }
