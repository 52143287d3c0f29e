"""Show the results of benchmarks/threats.py as a table and as figures."""

from __future__ import annotations

import json
import statistics
from collections import defaultdict
from pathlib import Path
from typing import Any

MAIN = ("sft", "star_dss", "rejection")
MODES = (*MAIN, "labels", "hard", "static", "kl_only")
THREATS = ("harmful_mix", "suffix_adaptation", "prefix_adaptation", "prompt_poisoning")
CHUNK = 5
COLUMNS = ("refusals", "prefill_refusals", "over_refusal", "task_loss", "drift")


def table(cells: list[dict[str, Any]]) -> str:
    """Return a table of means over seeds (and the range of refusals) by threat and mode."""
    groups = defaultdict(list)
    for cell in cells:
        what = {
            k: v
            for k, v in cell.items()
            if k
            in (
                "finetuning",
                "threat",
                "mode",
                "ratio",
                "noise",
                "kl_coef",
                "kl_estimator",
                "chunk_size",
                "rate",
                "steps",
                "task",
            )
        }
        groups[json.dumps(what, sort_keys=True)].append(cell)
    lines = [
        "| finetuning | threat | mode | seeds | refuses | refuses, prefilled | over-refuses "
        "| task loss | drift |",
        "|---|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    for key, found in sorted(groups.items(), key=_place):
        what = json.loads(key)
        mode = what["mode"] + "".join(
            f", {name} {what[name]}"
            for name, usual in (
                ("kl_coef", 0.5),
                ("kl_estimator", "k2"),
                ("chunk_size", CHUNK),
                ("rate", None),
            )
            if what.get(name, usual) != usual
        )
        if what.get("noise"):
            kind, rate = what["noise"]
            mode += f", {rate:.0%} {kind}"
        threat = ", ".join(filter(None, [what["threat"], what.get("task")]))
        means = [statistics.mean(cell[column] for cell in found) for column in COLUMNS]
        refusals = sorted(cell["refusals"] for cell in found)
        spread = f" ({100 * refusals[0]:.0f}–{100 * refusals[-1]:.0f})" if len(found) > 1 else ""
        first, *others = (f"{100 * value:.0f} %" for value in means[:3])
        shares = " | ".join([first + spread, *others])
        lines.append(
            f"| {what['finetuning']} | {threat} | {mode} | {len(found)} | {shares} "
            f"| {means[3]:.3f} | {means[4]:.3f} |"
        )
    return "\n".join(lines)


def _place(group: tuple[str, list[dict[str, Any]]]) -> tuple[Any, ...]:
    """Return the sort key of a line of the table."""
    cell = group[1][0]
    threats, modes = ("none", *THREATS, "identity_shift"), ("start", *MODES)
    return (
        ("-", "lora", "full").index(cell["finetuning"]),
        threats.index(cell["threat"]),
        bool(cell.get("task")),
        bool(cell.get("noise")),
        modes.index(cell["mode"]),
        group[0],
    )


def _plain(cell: dict[str, Any]) -> bool:
    """Return whether every option of a cell has its default, and the task is the usual one."""
    usual = {
        "finetuning": "lora",
        "noise": None,
        "kl_coef": 0.5,
        "kl_estimator": "k2",
        "chunk_size": CHUNK,
        "rate": None,
    }
    return "task" not in cell and all(cell.get(k, "none") == value for k, value in usual.items())


def figure(cells: list[dict[str, Any]], path: Path) -> None:
    """Draw refusals by threat and mode for cells with default options, a dot for each seed."""
    import matplotlib.pyplot as plt

    start = next(c for c in cells if c["mode"] == "start" and "task" not in c)
    shown = [cell for cell in cells if _plain(cell)]
    threats = [t for t in THREATS if any(cell["threat"] == t for cell in shown)]
    picture, axes = plt.subplots(
        1,
        len(threats),
        figsize=(2.6 * len(threats) + 0.8, 2.8),
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    for axis, threat in zip(axes[0], threats, strict=True):
        axis.axvline(100 * start["refusals"], color="#888888", linestyle="--", linewidth=1)
        for place, mode in enumerate(MAIN):
            found = [c for c in shown if (c["threat"], c["mode"]) == (threat, mode)]
            values = [100 * cell["refusals"] for cell in found]
            axis.plot(values, [place] * len(values), "o", color="#1d5a9e", markersize=7)
        axis.set(title=threat.replace("_", " "), xlim=(-4, 104), ylim=(2.5, -0.5))
        axis.set_xlabel("harmful prompts declined, %")
        axis.spines[["top", "right"]].set_visible(False)
    axes[0, 0].set_yticks(range(len(MAIN)), MAIN)
    picture.savefig(path, dpi=150)


def tradeoff_figure(cells: list[dict[str, Any]], path: Path) -> None:
    """Draw the share of declined harmful over that of declined harmless prompts, a dot per run."""
    import matplotlib.pyplot as plt

    picture, axis = plt.subplots(figsize=(5.2, 3.4), layout="constrained")
    styles = {"start": "k*", "sft": "s", "star_dss": "o", "rejection": "^"}
    for mode, style in styles.items():
        found = [c for c in cells if c["mode"] == mode and not c.get("noise")]
        across, up = ([100 * c[k] for c in found] for k in ("over_refusal", "refusals"))
        if found:
            axis.plot(
                across, up, style, label=mode, markersize=12 if mode == "start" else 7, alpha=0.8
            )
    axis.set_xlim(left=-2)
    axis.set_ylim(-4, 104)
    axis.set_xlabel("harmless prompts declined, %")
    axis.set_ylabel("harmful prompts declined, %")
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, fontsize=8, loc="lower right")
    picture.savefig(path, dpi=150)


def noise_figure(cells: list[dict[str, Any]], path: Path) -> None:
    """Draw refusals against the share of inverted verdicts, for each kind of error."""
    import matplotlib.pyplot as plt

    clean = [c for c in cells if _plain(c) and (c["threat"], c["seed"]) == ("harmful_mix", 0)]
    kinds = sorted({cell["noise"][0] for cell in cells if cell.get("noise")})
    picture, panels = plt.subplots(
        1,
        len(kinds),
        figsize=(3.2 * len(kinds) + 0.6, 2.8),
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    for axis, kind in zip(panels[0], kinds, strict=True):
        for mode, style in (("star_dss", "o-"), ("rejection", "s--")):
            noisy = [c for c in cells if c.get("noise") and c["noise"][0] == kind]
            points = sorted(
                (100 * (c["noise"] or [kind, 0])[1], 100 * c["refusals"])
                for c in [*clean, *noisy]
                if c["mode"] == mode
            )
            axis.plot(*zip(*points, strict=True), style, label=mode)
        axis.set(title=kind.replace("_", " "), ylim=(-4, 104))
        axis.set_xlabel("verdicts turned round, %")
        axis.spines[["top", "right"]].set_visible(False)
    panels[0][0].set_ylabel("harmful prompts declined, %")
    panels[0][0].legend(frameon=False, fontsize=8)
    picture.savefig(path, dpi=150)
