"""Time `star-dss score --ray` with one worker and with more, and measure its memory.

    python benchmarks/scaling.py --guard demo --rows 240 --workers 1 2 --rounds 3
    python benchmarks/scaling.py --guard letters --rows 200000 --shard-rows 2000 --workers 2

The rows are those of the demonstration, numbered so that all differ. "letters" is a guard that
computes nothing, so that only reading, segmenting and writing are measured.

A rate counts the rows written after as many shards as there are workers; the time to start Ray and
to load guards is printed separately. Memory is the largest anonymous memory (RssAnon) of the driver
and of any worker, polled twice a second; mapped files do not count. Rows per second of the workers'
CPU time show the cost of Ray also on a busy machine.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.resources import files
from pathlib import Path

LETTERS = """
from star_dss_plugin import hookimpl
from star_dss_plugin.guards.base import StreamingGuard

class Letters(StreamingGuard):
    name = "letters"
    identity = {"kind": "letters"}
    def __init__(self, **common): pass
    def token_scores(self, responses):
        return [[(0, 1.0), (len(text), 0.5)] for _, text in responses]

@hookimpl
def star_dss_register_guards(register):
    register("letters", Letters, summary="for the benchmark")
"""


def make_data(path: Path, rows: int) -> None:
    """Write the demonstration's conversations, numbered."""
    text = files("star_dss_plugin.data").joinpath("assets", "demo_mix.jsonl").read_text()
    known = [json.loads(line)["messages"] for line in text.splitlines()]
    with path.open("w") as file:
        for i in range(rows):
            question, *rest = known[i % len(known)]
            numbered = {**question, "content": f"{question['content']} (No. {i})"}
            file.write(json.dumps({"messages": [numbered, *rest]}) + "\n")


def plugin(folder: Path) -> Path:
    """Write the guard "letters" as an installed package."""
    (folder / "star_dss_letters.py").write_text(LETTERS)
    info = folder / "star_dss_letters-0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: star-dss-letters\nVersion: 0\n")
    (info / "entry_points.txt").write_text("[star_dss]\nletters = star_dss_letters\n")
    return folder


def watched(session: int) -> tuple[float, float, float]:
    """Return MiB of the driver and of the largest Ray worker, and CPU seconds of all workers."""
    driver = worker = seconds = 0.0
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            command = (folder / "cmdline").read_bytes().replace(b"\0", b" ")
            if os.getsid(int(folder.name)) != session and b"ray::" not in command:
                continue
            status = (folder / "status").read_text()
            times = (folder / "stat").read_text().rpartition(")")[2].split()[11:13]
        except OSError:
            continue
        found = [line for line in status.splitlines() if line.startswith("RssAnon:")]
        memory = int(found[0].split()[1]) / 1024 if found else 0.0
        if b"ray::" in command:
            worker = max(worker, memory)
            seconds += sum(map(int, times)) / os.sysconf("SC_CLK_TCK")
        elif int(folder.name) == session:
            driver = memory
    return driver, worker, seconds


def run(args: argparse.Namespace, folder: Path, data: Path, model: Path, workers: int) -> float:
    """Run once; print and return the rate in rows per second."""
    output = folder / f"out-{time.monotonic_ns()}"
    command = [
        sys.executable,
        "-c",
        "from star_dss_plugin.cli import main; main()",
        "score",
        str(data),
        "--ray",
        "--num-workers",
        str(workers),
        "--shard-rows",
        str(args.shard_rows),
        "--tokenizer",
        str(model),
        "--guard",
        args.guard,
        "-o",
        str(output),
        "-q",
    ]
    search = [str(folder), *filter(None, [os.environ.get("PYTHONPATH", "")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(search)}
    start = time.time()
    process = subprocess.Popen(command, env=environment, start_new_session=True)
    peak, busy = (0.0, 0.0), []
    begun = output.with_name(f"{output.name}.incomplete") / "data"
    while process.poll() is None:
        driver, worker, seconds = watched(process.pid)
        peak = (max(peak[0], driver), max(peak[1], worker))
        shards = len(list(begun.glob("train-*"))) if begun.exists() else 0
        if shards >= workers:
            busy.append((seconds, shards))
        time.sleep(0.5)
    taken = time.time() - start
    if process.returncode:
        sys.exit("the run failed; see its messages above")
    done = sorted(path.stat().st_mtime for path in (output / "data").iterdir())
    rate = (len(done) - workers) * args.shard_rows / (done[-1] - done[workers - 1])
    rows = (busy[-1][1] - busy[0][1]) * args.shard_rows
    per_second = rows / (busy[-1][0] - busy[0][0])
    print(
        f"{workers} workers: {rate:.1f} rows/s, {per_second:.1f} rows per CPU second, "
        f"first shards after {done[workers - 1] - start:.0f} "
        f"s, {taken:.0f} s in all; driver {peak[0]:.0f} MiB, worker {peak[1]:.0f} MiB",
        flush=True,
    )
    shutil.rmtree(output)
    return rate


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--guard", default="demo")
    parser.add_argument("--rows", type=int, default=240)
    parser.add_argument("--shard-rows", type=int, default=10)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=1)
    args = parser.parse_args()
    from star_dss_plugin.smollm2 import load_smollm2

    print(platform.machine(), os.cpu_count(), "CPUs")
    with tempfile.TemporaryDirectory() as name:
        folder = plugin(Path(name))
        data, model = folder / "data.jsonl", folder / "model"
        make_data(data, args.rows)
        load_smollm2()[1].save_pretrained(model)
        rates: dict[int, list[float]] = {workers: [] for workers in args.workers}
        for _ in range(args.rounds):
            for workers in args.workers:  # alternating, so that a busy minute slows all
                rates[workers].append(run(args, folder, data, model, workers))
        for workers, found in rates.items():
            print(f"{workers} workers: median {statistics.median(found):.1f} rows/s")


if __name__ == "__main__":
    main()
