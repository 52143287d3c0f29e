"""FSDP and DeepSpeed on two gloo ranks take the same steps as one process."""

import functools
import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys

import pytest

pytest.importorskip("trl")
pytest.importorskip("peft")

import transformers
from packaging.version import Version
from support import sharded_data, sharded_runs
from support.forks import on_ranks
from support.paths import ROOT, TESTS
from support.run_differences import CLOSE, largest_difference, largest_weight_difference
from support.sharded_cases import CASES
from support.sharding_kinds import KINDS, RANKS, SPLIT

pytestmark = pytest.mark.slow

TRL = (
    "trl-no-eval",
    "trl",
    "trl-lora",
    "trl-adapter-full",
    "trl-adapter-rare",
    "trl-checkpointing",
)
PLAIN = ("plain", "plain-lora", "plain-adapter-full", "plain-adapter-rare", "plain-named-full")
RUNS = {
    "fsdp2": (
        *TRL,
        *PLAIN,
        "trl-named-full",
        "trl-packed",
        "trl-resumed",
        "trl-copy-full",
        "trl-context",
    ),
    "fsdp2-meta": ("trl", "trl-lora", "trl-adapter-full", "trl-named-full"),
    "fsdp2-head": ("plain-untied", "trl-untied"),
    "fsdp1": ("trl", "trl-lora", "trl-adapter-full", "trl-named-full", *PLAIN),
    "tp": (
        "trl-untied",
        "plain-untied",
        "trl-untied-named",
        "trl-untied-stream",
        "trl-untied-copy",
        "trl-untied-lora",
    ),
    "tp-fsdp2": ("trl-untied", "trl-untied-no-eval", "plain-untied"),
    "fsdp2-loaded": (
        "trl-untied",
        "plain-untied",
        "trl-untied-copy",
        "trl-untied-no-eval",
        "trl-untied-own-optimizer",
    ),
    "zero1": (
        *("trl", "trl-lora", "trl-adapter-full", "trl-copy-full", "trl-named-full"),
        *("plain", "plain-lora", "plain-adapter-full", "plain-copy-full", "plain-named-full"),
    ),
    "zero2": (*TRL, *PLAIN, "trl-named-full", "trl-copy-full", "plain-copy-full", "plain-resumed"),
    "zero3": (*TRL, *PLAIN, "plain-early", "trl-named-full", "trl-resumed", "trl-copy-full"),
    # Sequence parallelism: each rank has a part of every row.
    "zero3-parts": (
        *("trl-padded", "trl-padded-lora", "trl-padded-adapter-full"),
        *("trl-padded-checkpointing", "trl-padded-stream", "trl-padded-uneven"),
        *("trl-fixed-experts", "trl-padded-resumed", "trl-padded-skipping", "trl-padded-packed"),
        *("trl-padded-rejection", "trl-padded-alone", "plain-padded", "plain-padded-adapter-full"),
    ),
    "zero3-parts-of-two": ("trl-fixed-experts", "trl-padded-adapter-full"),
}
IMAGES = {
    "ddp": ("trl-images", "trl-images-tiles"),
    "fsdp2-gemma3": ("trl-images", "trl-images-adapter", "trl-images-whole"),
    "fsdp2-smolvlm": ("trl-images-tiles", "trl-images-named"),
    "zero2": ("trl-images",),
    "zero3": ("trl-images-adapter", "trl-images-tiles", "trl-images-named"),
}
"""Every other batch of a rank has no image."""
SCRIPT = ROOT / "tests/support/sharded_runs.py"
REFUSED = {
    ("fsdp2", "trl-context"): "context parallelism (cp_size) splits a response",
    ("fsdp2", "trl-copy-full"): "FSDP2 leaves no rank whole parameters",
    ("fsdp2-gemma3", "trl-images"): "FSDP2 leaves no rank whole parameters",
    ("fsdp2-smolvlm", "trl-images-named"): r"lm_head) is an FSDP2 unit of its own",
    ("fsdp2-head", "trl-untied"): r"lm_head) is an FSDP2 unit of its own",
    ("fsdp2-loaded", "trl-untied-copy"): "FSDP2 leaves no rank whole parameters",
    ("tp", "trl-untied-lora"): "does not sum them",
    ("tp", "trl-untied-copy"): "tensor parallelism leaves no rank whole parameters",
    ("zero3", "trl-copy-full"): "DeepSpeed ZeRO-3 leaves no rank whole parameters",
    ("zero3-parts", "trl-padded-alone"): "does not exchange the parts correctly",
    ("zero3-parts", "trl-padded-skipping"): "Set ignore_data_skip=True",
    ("zero3-parts", "trl-padded-packed"): "would see each other",
    ("zero3-parts", "trl-padded-rejection"): "may be in another process's part of the row",
}


