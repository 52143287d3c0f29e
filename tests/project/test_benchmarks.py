"""Benchmarks are run by hand; these tests show that they still work."""

from __future__ import annotations

import importlib
import os
import re
from pathlib import Path
from typing import Any

import pytest
from support.forks import forked
from support.models import needs_smollm2
from support.paths import ROOT

from star_dss_plugin.data.requests import Trajectory

pytestmark = pytest.mark.slow

pytest.importorskip("trl")

BENCHMARKS = ROOT / "benchmarks"


def run(folder: Path, name: str, *arguments: str) -> str:
    """Run a benchmark; return what it prints."""
    # A forked process does not find the modules beside the script by itself.
    place = dict(os.environ) | {"PYTHONPATH": str(BENCHMARKS)}
    done = forked(BENCHMARKS / name, list(arguments), place, folder / "log")
    assert done.returncode == 0, done.stdout
    return done.stdout


# The modules that benchmarks share are no commands.
COMMANDS = [path.name for path in BENCHMARKS.glob("*.py") if "__main__" in path.read_text()]


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_every_benchmark_says_how_it_is_used(name: str, tmp_path: Path) -> None:
    assert "usage" in run(tmp_path, name, "--help")


@needs_smollm2
def test_scoring_compares_the_engine_with_one_pass_per_prefix(tmp_path: Path) -> None:
    output = run(
        tmp_path,
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
    distinct = re.search(r"(\d+) distinct, (\d+) computed", output)
    assert distinct is not None
    assert int(distinct[1]) <= int(distinct[2]) <= 1.2 * int(distinct[1])
    difference = re.search(r"largest difference (\S+),", output)
    assert difference is not None
    assert float(difference[1]) <= 1e-4
    for contender in ("engine", "plain", "(a)", "(a')"):
        assert f"{contender:8s}" in output


def test_probed_scores_are_compared_where_a_probe_gave_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    probed: Any = importlib.import_module("probed")
    exact = {"a": Trajectory((0.9, 0.8)), "b": Trajectory((0.1,))}
    given = {
        "a": Trajectory((0.9, 0.9), None, (True, False)),
        "b": Trajectory((0.14,), None, (False,)),
    }
    found = probed.compared(exact, given, 0.05)
    assert found["asked"] == pytest.approx(1 / 3)
    assert found["coverage"] == 0.5
    assert found["mean"] == pytest.approx(0.14 / 3)
    assert found["largest"] == pytest.approx(0.1)
    costs = [probed.Cost(None, tokens, seconds) for tokens, seconds in ((900, 9.0), (100, 3.0))]
    assert probed.ratios(*costs) == "9.0 | 3.0"
