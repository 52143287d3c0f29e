"""Processes forked from a server that has imported the packages, which saves seconds each time."""

import multiprocessing
import os
import runpy
import socket
import subprocess
import sys
import time
from pathlib import Path

FORKS = multiprocessing.get_context("forkserver")
# The server cannot import modules of tests, and skips packages that are not installed.
FORKS.set_forkserver_preload(
    ["star_dss_plugin.scoring.scorer", "star_dss_trl", "star_dss_plugin.cli.score", "deepspeed"]
)


def forked(
    script: Path, arguments: list[str], environment: dict[str, str], log: Path
) -> subprocess.CompletedProcess[str]:
    """Run a script as `__main__` in a process of its own; return its exit status and output.

    Args:
        script: A Python file.
        arguments: The script's arguments.
        environment: All environment variables of the process.
        log: The file for the script's output.
    """
    process = FORKS.Process(target=_run, args=(str(script), arguments, environment, str(log)))
    process.start()
    process.join()
    return _completed(script, arguments, process.exitcode, log)


def on_ranks(
    count: int, script: Path, arguments: list[str], environment: dict[str, str], log: Path
) -> subprocess.CompletedProcess[str]:
    """Run a script on several ranks of this machine, as `torch.distributed.run` does.

    Args:
        count: The number of ranks. When one fails, the rest are killed.
        script: A Python file, run as `__main__`.
        arguments: The script's arguments.
        environment: All environment variables; rank, world size and master address are added.
        log: The file for the output of all ranks.

    Returns:
        The first exit status that is not 0, and the output of all ranks.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    rendezvous = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": count}
    rendezvous["LOCAL_WORLD_SIZE"] = count
    ranks = []
    for rank in range(count):
        place = rendezvous | {"RANK": rank, "LOCAL_RANK": rank}
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
