"""Fuzz the readers of data, configuration and caches with hostile input, guided by coverage.

    python benchmarks/fuzz.py                      # the targets
    python benchmarks/fuzz.py cache --runs 100000
    python benchmarks/fuzz.py jsonl --minutes 10
    python benchmarks/fuzz.py all --minutes 2      # one after the other, each in its own process
    python benchmarks/fuzz.py sizes                # rows of 10 MB and of 2,000 turns; many minutes
    python benchmarks/fuzz.py attacks --runs 1000  # 1,000 inputs of each kind; without atheris
    python benchmarks/fuzz.py attacks --runs 1000 --kind ranks --kind servers

The targets and their properties are those of tests/project/test_fuzz.py, from
tests/support/fuzz_targets.py. atheris (`pip install atheris`) mutates the inputs: the bytes
themselves if a target reads a file, otherwise the choices from which hypothesis builds an input. An
input that breaks a property ends the run with a traceback and is kept in --corpus; give that file
as --again to run it alone.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import logging
import os
import random
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent / "tests"), str(HERE.parent), str(HERE.parent / "integrations")]

LONGEST = 4096  # bytes per input, enough for every kind of row
SECONDS = 60  # per input; a longer run counts as a hang


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("target", nargs="?")
    parser.add_argument("--runs", type=int, default=-1, help="inputs; default: no limit")
    parser.add_argument("--minutes", type=float, default=0, help="default: no limit")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--corpus", type=Path, help="folder of inputs that is kept and grown")
    parser.add_argument("--kind", action="append", default=[], help="of attacks; default: all")
    parser.add_argument("--again", type=Path, help="an input to try alone")
    given = parser.parse_args()
    if given.target == "attacks":
        sys.exit(_attack(given.kind, max(1, given.runs), given.seed))
    try:
        import atheris
    except ImportError:
        sys.exit(
            "This needs atheris: pip install atheris. Without it: pytest tests/project/test_fuzz.py"
        )
    if given.target == "all":
        sys.exit(_all())
    # Coverage is collected only for modules imported from here on.
    with atheris.instrument_imports(
        include=["star_dss_plugin", "star_dss_axolotl", "star_dss_trl"]
    ):
        from support.fuzz_targets import AXOLOTL_TARGETS, TARGETS, check_sizes
        from support.fuzzing import quiet
        from support.guards import register_guard
    if given.target == "sizes":
        check_sizes(10, 2000)
        return
    targets = TARGETS | AXOLOTL_TARGETS
    if given.target not in targets:
        sys.exit(
            f"Targets: {', '.join([*TARGETS, 'sizes', 'all', 'attacks'])}; where Axolotl is "
            f"installed: {', '.join(AXOLOTL_TARGETS)}"
        )
    if given.runs < 0 and not given.minutes and given.again is None:
        sys.exit("Say how long: --runs N or --minutes N.")
    register_guard()
    quiet()
    target = targets[given.target]
    check: Callable[[bytes], object]
    if target.seeds:
        check = target.check
    else:
        from hypothesis import given as from_inputs
        from hypothesis import settings

        check = settings(database=None, deadline=None)(
            from_inputs(target.inputs)(target.check)
        ).hypothesis.fuzz_one_input  # type: ignore[attr-defined]
    if given.again is not None:
        check(given.again.read_bytes())
        return
    with tempfile.TemporaryDirectory() as scratch:
        corpus = given.corpus or Path(scratch) / "corpus"
        corpus.mkdir(parents=True, exist_ok=True)
        # Choices for hypothesis: random bytes of the usual lengths of inputs.
        chance = random.Random(given.seed)
        seeds = target.seeds or [chance.randbytes(2**n) for n in range(4, 13)]
        for number, seed in enumerate(seeds):
            (corpus / f"seed-{number}").write_bytes(seed)
        atheris.Setup(
            [
                sys.argv[0],
                str(corpus),
                f"-runs={given.runs}",
                f"-seed={given.seed}",
                "-len_control=0",
                f"-max_total_time={round(given.minutes * 60)}",
                f"-max_len={LONGEST}",
                f"-timeout={SECONDS}",
                "-rss_limit_mb=8192",
                f"-artifact_prefix={corpus}/",
                "-print_final_stats=1",
            ],
            check,
        )
        atheris.Fuzz()


def _attack(kinds: list[str], cases: int, number: int) -> int:
    """Try inputs of some or all kinds of attacks and print the outcomes.

    Args:
        kinds: Names of attacks; all if empty.
        cases: Inputs per kind.
        number: The seed.

    Returns:
        The exit status: 1 if an input broke a property, else 0.
    """
    from support.fuzz_attacks import ATTACKS, count_outcomes
    from support.fuzzing import quiet
    from support.guards import register_guard

    register_guard()
    quiet()
    broken = 0
    if unknown := set(kinds) - ATTACKS.keys():
        sys.exit(f"--kind {min(unknown)}: not one of {', '.join(ATTACKS)}")
    for name in kinds or ATTACKS:
        with contextlib.redirect_stdout(io.StringIO()):  # start-up lines
            found, faults = count_outcomes(ATTACKS[name], cases, number)
        outcomes = ", ".join(f"{count:,} {outcome}" for outcome, count in sorted(found.items()))
        print(f"| `{name}` | {sum(found.values()):,} | {outcomes} |", flush=True)
        for line, count, example in faults:
            print(f"    {count} times {line}\n    such as {example!r}", flush=True)
            broken += count
    return int(broken > 0)


def _all() -> int:
    """Run every target with the same arguments; return the number of failed targets."""
    from support.fuzz_targets import TARGETS

    arguments = sys.argv[1:]
    arguments.remove("all")
    failed = 0
    for name in TARGETS:
        print(f"== {name}", flush=True)
        failed += subprocess.run([sys.executable, __file__, name, *arguments]).returncode != 0
    return failed


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    main()
