"""Processes that are forked from one that has only imported: imports take seconds, forks none."""

import multiprocessing
import os
import runpy
import socket
import subprocess
import sys
import time
from pathlib import Path

FORKS = multiprocessing.get_context("forkserver")
# The server does not find modules of tests, and passes over what is not installed.
FORKS.set_forkserver_preload(
    ["star_dss_plugin.scoring.scorer", "star_dss_trl", "star_dss_plugin.cli.score", "deepspeed"]
)


def forked(
    script: Path, arguments: list[str], environment: dict[str, str], log: Path
) -> subprocess.CompletedProcess[str]:
    """Run a script as `__main__` in a process of its own; return what it printed.

    Args:
        script: A Python file.
        arguments: The script's.
        environment: All of it.
        log: Takes what the script prints.
    """
    process = FORKS.Process(target=_run, args=(str(script), arguments, environment, str(log)))
    process.start()
    process.join()
    return _completed(script, arguments, process.exitcode, log)


def on_ranks(
    count: int, script: Path, arguments: list[str], environment: dict[str, str], log: Path
) -> subprocess.CompletedProcess[str]:
    """Run a script on ranks of one machine, as `torch.distributed.run` does; return what it said.

    Args:
        count: Of ranks. When one fails the others are ended.
        script: Run as `__main__`.
        arguments: The script's.
        environment: All of it; ranks and their meeting place are added.
        log: Takes what all ranks print.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": count}
    meeting["LOCAL_WORLD_SIZE"] = count
    ranks = []
    for rank in range(count):
        place = meeting | {"RANK": rank, "LOCAL_RANK": rank}
        given = environment | {name: str(value) for name, value in place.items()}
        ranks.append(FORKS.Process(target=_run, args=(str(script), arguments, given, str(log))))
        ranks[-1].start()
    deadline = time.monotonic() + 900
    while any(rank.is_alive() for rank in ranks):
        if any(rank.exitcode for rank in ranks) or time.monotonic() > deadline:
            for rank in ranks:
                rank.kill()
        ranks[0].join(0.2)
    code = next((rank.exitcode for rank in ranks if rank.exitcode), 0)
    return _completed(script, arguments, code, log)


def _completed(
    script: Path, arguments: list[str], code: int | None, log: Path
) -> subprocess.CompletedProcess[str]:
    assert code is not None
    said = log.read_text(errors="replace") if log.exists() else ""
    return subprocess.CompletedProcess([str(script), *arguments], code, said, said)


def _run(script: str, arguments: list[str], environment: dict[str, str], log: str) -> None:
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(output, stream)
    os.environ.clear()
    os.environ.update(environment)
    sys.path[:0] = environment.get("PYTHONPATH", "").split(os.pathsep)
    sys.argv = [script, *arguments]
    runpy.run_path(script, run_name="__main__")
