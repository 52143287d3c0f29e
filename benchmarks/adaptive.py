"""Measure what `trajectory: adaptive` saves and what it costs, on recorded trajectories.

    python benchmarks/adaptive.py                       # the demonstration's rows
    python benchmarks/adaptive.py DATA.jsonl …          # rows with messages, or prompt and response

The demonstration guard scores every prefix (chunks of 5 tokens) once; then the adaptive rule is
replayed on those scores. For each file, label and ε the script prints the share of prefixes that
the guard would score, and how far the adaptive scores are from the exact ones. The demonstration
guard's scores are seldom close to 0 or 1; with a guard whose scores are, the adaptive rule saves
more.
"""

from __future__ import annotations

import argparse
import json
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np

from star_dss_plugin import load_guard
from star_dss_plugin.data.requests import PrefixRequest, Trajectory
from star_dss_plugin.data.responses import find_responses
from star_dss_plugin.data.templates.chat import ChatTokenizer
from star_dss_plugin.data.tokenization import tokenize_row
from star_dss_plugin.guards.adaptive import AdaptiveGuard
from star_dss_plugin.guards.base import Guard
from star_dss_plugin.segmenters import tokens
from star_dss_plugin.smollm2 import load_smollm2

EPSILONS = (0.01, 0.02, 0.05, 0.1, 0.2)


class Recorded(Guard):
    """Return recorded scores."""

    name = "recorded"

    def __init__(self, exact: dict[tuple[Any, str], dict[int, float]]) -> None:
        self.exact = exact

    @property
    def identity(self) -> dict[str, Any]:
        return {}

    def trajectories(self, requests: Any) -> list[Trajectory]:
        return [
            Trajectory(tuple(self.exact[(str(r.context), r.text)][end] for end in r.ends))
            for r in requests
        ]


def requests(path: Any, tokenizer: Any) -> dict[str, list[PrefixRequest]]:
    """Return requests by the rows' label (1 safe, 0 harmful), or under "rows" without a label."""
    found: dict[str, list[PrefixRequest]] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        label = {1: "safe rows", 0: "harmful rows"}.get(row.get("label"), "rows")
        messages = row.get("messages") or [
            {"role": "user", "content": row["prompt"]},
            {"role": "assistant", "content": row["response"]},
        ]
        tokenized = tokenize_row({"messages": messages}, ChatTokenizer(tokenizer))
        responses = find_responses(
            {**tokenized, "messages": messages}, ChatTokenizer(tokenizer), tokens, 5
        )
        found.setdefault(label, []).extend(r.request for r in responses)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("data", nargs="*", type=Path)
    args = parser.parse_args()
    _, tokenizer = load_smollm2()
    guard = load_guard("demo")
    print("guard: demo (a demonstration); chunks of 5 tokens")
    print("| file | rows | prefixes | ε | asked | mean difference | largest |")
    print("| --- | --- | ---: | ---: | ---: | ---: | ---: |")
    for path in args.data or [files("star_dss_plugin.data").joinpath("assets", "demo_mix.jsonl")]:
        for label, asked in requests(path, tokenizer).items():
            exact: dict[tuple[Any, str], dict[int, float]] = {}
            for batch in guard.plan(asked):
                for i, found in zip(
                    batch, guard.trajectories([asked[i] for i in batch]), strict=True
                ):
                    request = asked[i]
                    exact[(str(request.context), request.text)] = dict(
                        zip(request.ends, found.scores, strict=True)
                    )
            for epsilon in EPSILONS:
                fewer = AdaptiveGuard(Recorded(exact), epsilon)
                got = np.concatenate([t.scores for t in fewer.trajectories(asked)])
                true = np.concatenate([t.scores for t in Recorded(exact).trajectories(asked)])
                off = np.abs(got - true)
                print(
                    f"| {path.name} | {label} | {fewer.wanted} | {epsilon} | "
                    f"{fewer.asked / fewer.wanted:.0%} | {off.mean():.4f} | {off.max():.3f} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
