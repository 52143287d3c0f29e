"""vLLM gives the local engine's label probabilities, in process and as an HTTP server.

Needs vLLM: `make test-vllm` makes an environment for it.
"""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from importlib.resources import files

import pytest

from star_dss_plugin import GuardError, load_guard
from star_dss_plugin.data.requests import PrefixRequest
from star_dss_plugin.smollm2 import load_smollm2

pytest.importorskip("vllm", reason="needs vLLM (make test-vllm)")

# vLLM 0.32 uses what torch 2.13 deprecates.
pytestmark = [
    pytest.mark.filterwarnings(f"ignore::{kind}")
    for kind in ("DeprecationWarning", "FutureWarning", "PendingDeprecationWarning")
]
LABELS = {"safe_labels": [" safe", "safe"], "unsafe_labels": [" unsafe", "unsafe"]}
SMALL = {"max_model_len": 1024, "enforce_eager": True, "block_size": 32}
MEMORY = {"VLLM_CPU_KVCACHE_SPACE": "1"}


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory):
    folder = tmp_path_factory.mktemp("smollm2")
    model, tokenizer = load_smollm2()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def _small_cache(monkeypatch):
    for name, value in MEMORY.items():
        monkeypatch.setenv(name, value)


def requests(count=4):
    text = files("star_dss_plugin.data").joinpath("assets", "demo_mix.jsonl").read_text()
    rows = [json.loads(line) for line in text.splitlines()[:count]]
    found = []
    for row in rows:
        *context, answer = row["messages"]
        ends = [*range(20, min(300, len(answer["content"])), 20), min(300, len(answer["content"]))]
        found.append(
            PrefixRequest(tuple(context), answer["content"][:300], tuple(dict.fromkeys(ends)))
        )
    return found


def guard(folder, **options):
    return load_guard(
        {
            "model": str(folder),
            **LABELS,
            "self_check": False,
            "min_label_mass": 0.0,
            **options,
        }
    )


def apart(one, other):
    """Return the largest difference of scores, and the largest relative one of label masses."""
    scores = max(
        abs(a - b)
        for x, y in zip(one, other, strict=True)
        for a, b in zip(x.scores, y.scores, strict=True)
    )
    masses = max(
        abs(a - b) / a
        for x, y in zip(one, other, strict=True)
        for a, b in zip(x.label_mass, y.label_mass, strict=True)
    )
    return scores, masses


@pytest.mark.parametrize(
    ("dtype", "most", "most_mass"), [("float32", 1e-3, 1e-3), ("bfloat16", 5e-2, 0.5)]
)
def test_in_process_equals_local(smollm2, dtype, most, most_mass, capsys):
    asked = requests()
    here = guard(smollm2, dtype="float32", device="cpu").trajectories(asked)
    there = guard(smollm2, dtype=dtype, engine="vllm", engine_options=SMALL)
    found = there.trajectories(asked)
    scores, masses = apart(here, found)
    engine = there._engine
    hits = engine.cached_tokens / engine.prompt_tokens
    with capsys.disabled():
        print(f"\n{dtype}: scores {scores:.2g} apart, masses {masses:.2g}, cached {hits:.0%}")
    assert scores < most
    assert masses < most_mass  # relative, and tiny: this model is no guard
    assert hits > 0.5
    too_long = PrefixRequest(asked[0].context, "safe " * 2000, (10000,))
    with pytest.raises(GuardError, match="max_model_len"):
        there.trajectories([asked[0], too_long])
    there.close()


@pytest.fixture
def serve(smollm2, tmp_path):
    """Return a function that starts `vllm serve` on a loopback port, without waiting for it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    started = []

    def start():
        log = (tmp_path / f"serve-{len(started)}.log").open("w")
        command = [
            sys.executable,
            "-m",
            "vllm.entrypoints.openai.api_server",
            "--model",
            str(smollm2),
            "--host",
            "127.0.0.1",
            "--port",
            str(port),
            "--served-model-name",
            "smollm2",
            "--dtype",
            "float32",
            "--max-model-len",
            "1024",
            "--enforce-eager",
            "--block-size",
            "32",
            "--api-key",
            "sk-test",
        ]
        process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
        started.append(process)
        return process, f"http://127.0.0.1:{port}"

    yield start
    for process in started:
        kill(process)


def kill(process):
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def wait_for(url, process, seconds=180):
    deadline = time.monotonic() + seconds
    while True:
        assert process.poll() is None
        assert time.monotonic() < deadline
        try:
            with socket.create_connection(("127.0.0.1", int(url.rsplit(":", 1)[1])), 1):
                return
        except OSError:
            time.sleep(1)


def test_a_server_that_dies_and_restarts_equals_local(smollm2, serve, monkeypatch, capsys):
    monkeypatch.setenv("STAR_DSS_API_KEY", "sk-test")
    asked = requests()
    here = guard(smollm2, dtype="float32", device="cpu").trajectories(asked)
    process, url = serve()
    wait_for(url, process)
    options = {"model": "smollm2", "prompts_per_request": 4, "concurrency": 2}
    there = guard(smollm2, engine=url, engine_options=options)
    scores, masses = apart(here, there.trajectories(asked))
    with capsys.disabled():
        print(f"\nserver: scores {scores:.2g} apart, masses {masses:.2g}")
    assert max(scores, masses) < 1e-3
    sent = there._engine.sent

    def restart():
        while there._engine.sent < sent + 4:
            time.sleep(0.01)
        kill(process)
        serve()

    restarting = threading.Thread(target=restart)
    restarting.start()
    again = there.trajectories(asked)
    restarting.join()
    assert max(apart(here, again)) < 1e-3
    assert there._engine.sent > 2 * sent - 1  # some were sent again
    there.close()


def test_answers_of_a_comparison_are_those_of_the_local_engine(smollm2, tmp_path, monkeypatch):
    from datasets import Dataset

    from star_dss_plugin.evaluate.comparison import compare
    from star_dss_plugin.evaluate.prompts import read_prompts

    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    rows = [{"prompt": "What is the capital of France?"}, {"prompt": "Add 2 and 3."}]
    asked = read_prompts(Dataset.from_list(rows), "harmful")
    said = [
        compare(
            [str(smollm2)],
            asked,
            output=tmp_path / engine,
            engine=engine,
            max_new_tokens=8,
            dtype="float32",
            progress=False,
        )
        .models[0]
        .answers
        for engine in ("local", "vllm")
    ]
    assert said[0] == said[1]
