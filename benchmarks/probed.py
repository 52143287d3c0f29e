"""Measure what `trajectory: probed` saves and how far its scores are from exact ones.

    python benchmarks/probed.py DATA_DIR                             # benign, mixed and onset data
    python benchmarks/probed.py DATA_DIR --rows 300 --sample 32      # fewer rows, a smaller sample
    python benchmarks/probed.py DATA_DIR --sets --outcome            # finetuning with both instead
    python benchmarks/probed.py DATA_DIR --count                     # tokens counted, not computed

DATA_DIR holds guard_train, guard_dev, guard_test_A, guard_onset_test, attack_mix and gsm8k_small
(.jsonl; for --outcome also eval_harmful_prompts and eval_benign_prompts). The guard is made by
scripts/train_verdict_guard.py, here if --guard-dir does not exist, which takes more than an hour.
It answers Qwen3Guard's prompt, which has 146 words after the response, once per chunk of 5 tokens.
Exact and probed trajectories of the same responses are computed one after the other in one process,
each with an empty cache. Tokens are those that the engine has computed, padding included. Time is
CPU time of this process, which other programs hardly change.

  benign  worked solutions of school mathematics, and safe rows of the attack mixture
  mixed   labelled safe and harmful responses that the guard was not trained on, and all onset rows
  onset   the onset rows of `mixed`: responses that refuse and then comply

Each ratio is given twice: for all of these rows, and without the cost of fitting the probe, as for
further data of the same kind. All other columns are of responses outside of the probe's sample.
Coverage is the measured share of the probe's scores within the tolerance of the exact ones; a run
estimates it from held-out responses. The guard's AUROC is that of its scores of whole responses.

--count needs only the guard's tokenizer and template. It counts the tokens that exact and probed
trajectories would compute, for several shares of prefixes that the guard scores and several sizes
of data sets.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from sklearn.metrics import roc_auc_score

from star_dss_plugin import load_guard
from star_dss_plugin.data.fingerprints import request_key
from star_dss_plugin.data.requests import PrefixRequest, Trajectory
from star_dss_plugin.data.responses import find_responses
from star_dss_plugin.data.templates.chat import ChatTokenizer
from star_dss_plugin.data.tokenization import tokenize_row
from star_dss_plugin.engines.shared_prefix.tree import build_tree
from star_dss_plugin.guards.base import Guard
from star_dss_plugin.guards.probing.fitted import FittedProbe
from star_dss_plugin.guards.probing.guard import ProbingGuard, make_probing
from star_dss_plugin.guards.prompting.template import GuardTemplate
from star_dss_plugin.logprobs import IGNORE_INDEX
from star_dss_plugin.scoring.probed import POOL, STRIDE, Pool, ProbedTrajectories
from star_dss_plugin.segmenters import tokens
from star_dss_plugin.smollm2 import load_smollm2

BENIGN = ("gsm8k_small", "attack_mix")
TEST = "guard_test_A"
MIXED = (TEST, "guard_dev")
ONSET = "guard_onset_test"


def rows_of(folder: Path, name: str) -> list[dict[str, Any]]:
    lines = (folder / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


@cache
def chat_tokenizer() -> ChatTokenizer:
    _, tokenizer = load_smollm2()
    return ChatTokenizer(tokenizer)


def requests(rows: Sequence[Mapping[str, Any]], chunk: int) -> dict[str, PrefixRequest]:
    """Return the guard's requests by key; equal responses have one request."""
    chat, found = chat_tokenizer(), {}
    for row in rows:
        messages = [
            {"role": "user", "content": row["prompt"]},
            {"role": "assistant", "content": row["response"]},
        ]
        tokenized = tokenize_row({"messages": messages}, chat)
        for response in find_responses({**tokenized, "messages": messages}, chat, tokens, chunk):
            found[request_key(response.request)] = response.request
    return found


