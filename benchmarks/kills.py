"""Kill runs at random moments, start them again, and compare the final results.

    python benchmarks/kills.py score --kills 50
    python benchmarks/kills.py train --kills 50
    python benchmarks/kills.py report --kills 50

SIGKILL is sent to the whole process group, at a random moment within the duration of an undisturbed
run. A finished run is compared, file by file and byte by byte, with an undisturbed one; then a new
series begins in an empty folder.

  score    `star-dss score` of the demonstration's rows, with a slow guard
  train    scoring, reference log-probabilities and StarDSSTrainer with a checkpoint every second
           step, resumed from the last one; the final weights and the logged losses are compared.
           Runs are forked from a process that has imported everything. First the phase (one of
           the three) in which the run will be killed is drawn from those that the series has not
           finished, then the moment; kills are counted by phase. A checkpoint that transformers
           had not completed is removed, as the error message advises, and counted; any other
           error ends the benchmark
  report   `star-dss report` of scored rows: the page is the old one or the new one, never partial

The model is tiny and random, so that most of the time is spent on files. Guard, reference and steps
are slowed down, and results are written every 0.2 seconds instead of 20, so that kills hit every
phase.
"""

from __future__ import annotations

import argparse
import collections
import hashlib
import itertools
import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from importlib.resources import files
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

GUARD = """
import hashlib, os, time
from star_dss_plugin import hookimpl
from star_dss_plugin.data import cache
from star_dss_plugin.guards.base import StreamingGuard

cache._FLUSH_SECONDS = 0.2
pause = 0.03

def mark(what):
    with open(os.environ["KILLS_MARKS"], "a") as file:
        file.write(f"{time.monotonic()} {what}\\n")

class Slow(StreamingGuard):
    name = "slow"
    identity = {"kind": "slow"}
    def __init__(self, **common): pass
    def token_scores(self, responses):
        mark("scoring")
        time.sleep(pause * len(responses))
        def score(text):
            return int.from_bytes(hashlib.sha256(text.encode()).digest()[:3], "big") / 2**24
        return [[(e, score(t[:e])) for e in range(len(t) + 1)] for _, t in responses]

@hookimpl
def star_dss_register_guards(register):
    register("slow", Slow, summary="for the benchmark")
"""
FORKS = multiprocessing.get_context("forkserver")
AIMS = ("scoring", "reference log-probabilities", "starting to train")
FORKS.set_forkserver_preload(["star_dss_trl", "star_dss_plugin.training.attach"])
Run = Any  # a subprocess.Popen or a forked process; both have a pid
CLI = "from star_dss_plugin.cli.app import main; main()"


