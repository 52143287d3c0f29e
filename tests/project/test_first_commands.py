"""The first command of each page of the documentation works as pasted, in an empty folder.

These tests run the real small model offline, so they take minutes.
"""

from __future__ import annotations

import os
import re
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from support.models import needs_smollm2
from support.paths import ROOT

pytestmark = [pytest.mark.slow, needs_smollm2]

NOT_RUN = {
    "fewer_prefixes": "needs a guard of the Hub; tests/scoring/test_probed.py has a tiny one",
    "evidence": "trains for an hour on data that is not shipped",
    "howto_engine": "needs vLLM: tests/engines/test_vllm.py",
    "howto_guard": "needs the guard that the page is about: tests/project/test_howto.py",
    "reference": "its YAML names the user's data; tests/project/test_examples.py runs such files",
    "scale": "scores the data of `scoring` again; tests/scoring/test_shards.py scores less data",
    "performance": "takes minutes; tests/project/test_benchmarks.py runs a shorter one",
}
"""Why the first command of a page is not run here."""
NEEDS = {
    "axolotl": "axolotl",
    "capability": "lm_eval",
    "choose": "trl",
    "landscape": "matplotlib",
}
"""The package that the first command of a page needs."""

BLOCK = re.compile(r"(?:^    \S.*\n)+", re.MULTILINE)
FENCE = re.compile(r"^ *```.*?^ *```\n", re.DOTALL | re.MULTILINE)
COMMAND = re.compile(r"star-dss |accelerate |python ")


def first_commands() -> dict[str, str]:
    """Return the first block of each page with commands, up to the first one that computes."""
    found = {}
    pages = {page.stem: page for page in sorted((ROOT / "docs").glob("*.md"))}
    pages["axolotl"] = ROOT / "integrations" / "star_dss_axolotl" / "README.md"
    for name, page in pages.items():
        text = FENCE.sub("", page.read_text(encoding="utf-8"))
        for block in BLOCK.findall(text):
            lines = re.sub(r" *\\\n *", " ", block).splitlines()
            lines = [line.strip() for line in lines if not line.strip().startswith("pip ")]
            which = [i for i, line in enumerate(lines) if COMMAND.match(line)]
            if which:
                found[name] = "\n".join(lines[: which[0] + 1])
                break
    return found


FIRST = first_commands()


def test_all_pages_with_commands_are_found() -> None:
    assert set(NOT_RUN) <= set(FIRST)
    assert {"scoring", "report", "evaluate", "landscape", "capability", "guards"} <= set(FIRST)


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Return a shell environment with this checkout's `star-dss` and one cache for all tests."""
    folder = tmp_path_factory.mktemp("bin")
    script = folder / "star-dss"
    script.write_text(f"#!{sys.executable}\nfrom star_dss_plugin.cli import main\nmain()\n")
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    path = [str(folder), str(Path(sys.executable).parent), os.environ["PATH"]]
    return {
        **os.environ,
        "PATH": os.pathsep.join(path),
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "integrations")]),
        "STAR_DSS_CACHE": str(tmp_path_factory.mktemp("cache")),
        "HF_HUB_OFFLINE": "1",
    }


# A command that several pages begin with is run once.
PAGE_OF_COMMAND = {
    FIRST[page]: page for page in sorted(FIRST.keys() - NOT_RUN.keys(), reverse=True)
}


@pytest.mark.parametrize("page", sorted(PAGE_OF_COMMAND.values()))
def test_the_first_command_works(page: str, environment: dict[str, str], tmp_path: Path) -> None:
    if page in NEEDS:
        pytest.importorskip(NEEDS[page])
    done = subprocess.run(
        ["bash", "-e", "-c", FIRST[page]],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"{FIRST[page]}\n{done.stderr[-4000:]}"
    assert done.stdout.strip()
