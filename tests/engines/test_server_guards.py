"""Guards on an HTTP server: the local engine's scores, faults of the server, and the key."""

import json
import logging
import threading
import time

import pytest
from datasets import Dataset
from support.fake_server import KEY, FakeServer

from star_dss_plugin import (
    ConfigError,
    GuardError,
    StarDSSOptions,
    load_guard,
    provenance_of,
    score_dataset,
)

server = pytest.importorskip(
    "star_dss_plugin.engines.server", reason="needs httpx2 (pip install 'star-dss-plugin[server]')"
)
pytestmark = pytest.mark.usefixtures("short_waits_and_key")


def served_guard(fake, model_dir, **options):
    """Describe a guard that the fake server computes, with some engine options."""
    return {
        "model": str(model_dir),
        "safe_labels": [" good"],
        "unsafe_labels": [" bad"],
        "self_check": False,
        "min_label_mass": 0.0,
        "engine": fake.url,
        "engine_options": {"model": "tiny", "concurrency": 2, **options},
    }


def rows(count):
    return Dataset.from_list(
        [
            {
                "messages": [
                    {"role": "user", "content": f"is {i} bad?"},
                    {"role": "assistant", "content": f"no, {i} is good. " * 6},
                ]
            }
            for i in range(count)
        ]
    )


@pytest.fixture
def saved_model(model_dir):
    """Return the model of `model_dir`."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(model_dir)


def test_scores_are_those_of_the_local_engine(saved_model, tokenizer, model_dir):
    fake = FakeServer(saved_model)
    given = served_guard(fake, model_dir)
    here = {name: value for name, value in given.items() if not name.startswith("engine")}
    found = score_dataset(rows(4), tokenizer, guard=given, progress=False)
    expected = score_dataset(rows(4), tokenizer, guard=here, guard_device="cpu", progress=False)
    for one, other in zip(found["star_scores"], expected["star_scores"], strict=True):
        assert one == pytest.approx(other, abs=1e-5)
    one, other = provenance_of(found), provenance_of(expected)
    assert one["label_mass"] == {k: pytest.approx(v) for k, v in other["label_mass"].items()}
    assert one["guard_identity"]["engine"] == {"kind": "server", "model": "tiny"}
    assert one["guard_identity"]["dtype"] == "as served"
    assert fake.url not in json.dumps(one)
    assert "engine" not in other["guard_identity"]
    fake.stop()


def test_no_prompt_is_sent_again_after_a_server_died(
    saved_model, tokenizer, model_dir, tmp_path, monkeypatch
):
    """Either the server stays away and the run ends, or it returns and the run continues."""
    monkeypatch.setattr("star_dss_plugin.data.cache._FLUSH_SECONDS", 0.0)
    monkeypatch.setattr("star_dss_plugin.guards.verdict._PREFIXES_PER_CALL", 40)
    whole = FakeServer(saved_model)
    expected = score_dataset(
        rows(12),
        tokenizer,
        guard=served_guard(whole, model_dir),
        progress=False,
        score_cache_dir=tmp_path / "whole",
    )
    whole.stop()

    fake = FakeServer(saved_model)
    port = fake.server_address[1]
    fake.faults = [None] * 4 + ["hang up"] * 1000
    with pytest.raises(GuardError, match="start the same run again: what was scored is in"):
        score_dataset(
            rows(12), tokenizer, guard=served_guard(fake, model_dir, retries=2), progress=False
        )
    fake.stop()
    before = {json.dumps(p) for body in fake.bodies[:4] for p in body["prompt"]}

    again = FakeServer(saved_model, port)
    monkeypatch.setattr(server, "_MAX_WAIT_SECONDS", 0.2)

    def restart():
        while len(again.bodies) < 3:
            time.sleep(0.005)
        again.stop()
        time.sleep(0.5)
        threads.append(FakeServer(saved_model, port))

    threads = []
    restarting = threading.Thread(target=restart)
    restarting.start()
    found = score_dataset(rows(12), tokenizer, guard=served_guard(again, model_dir), progress=False)
    restarting.join()
    assert list(found["star_scores"]) == list(expected["star_scores"])
    after = {
        json.dumps(p) for fake in (again, *threads) for body in fake.bodies for p in body["prompt"]
    }
    assert before
    assert not before & after  # no prompt is answered twice
    threads[0].stop()


@pytest.mark.parametrize("fault", [503, "hang up", 401, 403, 404, 302, "old", "one short"])
def test_no_response_counts_as_unsafe_for_a_servers_fault(
    saved_model, tokenizer, model_dir, monkeypatch, fault
):
    monkeypatch.setattr("star_dss_plugin.guards.verdict._PREFIXES_PER_CALL", 20)
    fake = FakeServer(saved_model)
    given = served_guard(fake, model_dir, retries=1, concurrency=1)
    fake.faults = [None] * 3 + [fault] * 1000
    with pytest.raises(GuardError, match="server at|no log-probability"):
        score_dataset(rows(8), tokenizer, guard=given, on_guard_error="unsafe", progress=False)
    fake.stop()


@pytest.mark.parametrize("status", [400, 413, 422])
def test_a_response_that_a_server_refuses_counts_as_unsafe(
    saved_model, tokenizer, model_dir, status
):
    fake = FakeServer(saved_model)
    fake.faults = [None, status]
    given = served_guard(fake, model_dir, concurrency=1)
    found = score_dataset(rows(3), tokenizer, guard=given, on_guard_error="unsafe", progress=False)
    fake.stop()
    assert [min(row) > 0 for row in found["star_scores"]] == [True, False, True]


@pytest.mark.parametrize("listening", [True, False])
def test_an_unusable_server_is_an_error_before_scoring(fake, tokenizer, model_dir, listening):
    given = served_guard(fake, model_dir)
    if listening:
        given["engine_options"] = {"model": "another"}
        message = "serves 'tiny', not 'another'"
    else:
        fake.stop()
        message = "did not answer in 3 tries.*ConnectError"
    with pytest.raises(GuardError, match=message):
        score_dataset(rows(2), tokenizer, guard=given, progress=False)
    assert fake.bodies == []
    if not listening:
        fake.server_close = fake.shutdown = lambda: None


def test_the_key_is_sent_and_never_shown(saved_model, tokenizer, model_dir, caplog, capsys):
    fake = FakeServer(saved_model)
    caplog.set_level(logging.DEBUG)
    fake.faults = [500, 429]  # the server's message repeats the key
    found = score_dataset(rows(2), tokenizer, guard=served_guard(fake, model_dir), progress=False)
    assert fake.keys == {f"Bearer {KEY}"}
    fake.faults = [401]
    with pytest.raises(GuardError, match=r"no Bearer \*\*\*") as refused:
        score_dataset(rows(3), tokenizer, guard=served_guard(fake, model_dir), progress=False)
    fake.stop()
    shown = [
        caplog.text,
        *capsys.readouterr(),
        str(refused.value),
        json.dumps(provenance_of(found)),
    ]
    assert "Trying again" in caplog.text
    assert all(KEY not in text for text in shown)


@pytest.mark.parametrize(("engine", "extra"), [("vllm", "vllm"), ("https://h", "server")])
def test_a_missing_package_is_named(fake, model_dir, monkeypatch, engine, extra):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    given = served_guard(fake, model_dir) | {"engine": engine, "engine_options": None}
    StarDSSOptions(guard=given, engine=engine).validate()  # training does not need the key
    with pytest.raises(ConfigError, match=rf"pip install 'star-dss-plugin\[{extra}\]'"):
        load_guard(given)
