"""Liger's own kernels in TRL, which Triton's interpreter computes on a CPU.

    .venv-axolotl/bin/python -m pytest -m slow tests/integrations/trl/test_trl_liger.py

Axolotl's environment has Liger and Triton; elsewhere a stand-in is used (test_trl_fused.py).
"""

import importlib.util
import json
import os
import subprocess
import sys

import pytest
from support.paths import ROOT, TESTS

for package in ("trl", "triton", "liger_kernel"):
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"needs {package}", allow_module_level=True)

pytestmark = pytest.mark.slow  # Triton's interpreter is slow

# In a process of its own: Triton chooses its interpreter when a kernel is defined.
RUNS = """
import json, pathlib, sys
import support.interpreted_triton
from support.guards import register_guard
from support.models import make_tokenizer
from support.trl_runs import tiny_trainer
from support.run_differences import history

register_guard()
folder, found = pathlib.Path(sys.argv[1]), {}
for liger in (False, True):
    trainer = tiny_trainer(
        folder / str(liger), make_tokenizer(), max_steps=2, use_liger_kernel=liger
    )
    trainer.train()
    forward = trainer.model.model.norm.forward.__func__.__module__
    found[forward] = history(trainer)
print("RUNS", json.dumps(found))
"""


def test_losses_are_those_of_a_run_without_liger(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", RUNS, str(tmp_path)],
        env=os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'integrations'}:{TESTS}"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    assert "switched off Liger's fused_linear_cross_entropy" in done.stdout + done.stderr
    (line,) = (line for line in done.stdout.splitlines() if line.startswith("RUNS "))
    stock, kernels = json.loads(line.removeprefix("RUNS ")).items()
    assert kernels[0].startswith("liger_kernel.")
    assert not stock[0].startswith("liger_kernel.")
    assert len(stock[1]) == 2
    for given, wanted in zip(kernels[1], stock[1]):
        assert given == pytest.approx(wanted, rel=1e-5)
