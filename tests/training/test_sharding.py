"""FSDP and DeepSpeed on two gloo ranks take the steps that one process takes."""

import importlib.util
import json
import os
import subprocess
import sys

import pytest
from support import sharded_runs
from support.paths import ROOT

pytest.importorskip("trl")
pytest.importorskip("peft")

CLOSE = 1e-5
TRL = ("trl", "trl-lora", "trl-adapter-full", "trl-adapter-rare", "trl-checkpointing")
PLAIN = ("plain", "plain-adapter-full", "plain-adapter-rare")
RUNS = {
    "fsdp2": (*TRL, *PLAIN, "trl-named-full", "trl-packed", "trl-resumed", "trl-copy-full"),
    "fsdp2-meta": ("trl", "trl-adapter-full", "trl-named-full"),
    "fsdp2-head": ("plain-untied",),
    "fsdp1": ("trl", "trl-lora", "plain", "plain-adapter-full", "plain-adapter-rare"),
    "zero1": ("trl",),
    "zero2": ("trl", "trl-adapter-full", "trl-copy-full", "plain", "plain-resumed"),
    "zero3": (*TRL, *PLAIN, "trl-named-full", "trl-resumed", "trl-copy-full"),
}
REFUSED = {
    ("fsdp2", "trl-copy-full"): "FSDP2 leaves no rank whole parameters",
    ("zero3", "trl-copy-full"): "DeepSpeed ZeRO-3 leaves no rank whole parameters",
}


def launch(folder, kind, cases):
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"),
        str(ROOT / "tests/support/sharded_runs.py"),
        *(kind, str(folder), *cases),
    ]
    path = os.pathsep.join(
        (str(ROOT), str(ROOT / "integrations"), os.environ.get("PYTHONPATH", ""))
    )
    environment = {**os.environ, **sharded_runs.KINDS[kind], "PYTHONPATH": path}
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=600, check=False
    )
    results = folder / "results.json"
    assert results.exists(), done.stderr[-4000:] + done.stdout[-2000:]
    return json.loads(results.read_text()), done


def apart(one, other):
    return max(
        abs(a - b)
        for mine, wanted in zip(one, other, strict=True)
        for a, b in zip(mine, wanted, strict=True)
    )


@pytest.mark.parametrize("kind", RUNS)
def test_two_ranks_take_the_steps_of_one_process(tmp_path, kind, record_property):
    if kind.startswith("zero") and importlib.util.find_spec("deepspeed") is None:
        pytest.skip("needs DeepSpeed, whose wheels are built where it is installed")
    sharded_runs.model_folder(tmp_path, False)
    sharded_runs.model_folder(tmp_path, True)
    cases = RUNS[kind]
    found, done = launch(tmp_path, kind, cases)
    for name in cases:
        if refusal := REFUSED.get((kind, name)):
            assert refusal in found[name].get("error", ""), name
            continue
        assert "error" not in found[name], (name, found[name], done.stderr[-3000:])
        alone = sharded_runs.train("ddp", tmp_path, 1, name)
        logs = alone["logs"][-len(found[name]["logs"]) :]
        differences = (
            apart(found[name]["logs"], logs),
            apart(
                found[name]["evaluations"], alone["evaluations"][-len(found[name]["evaluations"]) :]
            ),
        )
        record_property(f"{kind} {name}", differences)
        print(kind, name, "steps %.1e evaluation %.1e" % differences, found[name]["sharded"])
        assert max(differences) < CLOSE, name
        assert max(found[name]["kl"]) > 1e-5, name  # the reference was used
        assert found[name]["sharded"] < 0.6, name