@dataclass
class Cost:
    """Count tokens that the engine computes, and seconds of this process's CPU."""

    verdict: Any
    tokens: int = 0
    seconds: float = 0.0

    @contextmanager
    def counted(self) -> Iterator[None]:
        tokens, began = self.verdict._local.computed_tokens, time.process_time()
        yield
        self.tokens += self.verdict._local.computed_tokens - tokens
        self.seconds += time.process_time() - began

    def __str__(self) -> str:
        return f"{self.tokens} tokens, {self.seconds:.1f} s"


class Parts(ProbedTrajectories):
    """Measure the cost of scoring with the probe by itself, and record the keys of the sample."""

    rest: ClassVar[Cost]
    sample: ClassVar[set[str]]

    def _probe_of_sample(
        self,
        guard: ProbingGuard,
        pool: Pool,
        sample: Mapping[str, Trajectory],
        weights: Mapping[str, float],
    ) -> FittedProbe:
        type(self).sample = set(sample)
        return super()._probe_of_sample(guard, pool, sample, weights)

    def score_without_fitting(self, guard: Guard) -> tuple[dict[str, Trajectory], set[str]]:
        with self.rest.counted():
            return super().score_without_fitting(guard)


def measured(guard: Guard, asked: Mapping[str, PrefixRequest]) -> tuple[Parts, Any, Cost]:
    """Score with an empty cache; return the scoring object, the trajectories and the cost."""
    verdict = getattr(guard, "exact", guard)
    verdict.trajectories([PrefixRequest((), "a", (1,))])  # loads and checks the guard
    cost = Cost(verdict)
    with tempfile.TemporaryDirectory() as root:
        places = dict.fromkeys(asked, 0)
        asking = Parts(asked, places, Path(root), progress=False, strict=True)
        Parts.rest, Parts.sample = Cost(verdict), set()
        with cost.counted():
            found = asking.trajectories(guard)
    return asking, found, cost


def compared(
    exact: Mapping[str, Trajectory], probed: Mapping[str, Trajectory], tolerance: float
) -> dict[str, float]:
    """Return differences over all prefixes, the probe's coverage, and the share that was asked."""
    off = np.concatenate([np.abs(np.subtract(probed[k].scores, exact[k].scores)) for k in exact])
    asked = np.concatenate([probed[k].asked or [True] * len(probed[k].scores) for k in exact])
    own = off[~asked.astype(bool)]
    return {
        "asked": float(asked.mean()),
        "coverage": float((own <= tolerance).mean()) if len(own) else 1.0,
        "mean": float(off.mean()),
        "largest": float(off.max()),
    }


def auroc(args: argparse.Namespace, exact: Mapping[str, Trajectory]) -> str:
    """Return a line with the AUROC of the scores of whole responses of `TEST`."""
    rows = rows_of(args.data, TEST)
    labels = {key: row["label"] for row in rows for key in requests([row], args.chunk)}
    keys = [key for key in exact if key in labels]
    found = roc_auc_score([labels[key] for key in keys], [exact[key].scores[-1] for key in keys])
    return f"the guard's AUROC on {len(keys)} responses of {TEST} is {found:.3f}"


def ratios(exact: Cost, probed: Cost) -> str:
    """Return the tokens and seconds of `exact` as multiples of those of `probed`."""
    return (
        f"{exact.tokens / max(1, probed.tokens):.1f} | "
        f"{exact.seconds / max(1e-9, probed.seconds):.1f}"
    )


def line(name: str, responses: int, costs: str, found: Mapping[str, float]) -> str:
    return (
        f"| {name} | {responses} | {costs} | {found['asked']:.1%} | {found['coverage']:.1%} "
        f"| {found['mean']:.4f} | {found['largest']:.3f} |"
    )


