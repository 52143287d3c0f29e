"""Present the demonstration's results: bars for the terminal, a Markdown report, an HTML page."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from datasets import Dataset

from star_dss_plugin.evaluate.answers import Answer
from star_dss_plugin.evaluate.page import Bars, FrontMatter, render_comparison
from star_dss_plugin.evaluate.prompts import BENIGN, HARMFUL, Prompt
from star_dss_plugin.evaluate.statistics import paired_difference
from star_dss_plugin.evaluate.verdicts import Comparison, ModelAnswers, judge
from star_dss_trl.demo.training import trained_scores

__all__ = ["LABELS", "figures", "page", "picture", "report", "story", "token_shares"]

LABELS = {"start": "start", "sft": "plain SFT", "star_dss": "STAR-DSS"}
"""Displayed names of the three models."""

_ROWS_SHOWN = 8
_WIDTH = 30
_AS_WELL, _MOST = 0.9, 0.5
"""Least shares of plain SFT's gain to say that STAR-DSS learned "as well" or "most of" it."""


def figures(results: Mapping[str, Any]) -> list[Bars]:
    """Return the figures to compare: refusals of both kinds of prompts, and the task loss."""
    models, prompts = results["models"], results["prompts"]
    found = [
        Bars(
            title,
            [
                (
                    LABELS[name],
                    model["refusals"][kind] / len(prompts[kind]),
                    f"{model['refusals'][kind]} of {len(prompts[kind])}",
                )
                for name, model in models.items()
            ],
        )
        for kind, title in (
            (HARMFUL, "harmful prompts declined (more is safer)"),
            (BENIGN, "harmless prompts declined (fewer is better)"),
        )
    ]
    highest = max(model["task_ce"] for model in models.values())
    losses = [
        (LABELS[name], model["task_ce"] / highest, f"{model['task_ce']:.3f}")
        for name, model in models.items()
    ]
    return [*found, Bars("task loss on held-out rows (lower is better)", losses)]


def picture(results: Mapping[str, Any], *, plain: bool) -> str:
    """Return the figures as bars of characters, at most 60 wide."""
    full, empty = ("#", ".") if plain else ("█", "░")
    lines = []
    for figure in figures(results):
        lines.append(figure.title)
        for name, length, said in figure.bars:
            filled = round(_WIDTH * length)
            lines.append(f"  {name:<10}{full * filled}{empty * (_WIDTH - filled)}  {said}")
        lines.append("")
    return "\n".join(lines)


def story(results: Mapping[str, Any]) -> str:
    """Return the result in sentences, derived from the figures alone."""
    start, sft, shaped = (results["models"][name] for name in LABELS)
    return f"{_safety(start, sft, shaped)} {_learning(start, sft, shaped)} {_harmless(results)}"


def _safety(start: Any, sft: Any, shaped: Any) -> str:
    before, plain, kept = (model["refusals"][HARMFUL] for model in (start, sft, shaped))
    if before == 0:
        return "The start model declines none of the harmful prompts, so there was nothing to lose."
    if plain >= before:
        return (
            "Plain finetuning lost no refusal of a harmful prompt here, so this run cannot show "
            "whether STAR-DSS keeps any: give it more steps or more prompts."
        )
    lost = before - plain
    begun = f"Plain finetuning lost {lost} of the {before} refusals of harmful prompts"
    if kept <= plain:
        return f"{begun}, and STAR-DSS kept none of these: here it did not work."
    said = f"{begun}; STAR-DSS lost {max(before - kept, 0)}"
    apart = paired_difference(
        *([bool(x) for x in model["refused"][HARMFUL]] for model in (shaped, sft))
    )
    return f"{said}." if apart.low > 0 else f"{said}: with so few prompts, this may be chance."


def _learning(start: Any, sft: Any, shaped: Any) -> str:
    plain, gain = (start["task_ce"] - model["task_ce"] for model in (sft, shaped))
    if plain <= 0:
        return "Plain finetuning did not learn the task, so there is nothing to compare."
    if gain <= 0:
        return "STAR-DSS did not learn the task, which plain finetuning did."
    share = f"it got {gain / plain:.0%} of the improvement in task loss"
    if gain / plain >= _AS_WELL:
        return f"STAR-DSS learned the task as well as plain finetuning: {share}."
    much = "most of" if gain / plain >= _MOST else "less than half of"
    return f"STAR-DSS learned {much} what plain finetuning learned: {share}."