def prepare(folder: Path) -> None:
    """Prepare data, a tiny model with a real tokenizer, and the guard as an installed package."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from star_dss_plugin.smollm2 import load_smollm2

    rows = (
        files("star_dss_plugin.data")
        .joinpath("assets", "demo_mix.jsonl")
        .read_text(encoding="utf-8")
    )
    (folder / "chat.jsonl").write_text(rows, encoding="utf-8")
    tokenizer = load_smollm2()[1]
    torch.manual_seed(0)
    tiny = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=tokenizer.bos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    LlamaForCausalLM(tiny).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    (folder / "star_dss_slow.py").write_text(GUARD)
    info = folder / "star_dss_slow-0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: star-dss-slow\nVersion: 0\n")
    (info / "entry_points.txt").write_text("[star_dss]\nslow = star_dss_slow\n")


def train(folder: Path, out: Path, environment: dict[str, str]) -> None:
    """Run one training in the current, forked process."""
    os.setsid()
    os.environ.update(environment)
    said = os.open(folder / "said", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(said, 1)
    os.dup2(said, 2)
    sys.path.insert(0, str(folder))
    import star_dss_slow  # type: ignore[import-not-found]
    from datasets import load_dataset
    from star_dss_slow import mark
    from star_dss_trl import StarDSSConfig, StarDSSTrainer
    from transformers.trainer_utils import get_last_checkpoint

    from star_dss_plugin import CheckpointError
    from star_dss_plugin.training.reference import column as precompute

    class Trainer(StarDSSTrainer):
        def training_step(self, *args: Any, **kwargs: Any) -> Any:
            mark("training")
            time.sleep(0.1)
            return super().training_step(*args, **kwargs)

        def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
            mark("writing a checkpoint")
            super()._save_checkpoint(*args, **kwargs)
            mark("training")

    apply_to_logits = precompute.apply_to_logits

    def slow(*args: Any, **kwargs: Any) -> Any:
        mark("reference log-probabilities")
        time.sleep(0.3)
        return apply_to_logits(*args, **kwargs)

    precompute.apply_to_logits, precompute._BATCH_TOKENS = slow, 128
    star_dss_slow.pause = 0.2
    mark("preparing data")
    data = load_dataset("json", data_files=str(folder / "chat.jsonl"), split="train")
    trainer = Trainer(
        str(folder / "model"),
        args=StarDSSConfig(
            output_dir=str(out),
            guard="slow",
            max_steps=6,
            per_device_train_batch_size=4,
            save_steps=2,
            logging_steps=1,
            report_to="none",
            bf16=False,
            use_cpu=True,
            max_length=64,
            disable_tqdm=True,
            gradient_checkpointing=False,
        ),
        train_dataset=data.select(range(48)),
    )
    last = get_last_checkpoint(str(out)) if out.is_dir() else None
    mark("starting to train")
    try:
        trainer.train(resume_from_checkpoint=last)
    except CheckpointError:
        assert last is not None
        shutil.rmtree(last)
        sys.exit(3)
    mark("writing the result")
    trainer.model.save_pretrained(out / "final")
    lines = [line for line in trainer.state.log_history if "grad_norm" in line]
    losses = [[line["step"], line["loss"], line["grad_norm"]] for line in lines]
    (out / "final" / "losses.json").write_text(json.dumps(losses))


def command(target: str, folder: Path, out: Path) -> list[str]:
    model, data = str(folder / "model"), str(folder / "chat.jsonl")
    words = ["score", data, "--tokenizer", model, "--guard", "slow", "-o", str(out), "-q"]
    if target == "report":
        words = ["report", str(folder / "scored"), "-o", str(out / "report.html"), "-q"]
    return [sys.executable, "-c", CLI, *words]


def contents(target: str, out: Path) -> dict[str, str]:
    """Return the hashes of the files that a finished run must have written."""
    root = out / "final" if target == "train" else out
    return {
        str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(root.rglob("*"))
        if path.is_file()
    }


def start(target: str, folder: Path, out: Path, cache: Path) -> Run:
    environment = {
        "STAR_DSS_CACHE": str(cache),
        "TOKENIZERS_PARALLELISM": "false",
        "KILLS_MARKS": str(folder / "marks"),
    }
    (folder / "marks").write_text("")
    if target == "train":
        process = FORKS.Process(target=train, args=(folder, out, environment))
        process.start()
        while process.is_alive() and not (folder / "marks").stat().st_size:
            time.sleep(0.01)
        return process
    path = os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")])
    with open(folder / "said", "w") as said:
        return subprocess.Popen(
            command(target, folder, out),
            env={**os.environ, **environment, "PYTHONPATH": path},
            stdout=said,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def status(run: Run, timeout: float | None = None) -> int | None:
    """Return the exit status of a run, or None if it is still running after `timeout` seconds."""
    if isinstance(run, subprocess.Popen):
        try:
            return run.wait(timeout)
        except subprocess.TimeoutExpired:
            return None
    run.join(timeout)
    found: int | None = run.exitcode
    return found


def marks(folder: Path) -> list[tuple[float, str]]:
    """Return the start time and name of each phase of a run; the last entry is the current one."""
    lines = (folder / "marks").read_text().split("\n")[:-1]
    return [(float(when), what) for when, _, what in (line.partition(" ") for line in lines)]


def undisturbed(
    target: str, folder: Path, where: Path
) -> tuple[dict[str, str], float, dict[str, float]]:
    """Return a run's output, its duration in seconds, and the duration of each of AIMS."""
    began = time.monotonic()
    run = start(target, folder, where / "out", where / "cache")
    if status(run):
        raise SystemExit(f"the undisturbed run failed:\n{(folder / 'said').read_text()}")
    end = time.monotonic()
    found = marks(folder) if target == "train" else []
    begins = [next(when for when, what in found if what == aim) for aim in AIMS if found]
    spans = zip(AIMS, itertools.pairwise([*begins, end]), strict=False)
    return contents(target, where / "out"), end - began, {aim: b - a for aim, (a, b) in spans}