def environment(kind):
    path = [str(ROOT), str(ROOT / "integrations"), str(TESTS), os.environ.get("PYTHONPATH", "")]
    return {
        **os.environ,
        **KINDS[kind],
        "PYTHONPATH": os.pathsep.join(path),
        "OMP_NUM_THREADS": "1",
    }


@pytest.fixture(scope="module")
def in_one_process(tmp_path_factory):
    """Return a function that trains a case in one process, once; it returns log and model."""
    folder = tmp_path_factory.mktemp("alone")

    @functools.cache
    def trained(name):
        found = sharded_runs.train("ddp", folder, 1, name)
        return found, folder / f"ddp-{name}-1-final"

    return trained


def launch(folder, kind, cases):
    """Train cases on ranks; return the results of each rank, and the output."""
    done = on_ranks(
        RANKS.get(kind, 2), SCRIPT, [kind, str(folder), *cases], environment(kind), folder / "log"
    )
    results = [folder / f"results-{rank}.json" for rank in (0, 1)]
    assert all(path.exists() for path in results), done.stderr[-6000:]
    return [json.loads(path.read_text()) for path in results], done


@pytest.mark.parametrize(
    ("kind", "cases"),
    [*RUNS.items(), *IMAGES.items()],
    ids=[*RUNS, *(f"{k}-images" for k in IMAGES)],
)
def test_two_ranks_take_the_steps_of_one_process(tmp_path, in_one_process, kind, cases):
    if kind.startswith("zero") and importlib.util.find_spec("deepspeed") is None:
        pytest.skip("needs DeepSpeed (pip install 'star-dss-plugin[test]')")
    if "parts" in kind and Version(transformers.__version__) < Version("5.23"):
        pytest.skip("the environment with transformers 5.16 has no DeepSpeed that cuts rows")
    if kind in SPLIT and Version(transformers.__version__) < Version("5.23"):
        pytest.skip("transformers 5.16 neither splits this head nor lets TRL train such a model")
    for shape in {sharded_data.shape_of(CASES[name]) for name in cases} | {""}:
        sharded_data.model_folder(tmp_path, shape)
    for model in {CASES[name].get("vision") for name in cases} - {None}:
        sharded_data.vision_folder(tmp_path, model)
    (found, second), done = launch(tmp_path, kind, cases)
    for name in cases:
        if refusal := REFUSED.get((kind, name)):
            assert refusal in found[name].get("error", ""), name
            assert refusal in second[name].get("error", ""), name
            continue
        assert "error" not in found[name], (name, found[name], done.stderr[-3000:])
        alone, model = in_one_process(name)
        steps = largest_difference(found[name]["logs"], alone["logs"])
        assert len(found[name]["evaluations"]) == len(alone["evaluations"]), name
        evaluations = largest_difference(
            [(0, 0.0), *found[name]["evaluations"]], [(0, 0.0), *alone["evaluations"]]
        )
        saved = 0.0
        if kind != "fsdp1":
            final = tmp_path / f"{kind}-{name}-{RANKS.get(kind, 2)}-final"
            saved = largest_weight_difference(final, model, lora="lora" in CASES[name])
        print(f"{kind} {name}: {steps:.1e}, {evaluations:.1e}, {saved:.1e}")
        assert max(steps, evaluations) < CLOSE, name
        # Adam may divide by numbers close to 0, and sums over shards of a layer round differently.
        assert saved < (1e-3 if kind in SPLIT else 1e-4), name
        assert max(found[name]["kl"]) > 1e-5, name  # the reference was used
        assert kind == "ddp" or found[name]["sharded"] < 0.6, name
        if "parts" in kind:  # a row of 33 tokens and one of padding, or of a fixed length
            lengths = found[name]["lengths"], second[name]["lengths"]
            half = CASES[name].get("fixed", 34) // 2
            assert set(lengths[0]) == set(lengths[1]) == {half}, name
            assert set(alone["lengths"]) == {33}, name