def guard_in(args: argparse.Namespace) -> dict[str, Any]:
    """Return a description of the guard in --guard-dir; make the guard if it does not exist."""
    if not args.guard_dir.is_dir():
        script = Path(__file__).parents[1] / "scripts" / "train_verdict_guard.py"
        command = [sys.executable, str(script), str(args.data)]
        with tempfile.TemporaryDirectory() as first:
            subprocess.run([*command, first, "--test", "0"], check=True)
            more = ["--whole", "2400", "--passes", "2", "--rate", "4e-4"]
            start = ["--start", f"{first}/adapter"]
            subprocess.run([*command, str(args.guard_dir), *start, *more], check=True)
    return {
        "model": str(args.guard_dir),
        "name": "verdict",
        "prefill": "Safety:",
        "safe_labels": [" Safe"],
        "unsafe_labels": [" Unsafe"],
    }


def counted(args: argparse.Namespace) -> None:
    """Print the ratio of exact to probed tokens by data, number of responses and share asked."""
    template = args.template or (
        args.data.resolve().parent / "guards" / "qwen3guard_gen" / "chat_template.jinja"
    )
    _, tokenizer = load_smollm2()
    prompts = GuardTemplate(
        tokenizer,
        name="verdict",
        chat_template=template.read_text(encoding="utf-8"),
        template_kwargs={},
        prefill="Safety:",
    )
    # The engine runs the common beginning of all prompts once.
    one, other = (
        prompts.prompt_with_response([{"role": "user", "content": c}], c)[0] for c in ("a", "b")
    )
    head = next(i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b)
    shares, counts = (0.0, 0.02, 0.05, 0.1, 0.2), (1_000, 10_000, 100_000)
    print(f"Qwen3Guard's template, SmolLM2's tokenizer, probe_sample {args.sample}")
    print("| data | tokens in one | responses |" + "".join(f" {s:.0%} asked |" for s in shares))
    for name, asked in sets_of(args).items():
        whole, once, length, prefixes = 0, 0, 0, 0
        for request in asked.values():
            group = prompts.prompts(list(request.context), request.text, request.ends)
            trunk, _ = prompts.prompt_with_response(list(request.context), request.text)
            whole += build_tree(0, group).distinct - head
            once += len(trunk) - head
            length += len(trunk) - len(prompts.prompt_with_response(list(request.context), "")[0])
            prefixes += len(request.ends)
        exact, trunk_tokens, own = (n / len(asked) for n in (whole, once, length))
        each = prefixes / len(asked)
        tail = (exact - trunk_tokens) / each
        for count in counts:
            cells = []
            for share in shares:
                # The pool: each response once. The sample: every fourth prefix, and the states.
                sample = POOL * (trunk_tokens + tail) + 2 * trunk_tokens + each * tail / STRIDE
                # A response with a prefix that the guard scores runs once more.
                again = trunk_tokens * (1 - (1 - share) ** each)
                rest = count * (trunk_tokens + share * each * tail + again)
                cells.append(f"{count * exact / (args.sample * sample + rest):.1f}")
            print(f"| {name} | {own:.0f} | {count:,} | " + " | ".join(cells) + " |", flush=True)


def sets_of(args: argparse.Namespace) -> dict[str, dict[str, PrefixRequest]]:
    """Return the requests of benign data, of mixed data, and of the onset rows within it."""
    draw = random.Random(0)
    benign = [r for name in BENIGN for r in rows_of(args.data, name) if r.get("label", 1) == 1]
    mixed = [r for name in MIXED for r in rows_of(args.data, name)]
    onset = requests(rows_of(args.data, ONSET), args.chunk)
    return {
        "benign": requests(draw.sample(benign, min(args.rows, len(benign))), args.chunk),
        "mixed": requests(draw.sample(mixed, min(args.rows, len(mixed))), args.chunk) | onset,
        "onset": onset,
    }


