"""Compare cut-cross-entropy's per-token losses with this project's chunked projection.

    pip install cut-cross-entropy
    python benchmarks/heads.py
    python benchmarks/heads.py --implementation cce --device cuda --dtype bfloat16

Both compute log π(y_t) of the trained tokens from the last hidden states. A step computes the loss
from them (cross-entropy and k2 against a reference, weighted by token) and its gradients for the
hidden states and the head. Time: medians of alternating rounds in one process. Memory: each
contender runs alone in its own process; its peak minus the memory held before the step.

`torch_compile` is cut-cross-entropy's implementation for machines without a GPU, `cce` its Triton
kernel. With TRITON_INTERPRET=1 the kernel also runs on a CPU, to compare values but not time.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from star_dss_plugin.logprobs import IGNORE_INDEX, kl_estimate, token_logprobs
from star_dss_plugin.training.head import Projection

ARMS = ("chunked", "cut-cross-entropy")


def inputs(args: argparse.Namespace) -> dict[str, Tensor]:
    """Return hidden states, the head's weight, labels (half of them trained) and scores."""
    generator = torch.Generator().manual_seed(0)

    def made(*shape: int) -> Tensor:
        values = torch.randn(*shape, generator=generator)
        return values.to(args.device, getattr(torch, args.dtype))

    labels = torch.randint(args.vocab, (1, args.tokens), generator=generator)
    labels[:, : args.tokens // 2] = IGNORE_INDEX
    scores = torch.rand(1, args.tokens - 1, generator=generator)
    return {
        "states": made(1, args.tokens, args.hidden).requires_grad_(),
        "weight": made(args.vocab, args.hidden).mul_(args.sharpness).requires_grad_(),
        "labels": labels.to(args.device),
        "scores": scores.to(args.device),
    }


def logps_of(
    arm: str, args: argparse.Namespace, states: Tensor, weight: Tensor, labels: Tensor
) -> Tensor:
    if arm == "chunked":
        return token_logprobs(states, labels, Projection(weight, None, 1.0, None))
    from cut_cross_entropy import linear_cross_entropy

    losses: Tensor = linear_cross_entropy(
        states,
        weight,
        labels,
        reduction="none",
        shift=True,
        filter_eps="high" if args.filter else None,
        impl=args.implementation,
    )
    return -losses.float()


def step(arm: str, args: argparse.Namespace, given: dict[str, Tensor]) -> tuple[Tensor, ...]:
    """Return log-probabilities and the gradients of hidden states and head."""
    states, weight = given["states"], given["weight"]
    logps = logps_of(arm, args, states, weight, given["labels"])
    reference = logps.detach() + 0.1 * (given["scores"] - 0.5)  # a policy's usual distance
    kl = kl_estimate(logps, reference, "k2")
    trained = given["labels"][:, 1:] != IGNORE_INDEX
    terms = -given["scores"] * logps + (1 - given["scores"]) * kl
    loss = torch.where(trained, terms, 0.0).sum() / trained.sum()
    grads = torch.autograd.grad(loss, (states, weight))
    return logps.detach(), *grads


def apart(one: Tensor, other: Tensor) -> float:
    """Return the largest absolute difference divided by the largest absolute value of `other`."""
    return float((one.float() - other.float()).abs().max() / other.float().abs().max())


def peak(arm: str, args: argparse.Namespace) -> float:
    """Return the GiB that a step adds at its peak; a small step before it compiles if need be."""
    small = argparse.Namespace(**{**vars(args), "tokens": 64})
    step(arm, args, inputs(small))
    given = inputs(args)
    if args.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step(arm, args, given)
        return (torch.cuda.max_memory_allocated() - before) / 2**30
    before = resident("VmRSS")
    step(arm, args, given)
    return resident("VmHWM") - before


def resident(name: str) -> float:
    status = Path("/proc/self/status").read_text()
    return int(status.split(f"{name}:")[1].split()[0]) / 2**20


def seconds(run: Callable[[], Any], device: str) -> float:
    start = time.perf_counter()
    run()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--implementation", choices=("torch_compile", "cce"))
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--hidden", type=int, default=576)
    parser.add_argument("--vocab", type=int, default=49152)
    parser.add_argument(
        "--sharpness", type=float, default=0.05, help="spread of the head's weights"
    )
    parser.add_argument("--filter", action="store_true", help="cce leaves out small gradients")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--memory-of", choices=ARMS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.implementation is None:
        args.implementation = "cce" if args.device == "cuda" else "torch_compile"
    if args.memory_of:
        print(json.dumps(peak(args.memory_of, args)))
        return
    given = inputs(args)
    ours, theirs = (step(arm, args, given) for arm in ARMS)  # the first round compiles
    names = ("log-probabilities", "gradient of hidden states", "gradient of the head")
    for name, one, other in zip(names, theirs, ours, strict=True):
        print(f"{name}: largest difference ÷ largest value {apart(one, other):.1e}")
    del ours, theirs
    found: dict[str, list[float]] = {arm: [] for arm in ARMS}
    for i in range(args.rounds):
        for arm in ARMS if i % 2 else ARMS[::-1]:
            found[arm].append(seconds(partial(step, arm, args, given), args.device))
    del given
    peaks = {}
    for arm in ARMS:
        command = [sys.executable, __file__, *sys.argv[1:], "--memory-of", arm]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        peaks[arm] = json.loads(done.stdout.splitlines()[-1])
    print(
        f"{args.tokens // 2} trained tokens, {args.hidden} × {args.vocab}, {args.dtype} on "
        f"{args.device}, {args.implementation}; torch {torch.__version__}"
    )
    print("| arm | s | × chunked | peak GiB | × chunked |")
    print("| --- | ---: | ---: | ---: | ---: |")
    for arm in ARMS:
        ratios = [a / b for a, b in zip(found[arm], found["chunked"], strict=True)]
        print(
            f"| {arm} | {statistics.median(found[arm]):.3f} | {statistics.median(ratios):.2f} "
            f"| {peaks[arm]:.2f} | {peaks[arm] / peaks['chunked']:.2f} |"
        )


if __name__ == "__main__":
    main()