def reach(run: Run, folder: Path, aim: str) -> None:
    """Wait until a run begins the phase `aim` or ends."""
    while status(run, 0.01) is None and aim not in [what for _, what in marks(folder)]:
        pass


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("target", choices=("score", "train", "report"))
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    draw, counted = random.Random(args.seed), collections.Counter[str]()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        prepare(folder)
        if args.target == "report":
            status(start("score", folder, folder / "scored", folder / "cache"))
        wanted, seconds, spans = undisturbed(args.target, folder, folder / "first")
        again, *_ = undisturbed(args.target, folder, folder / "second")
        if wanted != again:
            raise SystemExit(f"two undisturbed runs differ: {difference(wanted, again)}")
        print(f"{args.target}: an undisturbed run takes {seconds:.1f} s, {len(wanted)} files")
        series, done = folder / "series", 0
        while counted["kills"] < args.kills:
            out = series / "out"
            run = start(args.target, folder, out, series / "cache")
            if args.target == "train":
                aim = draw.choices(AIMS[done:], weights=(3, 2, 1)[done:])[0]
                reach(run, folder, aim)
                ended = status(run, draw.uniform(0, 1.1) * spans[aim])
            else:
                ended = status(run, draw.uniform(0.2, 1.1) * seconds)
            if ended is None:
                os.killpg(run.pid, signal.SIGKILL)
                status(run)
                counted["kills"] += 1
                doing = [what for _, what in marks(folder)] or ["not known"]
                counted[f"kills: {doing[-1]}"] += 1
                done = max([done, *(AIMS.index(what) for what in doing if what in AIMS)])
                if args.target == "score" and out.exists():  # killed while it exited
                    finished(wanted, contents("score", out), counted)
                    shutil.rmtree(series)
                page = out / "report.html"
                if args.target == "report" and page.exists() and contents("report", out) != wanted:
                    left = [p for p in out.iterdir() if p != page]
                    if hashlib.sha256(page.read_bytes()).hexdigest() != wanted["report.html"]:
                        raise SystemExit(f"half a report was left behind, beside {left}") from None
                    counted["kills that left a scratch file"] += 1
                continue
            if ended == 3:
                counted["half a checkpoint, named and removed"] += 1
                continue
            if ended:
                said = (folder / "said").read_text()
                raise SystemExit(f"a run that was started again failed:\n{said}")
            finished(wanted, contents(args.target, out), counted)
            shutil.rmtree(series)
            done = 0
    print(json.dumps(counted, indent=1))


def finished(
    wanted: dict[str, str], found: dict[str, str], counted: collections.Counter[str]
) -> None:
    if unlike := difference(wanted, found):
        raise SystemExit(f"another result after {counted['kills']} kills: {unlike}")
    counted["series that ended as if nothing had happened"] += 1
    print(json.dumps(counted), file=sys.stderr)


def difference(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    names = sorted({*one, *other})
    return [n for n in names if one.get(n) != other.get(n) and not Path(n).name.startswith(".")]


if __name__ == "__main__":
    main()