def test_two_ranks_read_a_stream_as_one_process_reads_its_rows(tmp_path, in_one_process):
    """The ranks read the same rows together, or each its own part of the stream."""
    sharded_data.model_folder(tmp_path)
    cases = (
        *("trl-stream", "trl-stream-shards", "plain-stream"),
        *("trl-stream-uneven", "plain-stream-uneven", "trl-stream-resumed"),
    )
    (found, second), done = launch(tmp_path, "ddp", cases)
    for name in cases:
        assert "error" not in found[name], (name, found[name], done.stderr[-3000:])
        alone, _ = in_one_process(name)
        steps = largest_difference(found[name]["logs"], alone["logs"])
        evaluations = largest_difference(found[name]["evaluations"], alone["evaluations"])
        print(f"ddp {name}: {steps:.1e}, {evaluations:.1e}")
        assert max(steps, evaluations) < CLOSE, name
        assert max(found[name]["kl"]) > 1e-5, name
        rows = sum(CASES[name].get("files", [8]))
        counted = sharded_runs.counted(tmp_path, "ddp", name)
        assert counted["rows"] == rows, name
        assert counted["responses"] == counted["provenance"]["responses"] == rows, name
        assert found[name]["read"] == second[name]["read"] == rows, name
    assert "is read again until they end" in done.stderr


def test_ranks_that_differ_are_stopped_on_all_of_them(tmp_path):
    sharded_data.model_folder(tmp_path)
    cases = {
        "trl-other-option": "the same option chunk_size",
        "trl-other-guard": "the same option guard",
        "trl-other-evaluation": "the same eval data",
        "trl-scored-there": "the same train data",
        "trl-other-rows": "the same train data",
        "trl-other-scores": "the same scored train data",
        "trl-other-stream": "the same scored train data",
        "plain-other-model": "the same reference of the train data",
        "trl-stream-empty": "Process 1 got no row of the train stream",
    }
    results, _ = launch(tmp_path, "ddp", tuple(cases))
    for found in results:
        for name, words in cases.items():
            assert words in found[name].get("error", ""), (name, found[name])


def test_adapters_that_begin_with_other_values_on_each_rank_train(tmp_path):
    """New adapters do not change outputs, and DDP broadcasts rank 0's, so this is no error."""
    sharded_data.model_folder(tmp_path)
    name = "plain-other-adapter"
    results, _ = launch(tmp_path, "ddp", (name,))
    alone = sharded_runs.train("ddp", tmp_path, 1, name)
    for found in results:
        assert "error" not in found[name], found[name]["error"]
        assert max(found[name]["kl"]) > 1e-7
    assert largest_difference(results[0][name]["logs"], alone["logs"]) < CLOSE


def test_a_rank_that_is_killed_while_it_scores_stops_the_others(tmp_path):
    """Without a launcher that would end them, the other ranks stop by themselves and say why."""
    sharded_data.model_folder(tmp_path)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks = []
    for rank in (0, 1):
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2}
        place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        ranks.append(
            subprocess.Popen(
                [sys.executable, str(SCRIPT), "ddp", str(tmp_path), "trl-killed"],
                env=environment("ddp") | {name: str(value) for name, value in place.items()},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        )
    said = [process.communicate(timeout=300)[0] for process in ranks]
    assert ranks[1].returncode == -signal.SIGKILL, said[1][-3000:]
    found = json.loads((tmp_path / "results-0.json").read_text())["trl-killed"]
    assert "one of them has ended" in found.get("error", ""), said[0][-3000:]
