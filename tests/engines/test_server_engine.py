"""The server engine: the local engine's results, and limits on requests."""

import threading
import time

import pytest
import torch
from support.fake_server import KEY, LABELS, FakeHandler, prompt_groups

from star_dss_plugin import GuardError
from star_dss_plugin.engines.local import LocalEngine

server = pytest.importorskip(
    "star_dss_plugin.engines.server", reason="needs httpx2 (pip install 'star-dss-plugin[server]')"
)
pytestmark = pytest.mark.usefixtures("short_waits_and_key")


def test_log_probabilities_are_those_of_the_local_engine(fake, open_engine, model):
    asked = prompt_groups()
    expected = LocalEngine(model).label_logprobs(asked, LABELS)
    found = open_engine(fake, prompts_per_request=3).label_logprobs(asked, LABELS)
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == torch.float32
        torch.testing.assert_close(one, other, atol=1e-4, rtol=0)


def test_a_request_has_prompts_of_one_response_longest_first(fake, open_engine):
    open_engine(fake, prompts_per_request=100, concurrency=1).label_logprobs(
        prompt_groups(), LABELS
    )
    assert len(fake.bodies) == 7
    for body in fake.bodies:
        lengths = [len(prompt) for prompt in body["prompt"]]
        assert lengths == sorted(lengths, reverse=True)
    assert len(fake.bodies[-1]["prompt"]) == 1  # the same prompt twice


@pytest.mark.parametrize("concurrency", [1, 3])
def test_as_many_requests_are_in_flight_as_concurrency_allows(fake, open_engine, concurrency):
    engine = open_engine(fake, concurrency=concurrency, prompts_per_request=1)
    engine.label_logprobs(prompt_groups(), LABELS)
    assert fake.busiest == concurrency


def test_a_batch_that_the_request_budget_does_not_cover_is_not_sent(fake, open_engine):
    engine = open_engine(fake, max_requests=10, prompts_per_request=100)
    engine.label_logprobs(prompt_groups(2), LABELS)
    assert engine.sent == 1 + 3
    with pytest.raises(GuardError, match=r"10 requests does not cover the next 7 \(4 were sent\)"):
        engine.label_logprobs(prompt_groups(), LABELS)
    assert len(fake.bodies) == 3
    fake.faults = [503] * 100
    with pytest.raises(GuardError, match="budget of 10 requests"):
        engine.label_logprobs(prompt_groups(2), LABELS)
    assert engine.sent == 10 == len(fake.bodies) + 1


def test_the_key_of_another_service_is_not_sent(fake, open_engine, monkeypatch):
    monkeypatch.delenv("STAR_DSS_API_KEY")
    monkeypatch.setenv("OPENAI_API_KEY", KEY)  # a key for another service
    open_engine(fake)
    assert fake.keys == {None}


@pytest.mark.parametrize("data", [["tiny"], {"id": "tiny"}, [None], None])
def test_a_server_that_lists_no_models_is_refused(fake, open_engine, monkeypatch, data):
    monkeypatch.setattr(FakeHandler, "do_GET", lambda self: self.answer({"data": data}))
    with pytest.raises(GuardError, match="serves nothing, not 'tiny'"):
        open_engine(fake)


def test_a_failed_call_stops_its_own_requests_only(fake, open_engine, monkeypatch):
    engine = open_engine(fake, concurrency=1)
    given_up = []
    complete = server.ServerEngine._complete
    monkeypatch.setattr(
        server.ServerEngine, "_complete", lambda *args: given_up.append(args[-1]) or complete(*args)
    )
    fake.faults = [400]
    with pytest.raises(GuardError, match="refused"):
        engine.label_logprobs(prompt_groups(3), LABELS)
    fake.faults = []
    engine.label_logprobs(prompt_groups(1), LABELS)
    assert given_up[0].is_set()
    assert not given_up[-1].is_set()


def test_closing_ends_every_call_in_flight(fake, open_engine):
    """Earlier calls end too; otherwise they would retry for minutes."""
    engine = open_engine(fake, concurrency=1, prompts_per_request=100)
    fake.faults = [503] * 1000
    found = []

    def ask():
        with pytest.raises(GuardError, match=r"was closed|did not answer") as stopped:
            engine.label_logprobs(prompt_groups(2), LABELS)
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
        engine.label_logprobs(prompt_groups(1), LABELS)