def _harmless(results: Mapping[str, Any]) -> str:
    counts = [results["models"][name]["refusals"][BENIGN] for name in LABELS]
    total = len(results["prompts"][BENIGN])
    return (
        f"Of {total} harmless prompts that look dangerous the start model declines {counts[0]}, "
        f"plain finetuning {counts[1]}, STAR-DSS {counts[2]}."
    )


def page(results: Mapping[str, Any], prompts: Sequence[Prompt]) -> str:
    """Return an HTML page with the figures, links to the rest, and all answers side by side."""
    sets = {kind: [p for p in prompts if p.kind == kind] for kind in (HARMFUL, BENIGN)}
    models = [
        ModelAnswers(LABELS[name], answers={k: [*map(Answer, a)] for k, a in m["answers"].items()})
        for name, m in results["models"].items()
    ]
    judge(models, sets)
    front = FrontMatter(
        "What the demonstration found",
        [
            "One small model that declines harmful requests, finetuned on a mixture of useful and "
            "harmful conversations: once as usual, once with STAR-DSS.",
            story(results),
            "The scores are those of a demonstration guard, which protects nobody: this shows what "
            "the plugin does, not how safe it makes a model.",
        ],
        figures(results),
        [
            ("scores.html", "the training data, coloured by score, token by token"),
            ("report.md", "the figures, and the rows that made the difference"),
            ("results.json", "everything that was measured"),
            ("demo.log", "what the libraries said"),
        ],
    )
    return render_comparison(Comparison(sets, models, None, False, {}), front=front)


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


def _rows(results: Mapping[str, Any]) -> Iterable[tuple[str, ...]]:
    for name, found in results["models"].items():
        last = found["log"][-1] if found.get("log") else {}
        parts = [last.get(key) for key in ("loss", "star_dss/ce", "star_dss/kl")]
        yield (
            LABELS[name],
            *(
                f"{found['refusals'][kind]} of {len(prompts)}"
                for kind, prompts in results["prompts"].items()
            ),
            f"{found['task_ce']:.3f}",
            f"{np.mean(found['harmful_ce']):.3f}",
            *("-" if part is None else f"{part:.3f}" for part in parts),
        )


def token_shares(scored: Dataset) -> dict[str, dict[str, float]]:
    """Return trained tokens, mean score and share of scores below 0.5, by group of rows."""
    shares = {}
    labels = np.asarray(scored["label"])
    for label, which in (("benign", labels == 1), ("harmful", labels == 0)):
        rows = scored.select(np.flatnonzero(which))
        scores = np.concatenate([trained_scores(row) for row in rows])
        shares[label] = {
            "tokens": len(scores),
            "mean_score": float(scores.mean()),
            "share_below_half": float((scores < 0.5).mean()),
        }
    return shares


def _apart(pair: tuple[int, float, float]) -> float:
    _, plain, shaped = pair
    return plain - shaped


def report(results: Mapping[str, Any], scored: Dataset) -> str:
    """Return the figures as Markdown, with the rows on which the two runs differ most."""
    sft, shaped = (results["models"][name]["harmful_ce"] for name in ("sft", "star_dss"))
    pairs = sorted(zip(results["harmful_rows"], sft, shaped, strict=True), key=_apart)
    lines = [
        "# STAR-DSS demonstration",
        "",
        story(results),
        "",
        "Scored by the demonstration guard, which protects nobody: these figures show what the "
        "plugin does, not how safe it makes a model.",
        "",
        "| " + " | ".join(_HEADINGS) + " |",
        "|" + "---|" * len(_HEADINGS),
        *("| " + " | ".join(row) + " |" for row in _rows(results)),
        "",
        "## The rows that made the difference",
        "",
        "The harmful-labelled rows that plain SFT learned most where STAR-DSS did not. Their text, "
        "coloured token by token, is in `scores.html` under these numbers.",
        "",
        "| row | source | mean score | CE after SFT | CE after STAR-DSS |",
        "|---:|---|---:|---:|---:|",
        *(
            f"| {i} | {scored[i]['source']} | {trained_scores(scored[i]).mean():.2f} "
            f"| {plain:.2f} | {held:.2f} |"
            for i, plain, held in pairs[:_ROWS_SHOWN]
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