def scoring(args: argparse.Namespace, description: dict[str, Any]) -> None:
    sets = sets_of(args)
    onset = sets["onset"]
    print(
        f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}; "
        f"chunks of {args.chunk}, probe_sample {args.sample}, probe_tolerance {args.tolerance}"
    )
    print(
        "| data | responses | tokens ÷ | time ÷ | without learning: tokens ÷ | time ÷ |",
        end="",
    )
    print(" asked | coverage | mean | largest |")
    print("| --- |" + " ---: |" * 9, flush=True)
    for name in args.sets:
        asked = sets[name]
        guard = load_guard(description)
        _, exact, full = measured(guard, asked)
        asking, probed, less = measured(
            make_probing(guard, args.sample, args.tolerance, 0.5), asked
        )
        guard.close()
        outside = [key for key in asked if key not in Parts.sample]
        parts = ({key: found[key] for key in outside} for found in (exact, probed))
        costs = f"{ratios(full, less)} | {ratios(full, asking.rest)}"
        print(line(name, len(asked), costs, compared(*parts, args.tolerance)))
        if name == "mixed":
            parts = (
                {key: found[key] for key in outside if key in onset} for found in (exact, probed)
            )
            costs = " | ".join(["–"] * 4)
            print(line("onset", len(onset), costs, compared(*parts, args.tolerance)))
            print(auroc(args, exact))
        scores = np.concatenate([answer.scores for answer in exact.values()])
        sure = np.minimum(scores, 1 - scores) <= args.tolerance
        print(f"{name}: {sure.mean():.0%} of the guard's scores are as near to 0 or 1 as that")
        print(f"{name}: exact {full}; probed {less}, {asking.rest} of it without learning")
        print(f"{name}: {asking.notes}", flush=True)


def outcome(args: argparse.Namespace, description: dict[str, Any]) -> None:
    """Finetune on a poisoned mixture with exact and with probed scores, and measure the models."""
    from threats import Bench

    told = argparse.Namespace(
        data=args.data, held_out=48, prompts=100, benign=50, grid="small", keep=None
    )
    scores = {}
    for trajectory in ("exact", "probed"):
        began = time.process_time()
        how = {
            "guard": description,
            "trajectory": trajectory,
            "probe_sample": args.sample,
            "probe_tolerance": args.tolerance,
        }
        bench = Bench(told, how)
        found = bench.run(
            {
                "threat": "harmful_mix",
                "mode": "star_dss",
                "finetuning": "lora",
                "ratio": 0.2,
                "steps": args.steps,
                "seed": 0,
                "noise": None,
                "kl_coef": 0.5,
                "kl_estimator": "k2",
                "chunk_size": args.chunk,
                "rate": None,
            }
        )
        shown = ("refusals", "prefill_refusals", "over_refusal", "task_loss", "drift")
        print(trajectory, {key: round(found[key], 4) for key in shown}, found["poison_score"])
        (scored,) = bench.scored.values()
        trained = np.concatenate(scored["labels"]) != IGNORE_INDEX
        scores[trajectory] = np.concatenate(scored["star_scores"])[trained]
        print(f"{trajectory}: {time.process_time() - began:.0f} s in all", flush=True)
    off = np.abs(scores["exact"] - scores["probed"])
    print(
        f"of the scores {(off > 0).mean():.1%} differ, all by {off.mean():.4f} on average, "
        f"{(off <= args.tolerance).mean():.1%} by no more than the tolerance"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("--guard-dir", type=Path, default=Path("runs/verdict_guard"))
    parser.add_argument("--rows", type=int, default=2000, help="at most, of each kind of data")
    parser.add_argument("--sets", nargs="*", default=["benign", "mixed"])
    parser.add_argument("--chunk", type=int, default=5)
    parser.add_argument("--sample", type=int, default=256)
    parser.add_argument("--tolerance", type=float, default=0.05)
    parser.add_argument("--outcome", action="store_true", help="finetune with both, too")
    parser.add_argument("--count", action="store_true", help="count tokens, compute nothing")
    parser.add_argument("--template", type=Path, help="with --count; default: beside the data")
    parser.add_argument("--steps", type=int, default=40, help="of finetuning")
    args = parser.parse_args()
    if args.count:
        counted(args)
        return
    description = guard_in(args)
    if args.sets:
        scoring(args, description)
    if args.outcome:
        outcome(args, description)


if __name__ == "__main__":
    main()
