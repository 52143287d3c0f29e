"""A guard on an HTTP server: the local engine's results, also after temporary faults."""

import datetime as dt
import json
import logging
import random
import threading
import time
from email.utils import format_datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from datasets import Dataset

from star_dss_plugin import (
    ConfigError,
    GuardError,
    StarDSSOptions,
    load_guard,
    provenance_of,
    score_dataset,
)
from star_dss_plugin.engines.local import LocalEngine

server = pytest.importorskip(
    "star_dss_plugin.engines.server", reason="needs httpx2 (pip install 'star-dss-plugin[server]')"
)
KEY = "sk-very-secret"
LABELS = [7, 240, 41]


class Fake(ThreadingHTTPServer):
    """Answer as `vllm serve` does, with a tiny model, after each fault of a list once."""

    daemon_threads = True

    def __init__(self, model, port=0):
        self.engine = LocalEngine(model)
        self.faults = []
        self.bodies = []
        self.keys = set()
        self.busy = self.busiest = 0
        self.lock = threading.Lock()
        super().__init__(("127.0.0.1", port), Handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()

    def stop(self):
        self.shutdown()
        self.server_close()


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *args):
        pass

    def answer(self, body, status=200, headers=()):
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for header in headers:
            self.send_header(*header)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def do_GET(self):
        self.server.keys.add(self.headers.get("Authorization"))
        self.answer({"data": [{"id": "tiny"}]})

    def do_POST(self):
        fake = self.server
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with fake.lock:
            fake.bodies.append(body)
            fault = fake.faults.pop(0) if fake.faults else None
        self.complete(fake, body, fault)

    def complete(self, fake, body, fault):
        assert body["max_tokens"] == 1
        if isinstance(fault, int):
            headers = [("Retry-After", "0")] if fault == 429 else []
            return self.answer({"error": f"no {self.headers['Authorization']}"}, fault, headers)
        if fault == "hang up":
            return self.connection.close()
        if fault == "too slow":
            time.sleep(5.0)
        if fault == "garbage":
            return self.answer(b'{"choices": [')
        prompts, ids = body["prompt"], body["logprob_token_ids"]
        with fake.lock:
            fake.busy += 1
            fake.busiest = max(fake.busiest, fake.busy)
        time.sleep(0.01)
        with fake.lock:
            fake.busy -= 1
            [rows] = fake.engine.label_logprobs([prompts], ids)
        choices = [
            {
                "index": i,
                "logprobs": {
                    "top_logprobs": [
                        {
                            "token_id:0": -9.0,
                            **{f"token_id:{t}": v for t, v in zip(ids, row.tolist())},
                        }
                    ]
                },
            }
            for i, row in enumerate(rows)
        ]
        random.Random(0).shuffle(choices)
        tokens = sum(map(len, prompts))
        if fault == "another tokenizer":
            tokens += 1
        elif fault == "old":
            choices[0]["logprobs"]["top_logprobs"] = [{"token_id:7": -1.0}]
        elif fault == "raw logits":
            choices[0]["logprobs"]["top_logprobs"] = [{f"token_id:{t}": 3.5 for t in ids}]
        elif fault == "no logprobs":
            choices[0]["logprobs"] = None
        elif fault == "one short":
            choices.pop()
        return self.answer({"choices": choices, "usage": {"prompt_tokens": tokens}})


@pytest.fixture
def fake(model):
    found = Fake(model)
    yield found
    found.stop()


@pytest.fixture(autouse=True)
def _soon(monkeypatch):
    monkeypatch.setattr(server, "_MAX_WAIT_SECONDS", 0.05)
    monkeypatch.setenv("STAR_DSS_API_KEY", KEY)


@pytest.fixture
def opened():
    """Return a function that opens engines; close them after the test."""
    engines = []

    def opens(fake, **options):
        engines.append(server.ServerEngine(fake.url, model="tiny", **options))
        return engines[-1]

    yield opens
    for engine in engines:
        engine.close()


def groups(count=6):
    generator = random.Random(1)
    found = []
    for _ in range(count):
        trunk = [generator.randrange(250) for _ in range(40)]
        found.append([[*trunk[:n], 5, 6] for n in range(1, 40, 5)])
    return [*found, [], [found[0][0], found[0][0]]]


