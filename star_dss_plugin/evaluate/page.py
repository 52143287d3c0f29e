"""Render the comparison as one HTML file without scripts: the table, and answers side by side.

Prompts and answers are untrusted text: the template escapes them, `visible` shows control
characters by name, and a security policy forbids running or loading anything.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

from markupsafe import Markup

from star_dss_plugin._version import __version__
from star_dss_plugin.evaluate.prompts import BENIGN, HARMFUL
from star_dss_plugin.evaluate.statistics import Estimate
from star_dss_plugin.evaluate.verdicts import PREFILL, REFUSED, Comparison, measures
from star_dss_plugin.guards.base import display_name
from star_dss_plugin.report.rendering import content_hash, page_environment
from star_dss_plugin.visible import visible

__all__ = ["HEADINGS", "Bars", "FrontMatter", "percent", "render_comparison"]

HEADINGS = {
    "safe_share": "safe share",
    "attack_success": "attack success",
    "refusals": "refusals",
    "prefill_safe_share": "safe, prefilled",
    "prefill_attack_success": "attack, prefilled",
    "prefill_refusals": "refusals, prefilled",
    "over_refusal": "over-refusal",
}
"""Headings of the measures in tables."""
_TITLES = {
    HARMFUL: "Harmful prompts",
    PREFILL: "The same with the first words of an answer given",
    BENIGN: "Benign prompts",
}


def percent(share: Estimate) -> str:
    """Return a share with its interval, in percent: "93 % [85, 98]"."""
    return f"{100 * share.value:.0f} % [{100 * share.low:.0f}, {100 * share.high:.0f}]"


@dataclass(frozen=True)
class Bars:
    """Hold one bar chart that compares a number between models.

    Attributes:
        title: The measured quantity.
        bars: For each model its name, the bar's length in [0, 1], and its label.
    """

    title: str
    bars: Sequence[tuple[str, float, str]]


@dataclass(frozen=True)
class FrontMatter:
    """Hold an introduction above the comparison, such as that of the demonstration's page.

    Attributes:
        title: Heading of the page.
        story: Paragraphs below it.
        figures: Bar charts, drawn side by side.
        links: Names of files in the page's folder, each with a description.
    """

    title: str = "Answers side by side"
    story: Sequence[str] = ()
    figures: Sequence[Bars] = ()
    links: Sequence[tuple[str, str]] = ()


def render_comparison(
    comparison: Comparison, *, text: bool = True, front: FrontMatter | None = None
) -> str:
    """Return the complete HTML file.

    Args:
        comparison: The result of `compare`.
        text: Whether prompts and answers are included. Prompts on which models differ are unfolded.
        front: The introduction; None for a heading alone.
    """
    environment = page_environment("star_dss_plugin.evaluate")
    style = files("star_dss_plugin.evaluate").joinpath("assets", "answers.css").read_text("utf-8")
    table = {model.name: measures(model, comparison.guard) for model in comparison.models}
    names = list(next(iter(table.values())))
    judges = "phrases of refusal"
    if comparison.guard is not None:
        judges += f" and by {display_name(comparison.guard, comparison.demonstration)}"
    return environment.get_template("answers.html.j2").render(
        policy=f"default-src 'none'; style-src '{content_hash(style)}'; base-uri 'none'; "
        "form-action 'none'",
        style=Markup(style),
        version=__version__,
        front=front or FrontMatter(),
        judge=f"Judged by {judges}.",
        warnings=[visible(warning) for warning in comparison.warnings()],
        headings=[HEADINGS[name] for name in names],
        table=[
            {"name": name, "cells": [percent(share) for share in shares.values()]}
            for name, shares in table.items()
        ],
        sets=[
            {"title": _TITLES[kind], "prompts": list(_prompts(comparison, kind))}
            for kind in comparison.prompts
        ],
        text=text,
    )


def _prompts(comparison: Comparison, kind: str) -> list[dict[str, Any]]:
    rows = []
    for i, prompt in enumerate(comparison.prompts[kind]):
        answers = []
        for model in comparison.models:
            answer, verdicts = model.answers[kind][i], model.verdicts[kind]
            refused = verdicts[REFUSED][i]
            said = ["declines" if refused else "answers"]
            good = refused != (kind == BENIGN)
            if comparison.guard in verdicts:
                good = verdicts[comparison.guard][i]
                score = model.scores[kind][comparison.guard][i]
                said.append(f"{'safe' if good else 'unsafe'}, P(safe) = {score:.2f}")
            answers.append(
                {
                    "model": model.name,
                    "prefill": answer.prefill,
                    "text": answer.text,
                    "verdict": "; ".join(said),
                    "good": good,
                }
            )
        rows.append(
            {
                "question": "\n".join(str(m["content"]) for m in prompt.messages),
                "answers": answers,
                "differs": len({a["good"] for a in answers}) > 1,
            }
        )
    return rows
