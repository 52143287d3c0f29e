"""Benchmarks are run by hand, and must not rot in between."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest
from support.models import needs_smollm2
from support.paths import ROOT

pytestmark = pytest.mark.slow

pytest.importorskip("trl")

BENCHMARKS = ROOT / "benchmarks"


def run(name: str, *arguments: str) -> str:
    """What a benchmark prints."""
    done = subprocess.run(
        [sys.executable, str(BENCHMARKS / name), *arguments],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("name", sorted(path.name for path in BENCHMARKS.glob("*.py")))
def test_every_benchmark_says_how_it_is_used(name: str) -> None:
    assert "usage" in run(name, "--help")


@needs_smollm2
def test_scoring_compares_the_engine_with_one_pass_per_prefix() -> None:
    said = run(
        "scoring.py",
        "W2",
        "--shape",
        "tiny",
        "--responses",
        "2",
        "--longest",
        "60",
        "--rounds",
        "1",
        "--threads",
        "1",
    )
    distinct = re.search(r"(\d+) distinct, (\d+) computed", said)
    assert distinct is not None
    assert int(distinct[1]) <= int(distinct[2]) <= 1.2 * int(distinct[1])
    difference = re.search(r"largest difference (\S+),", said)
    assert difference is not None
    assert float(difference[1]) <= 1e-4
    for contender in ("engine", "plain", "(a)", "(a')"):
        assert f"{contender:8s}" in said