def test_the_numbers_are_the_local_engines(fake, opened, model):
    asked = groups()
    expected = LocalEngine(model).label_logprobs(asked, LABELS)
    found = opened(fake, prompts_per_request=3).label_logprobs(asked, LABELS)
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == torch.float32
        torch.testing.assert_close(one, other, atol=1e-4, rtol=0)


def test_requests_hold_one_response_longest_first(fake, opened):
    opened(fake, prompts_per_request=100, concurrency=1).label_logprobs(groups(), LABELS)
    assert len(fake.bodies) == 7
    for body in fake.bodies:
        lengths = [len(prompt) for prompt in body["prompt"]]
        assert lengths == sorted(lengths, reverse=True)
    assert len(fake.bodies[-1]["prompt"]) == 1  # the same prompt twice


@pytest.mark.parametrize("concurrency", [1, 3])
def test_concurrency_is_bounded(fake, opened, concurrency):
    fake.faults = []
    engine = opened(fake, concurrency=concurrency, prompts_per_request=1)
    engine.label_logprobs(groups(), LABELS)
    assert 1 <= fake.busiest <= concurrency


@pytest.mark.parametrize("fault", [408, 429, 500, 502, 503, 504, "hang up", "too slow", "garbage"])
def test_a_fault_that_passes_changes_nothing(fake, opened, model, fault):
    fake.faults = [fault] * 4
    engine = opened(fake, timeout=2.5 if fault == "too slow" else 30)
    # Before the request, because the server may use the same model for a late answer.
    expected = LocalEngine(model).label_logprobs(groups(2), LABELS)
    found = engine.label_logprobs(groups(2), LABELS)
    torch.testing.assert_close(torch.cat(found), torch.cat(expected), atol=1e-4, rtol=0)
    assert engine.sent == len(fake.bodies) + 1 == 3 + 4 + 1


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (400, "refused a request with status 400"),
        (401, "The key in the environment variable STAR_DSS_API_KEY was sent"),
        (404, "refused a request with status 404"),
        (302, "refused a request with status 302"),
        ("another tokenizer", "It changes prompts"),
        ("one short", "It changes prompts"),
        ("old", "no log-probability of the label tokens \\[240, 41\\]"),
        ("raw logits", "which are not log-probabilities"),
        ("no logprobs", "answered without log-probabilities"),
    ],
)
def test_an_answer_that_cannot_be_used_is_an_error_at_once(fake, opened, fault, message):
    fake.faults = [fault]
    with pytest.raises(GuardError, match=message):
        opened(fake, concurrency=1).label_logprobs(groups(1)[:1], LABELS)
    assert len(fake.bodies) == 1


@pytest.mark.parametrize("fault", [503, "hang up", 401, 403, 404, 302, "old", "one short"])
def test_no_response_counts_as_unsafe_for_a_servers_fault(
    saved, tokenizer, model_dir, monkeypatch, fault
):
    monkeypatch.setattr("star_dss_plugin.guards.verdict._PREFIXES_PER_CALL", 20)
    fake = Fake(saved)
    given = guard_of(fake, model_dir, retries=1, concurrency=1)
    fake.faults = [None] * 3 + [fault] * 1000
    with pytest.raises(GuardError, match="server at|no log-probability"):
        score_dataset(rows(8), tokenizer, guard=given, on_guard_error="unsafe", progress=False)
    fake.stop()


@pytest.mark.parametrize("status", [400, 413, 422])
def test_a_response_that_a_server_refuses_counts_as_unsafe(saved, tokenizer, model_dir, status):
    fake = Fake(saved)
    fake.faults = [None, status]
    given = guard_of(fake, model_dir, concurrency=1)
    found = score_dataset(rows(3), tokenizer, guard=given, on_guard_error="unsafe", progress=False)
    fake.stop()
    assert [min(row) > 0 for row in found["star_scores"]] == [True, False, True]


@pytest.mark.parametrize("before", [480, 490, 495])
def test_half_a_key_is_not_shown_either(fake, opened, monkeypatch, before):
    monkeypatch.setattr(
        Handler,
        "complete",
        lambda self, fake, body, fault: self.answer(b"x" * before + KEY.encode(), 400),
    )
    with pytest.raises(GuardError, match="refused") as refused:
        opened(fake).label_logprobs(groups(1)[:1], LABELS)
    assert KEY[:2] not in str(refused.value).replace("star-dss", "")


