"""The section on STAR-DSS in the model card, made from `star_dss.json`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

__all__ = ["add_section"]

_HEADING = "## STAR-DSS"


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
    share = train["below_threshold"] / train["trained_tokens"]
    return f"""{_HEADING}

Finetuned with the loss of [STAR-DSS](https://arxiv.org/abs/2505.17196): a guard model scored
every prefix of every response; safe tokens were learned, unsafe ones held to a frozen reference.

| | |
|---|---|
| loss | `{options["loss_type"]}`, λ = {options["kl_coef"]}, estimator `{options["kl_estimator"]}` |
| guard | `{train["guard"]}`, one score per {options["chunk_size"]} {options["segmenter"]} |
| reference | {run["reference"]} |
| data | {train["responses"]} responses, {train["trained_tokens"]} trained tokens |
| below τ = {options["threshold"]} | {share:.1%} of the trained tokens (mean score \
{train["mean_score"]:.3f}) |
"""
