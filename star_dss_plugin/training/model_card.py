"""The section on STAR-DSS in the model card, made from `star_dss.json`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

__all__ = ["add_section"]

_HEADING = "## STAR-DSS"

_SHAPED = {
    "star_dss": "the safer a token, the more it was learned, and the less it was held to a frozen "
    "reference",
    "static": "the safer a response was as a whole, the more it was learned, and the less it was "
    "held to a frozen reference",
    "hard": "tokens with a score of τ or more were learned, the others held to a frozen reference",
    "rejection": "responses whose last score is below τ were not learned; nothing was held to a "
    "reference",
    "kl_only": "nothing was learned, and every token held to a frozen reference",
    "sft": "every token was learned, whatever its score",
}


def add_section(output_dir: Path) -> None:
    """Appends the section to README.md in the output folder, if there is one without it."""
    card, record = output_dir / "README.md", output_dir / "star_dss.json"
    if not card.is_file() or not record.is_file():
        return
    text = card.read_text(encoding="utf-8")
    if _HEADING not in text:
        section = _section(json.loads(record.read_text(encoding="utf-8")))
        card.write_text(f"{text.rstrip()}\n\n{section}", encoding="utf-8")


def _section(run: dict[str, Any]) -> str:
    options, train = run["options"], run["data"]["train"]
    shaped = _SHAPED.get(options["loss_type"], "a plugin decides what a score does to the loss")
    share = train["below_threshold"] / train["trained_tokens"]
    return f"""{_HEADING}

Finetuned with star-dss-plugin ([STAR-DSS](https://arxiv.org/abs/2505.17196)), for which a guard
model scores every prefix of every response. With `{options["loss_type"]}`, {shaped}.

| | |
|---|---|
| loss | `{options["loss_type"]}`, λ = {options["kl_coef"]}, estimator `{options["kl_estimator"]}` |
| guard | `{train["guard"]}`, one score per {options["chunk_size"]} {options["segmenter"]} |
| reference | {run["reference"]} |
| data | {train["responses"]} responses, {train["trained_tokens"]} trained tokens |
| below τ = {options["threshold"]} | {share:.1%} of the trained tokens (mean score \
{train["mean_score"]:.3f}) |
"""