def test_a_server_that_stays_broken_is_given_up(fake, opened):
    engine = opened(fake, retries=3, concurrency=1)
    fake.faults = [503] * 100
    with pytest.raises(GuardError, match="did not answer in 4 tries; the last failed with status"):
        engine.label_logprobs(groups(1)[:1], LABELS)
    fake.faults = []
    assert len(engine.label_logprobs(groups(1), LABELS)) == 3  # and may be asked again


def test_the_budget_is_kept_and_no_batch_is_begun_that_it_does_not_cover(fake, opened):
    engine = opened(fake, max_requests=10, prompts_per_request=100)
    engine.label_logprobs(groups(2), LABELS)
    assert engine.sent == 1 + 3
    with pytest.raises(GuardError, match=r"10 requests does not cover the next 7 \(4 were sent\)"):
        engine.label_logprobs(groups(), LABELS)
    assert len(fake.bodies) == 3
    fake.faults = [503] * 100
    with pytest.raises(GuardError, match="budget of 10 requests"):
        engine.label_logprobs(groups(2), LABELS)
    assert engine.sent == 10 == len(fake.bodies) + 1


# With a guard


def guard_of(fake, model_dir, **options):
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
def saved(model_dir):
    """Return the model of `model_dir`."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(model_dir)


def test_scores_are_those_of_the_local_engine(saved, tokenizer, model_dir):
    fake = Fake(saved)
    given = guard_of(fake, model_dir)
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


def test_a_server_that_dies_half_way_loses_nothing(
    saved, tokenizer, model_dir, tmp_path, monkeypatch
):
    """Either the server stays away and the run ends, or it returns and the run continues."""
    monkeypatch.setattr("star_dss_plugin.data.cache._FLUSH_SECONDS", 0.0)
    monkeypatch.setattr("star_dss_plugin.guards.verdict._PREFIXES_PER_CALL", 40)
    whole = Fake(saved)
    expected = score_dataset(
        rows(12),
        tokenizer,
        guard=guard_of(whole, model_dir),
        progress=False,
        score_cache_dir=tmp_path / "whole",
    )
    whole.stop()

    fake = Fake(saved)
    port = fake.server_address[1]
    fake.faults = [None] * 4 + ["hang up"] * 1000
    with pytest.raises(GuardError, match="start the same run again: what was scored is in"):
        score_dataset(
            rows(12), tokenizer, guard=guard_of(fake, model_dir, retries=2), progress=False
        )
    fake.stop()
    before = {json.dumps(p) for body in fake.bodies[:4] for p in body["prompt"]}

    again = Fake(saved, port)
    monkeypatch.setattr(server, "_MAX_WAIT_SECONDS", 0.2)

    def dies_and_comes_back():
        while len(again.bodies) < 3:
            time.sleep(0.005)
        again.stop()
        time.sleep(0.5)
        threads.append(Fake(saved, port))

    threads = []
    death = threading.Thread(target=dies_and_comes_back)
    death.start()
    found = score_dataset(rows(12), tokenizer, guard=guard_of(again, model_dir), progress=False)
    death.join()
    assert list(found["star_scores"]) == list(expected["star_scores"])
    after = {
        json.dumps(p) for fake in (again, *threads) for body in fake.bodies for p in body["prompt"]
    }
    assert before
    assert not before & after  # no prompt is answered twice
    threads[0].stop()


@pytest.mark.parametrize("listening", [True, False])
def test_a_server_that_cannot_be_used_stops_before_scoring(fake, tokenizer, model_dir, listening):
    given = guard_of(fake, model_dir)
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


@pytest.mark.parametrize("data", [["tiny"], {"id": "tiny"}, [None], None])
def test_a_server_that_lists_no_models(fake, opened, monkeypatch, data):
    monkeypatch.setattr(Handler, "do_GET", lambda self: self.answer({"data": data}))
    with pytest.raises(GuardError, match="serves nothing, not 'tiny'"):
        opened(fake)


def test_the_key_is_sent_and_never_shown(saved, tokenizer, model_dir, caplog, capsys):
    fake = Fake(saved)
    caplog.set_level(logging.DEBUG)
    fake.faults = [500, 429]  # the server's message repeats the key
    found = score_dataset(rows(2), tokenizer, guard=guard_of(fake, model_dir), progress=False)
    assert fake.keys == {f"Bearer {KEY}"}
    fake.faults = [401]
    with pytest.raises(GuardError, match=r"no Bearer \*\*\*") as refused:
        score_dataset(rows(3), tokenizer, guard=guard_of(fake, model_dir), progress=False)
    fake.stop()
    shown = [
        caplog.text,
        *capsys.readouterr(),
        str(refused.value),
        json.dumps(provenance_of(found)),
    ]
    assert "Trying again" in caplog.text
    assert all(KEY not in text for text in shown)


def test_no_key_is_sent_that_was_not_set(fake, opened, monkeypatch):
    monkeypatch.delenv("STAR_DSS_API_KEY")
    monkeypatch.setenv("OPENAI_API_KEY", KEY)  # a key for another service
    opened(fake)
    assert fake.keys == {None}


@pytest.mark.parametrize(("engine", "extra"), [("vllm", "vllm"), ("https://h", "server")])
def test_a_missing_package_is_named(fake, model_dir, monkeypatch, engine, extra):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    given = guard_of(fake, model_dir) | {"engine": engine, "engine_options": None}
    StarDSSOptions(guard=given, engine=engine).validate()  # training does not need the key
    with pytest.raises(ConfigError, match=rf"pip install 'star-dss-plugin\[{extra}\]'"):
        load_guard(given)


@pytest.mark.parametrize(
    ("attempt", "after", "least", "most"),
    [
        (0, "", 0.25, 0.5),
        (3, "", 2.0, 4.0),
        (50, "", 15.0, 30.0),
        (0, "7", 7, 7),
        (0, "9999", 30, 30),
        (0, "Wed, 21 Oct 2015 07:28:00 GMT", 0.25, 0.5),  # a date in the past, or different clocks
        (0, "Fri, 21 Oct 2335 07:28:00 GMT", 30, 30),
        (0, "Fri, 99 Oct 2335 07:28:00 GMT", 0.25, 0.5),
        (0, "²", 0.25, 0.5),
    ],
)
def test_waits_grow(monkeypatch, attempt, after, least, most):
    monkeypatch.setattr(server, "_MAX_WAIT_SECONDS", 30.0)
    assert least <= server._wait(attempt, after) <= most


def test_a_date_to_retry_after_is_waited_for(monkeypatch):
    monkeypatch.setattr(server, "_MAX_WAIT_SECONDS", 30.0)
    at = dt.datetime.now(dt.UTC) + dt.timedelta(seconds=20)
    assert 10 < server._wait(0, format_datetime(at, usegmt=True)) <= 20


def test_what_a_call_gave_up_stays_so(fake, opened, monkeypatch):
    engine = opened(fake, concurrency=1)
    given_up = []
    complete = server.ServerEngine._complete
    monkeypatch.setattr(
        server.ServerEngine, "_complete", lambda *args: given_up.append(args[-1]) or complete(*args)
    )
    fake.faults = [400]
    with pytest.raises(GuardError, match="refused"):
        engine.label_logprobs(groups(3), LABELS)
    fake.faults = []
    engine.label_logprobs(groups(1), LABELS)
    assert given_up[0].is_set()
    assert not given_up[-1].is_set()


def test_closing_ends_every_call_in_flight(fake, opened):
    """Earlier calls end too; otherwise they would retry for minutes."""
    engine = opened(fake, concurrency=1, prompts_per_request=100)
    fake.faults = [503] * 1000
    found = []

    def ask():
        with pytest.raises(GuardError, match=r"was closed|did not answer") as stopped:
            engine.label_logprobs(groups(2), LABELS)
        found.append(stopped.value)

    threads = [threading.Thread(target=ask, daemon=True) for _ in range(2)]
    for thread in threads:
        thread.start()
    while not (len(engine._stops) == 2 and fake.bodies):
        time.sleep(0.01)
    engine.close()
    for thread in threads:
        thread.join(60)
    assert len(found) == 2
    with pytest.raises(GuardError, match="was closed"):
        engine.label_logprobs(groups(1), LABELS)
