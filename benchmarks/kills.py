"""Kills runs at random moments, starts them again, and compares what comes out in the end.

    python benchmarks/kills.py score --kills 50
    python benchmarks/kills.py train --kills 50
    python benchmarks/kills.py report --kills 50

SIGKILL to the whole process group, at a moment drawn from the time that an undisturbed run takes.
A run that finishes is compared, file by file and byte by byte, with one that nobody disturbed; then
a new series begins with nothing left of the old one.

  score    `star-dss score` of the demonstration's rows, with a guard that takes its time
  train    scoring, reference log-probabilities and StarDSSTrainer with a checkpoint every second
           step, resumed from the last one; compared are the final weights and the logged losses. A
           checkpoint that transformers had not written to its end cannot be resumed from: its own
           error is counted, and the folder removed
  report   `star-dss report` of scored rows: the page is the old one or the new one, never half

The model is a tiny random one, so that it is the files that are busy.
"""

from __future__ import annotations

import argparse
import collections
import hashlib
import json
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
import hashlib, time
from star_dss_plugin import hookimpl
from star_dss_plugin.guards.base import StreamingGuard

class Slow(StreamingGuard):
    name = "slow"
    identity = {"kind": "slow"}
    def __init__(self, **common): pass
    def token_scores(self, responses):
        time.sleep(0.03 * len(responses))
        def score(text):
            return int.from_bytes(hashlib.sha256(text.encode()).digest()[:3], "big") / 2**24
        return [[(e, score(t[:e])) for e in range(len(t) + 1)] for _, t in responses]

@hookimpl
def star_dss_register_guards(register):
    register("slow", Slow, summary="for the benchmark")
"""
TRAIN = """
import json, shutil, sys
from pathlib import Path
from datasets import load_dataset
from star_dss_trl import StarDSSConfig, StarDSSTrainer
from transformers.trainer_utils import get_last_checkpoint
model, data, out = sys.argv[1:]
trainer = StarDSSTrainer(
    model,
    args=StarDSSConfig(
        output_dir=out, guard="slow", max_steps=12, per_device_train_batch_size=4, save_steps=2,
        logging_steps=1, report_to="none", bf16=False, use_cpu=True, max_length=64,
        disable_tqdm=True, gradient_checkpointing=False,
    ),
    train_dataset=load_dataset("json", data_files=data, split="train").select(range(48)),
)
last = get_last_checkpoint(out) if Path(out).is_dir() else None
try:
    trainer.train(resume_from_checkpoint=last)
except Exception as error:
    if last is None:
        raise
    print("CHECKPOINT", type(error).__name__, error)
    shutil.rmtree(last)
    sys.exit(3)
final = Path(out) / "final"
trainer.model.save_pretrained(final)
losses = [[line["step"], line["loss"], line["grad_norm"]] for line in trainer.state.log_history
          if "grad_norm" in line]
(final / "losses.json").write_text(json.dumps(losses))
"""
CLI = "from star_dss_plugin.cli import main; main()"


def prepare(folder: Path) -> None:
    """The data, a tiny model with a real tokenizer, and the guard as pip would install it."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from star_dss_plugin.smollm2 import load_smollm2

    rows = files("star_dss_plugin").joinpath("data", "demo_mix.jsonl").read_text(encoding="utf-8")
    (folder / "chat.jsonl").write_text(rows, encoding="utf-8")
    tokenizer = load_smollm2()[1]
    torch.manual_seed(0)
    tiny = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, eos_token_id=tokenizer.eos_token_id,
        bos_token_id=tokenizer.bos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    LlamaForCausalLM(tiny).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    (folder / "star_dss_slow.py").write_text(GUARD)
    info = folder / "star_dss_slow-0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: star-dss-slow\nVersion: 0\n")
    (info / "entry_points.txt").write_text("[star_dss]\nslow = star_dss_slow\n")


def command(target: str, folder: Path, out: Path) -> list[str]:
    model, data = str(folder / "model"), str(folder / "chat.jsonl")
    if target == "train":
        return [sys.executable, "-c", TRAIN, model, data, str(out)]
    words = ["score", data, "--tokenizer", model, "--guard", "slow", "-o", str(out), "-q"]
    if target == "report":
        words = ["report", str(folder / "scored"), "-o", str(out / "report.html"), "-q"]
    return [sys.executable, "-c", CLI, *words]


def contents(target: str, out: Path) -> dict[str, str]:
    """The hashes of what a finished run has to have written."""
    root = out / "final" if target == "train" else out
    return {
        str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(root.rglob("*"))
        if path.is_file()
    }


def start(target: str, folder: Path, out: Path, cache: Path) -> subprocess.Popen[str]:
    environment = {
        **os.environ, "STAR_DSS_CACHE": str(cache), "TOKENIZERS_PARALLELISM": "false",
        "PYTHONPATH": os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")]),
    }  # fmt: skip
    return subprocess.Popen(
        command(target, folder, out), env=environment, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True, start_new_session=True,
    )  # fmt: skip


def undisturbed(target: str, folder: Path, where: Path) -> tuple[dict[str, str], float]:
    began = time.monotonic()
    process = start(target, folder, where / "out", where / "cache")
    said, _ = process.communicate()
    if process.returncode:
        raise SystemExit(f"the undisturbed run failed:\n{said}")
    return contents(target, where / "out"), time.monotonic() - began


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
            process = start("score", folder, folder / "scored", folder / "cache")
            process.communicate()
        wanted, seconds = undisturbed(args.target, folder, folder / "first")
        again, _ = undisturbed(args.target, folder, folder / "second")
        if wanted != again:
            raise SystemExit(f"two undisturbed runs differ: {difference(wanted, again)}")
        print(f"{args.target}: an undisturbed run takes {seconds:.1f} s, {len(wanted)} files")
        series = folder / "series"
        while counted["kills"] < args.kills:
            out = series / "out"
            process = start(args.target, folder, out, series / "cache")
            try:
                said, _ = process.communicate(timeout=draw.uniform(0.2, 1.1) * seconds)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.communicate()
                counted["kills"] += 1
                if args.target == "score" and out.exists():  # killed on its way out
                    finished(wanted, contents("score", out), counted)
                    shutil.rmtree(series)
                page = out / "report.html"
                if args.target == "report" and page.exists() and contents("report", out) != wanted:
                    left = [p for p in out.iterdir() if p != page]
                    if hashlib.sha256(page.read_bytes()).hexdigest() != wanted["report.html"]:
                        raise SystemExit(f"half a report was left behind, beside {left}") from None
                    counted["kills that left a scratch file"] += 1
                continue
            if process.returncode == 3:
                counted[f"half a checkpoint: {said.rpartition('CHECKPOINT')[2].split()[0]}"] += 1
                continue
            if process.returncode:
                raise SystemExit(f"a run that was started again failed:\n{said}")
            finished(wanted, contents(args.target, out), counted)
            shutil.rmtree(series)
    print(json.dumps(counted, indent=1))


def finished(
    wanted: dict[str, str], found: dict[str, str], counted: collections.Counter[str]
) -> None:
    if unlike := difference(wanted, found):
        raise SystemExit(f"another result after {counted['kills']} kills: {unlike}")
    counted["series that ended as if nothing had happened"] += 1


def difference(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    names = sorted({*one, *other})
    return [n for n in names if one.get(n) != other.get(n) and not Path(n).name.startswith(".")]


if __name__ == "__main__":
    main()
