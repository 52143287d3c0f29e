"""The server engine: faults after which a request is sent again, and faults that are errors."""

import datetime as dt
from email.utils import format_datetime

import pytest
import torch
from support.fake_server import KEY, LABELS, FakeHandler, prompt_groups

from star_dss_plugin import GuardError
from star_dss_plugin.engines.local import LocalEngine

server = pytest.importorskip(
    "star_dss_plugin.engines.server", reason="needs httpx2 (pip install 'star-dss-plugin[server]')"
)
pytestmark = pytest.mark.usefixtures("short_waits_and_key")


@pytest.mark.parametrize("fault", [408, 429, 500, 502, 503, 504, "hang up", "too slow", "garbage"])
def test_a_temporary_fault_does_not_change_the_results(fake, open_engine, model, fault):
    fake.faults = [fault] * 4
    engine = open_engine(fake, timeout=2.5 if fault == "too slow" else 30)
    # Before the request, because the server may use the same model for a late answer.
    expected = LocalEngine(model).label_logprobs(prompt_groups(2), LABELS)
    found = engine.label_logprobs(prompt_groups(2), LABELS)
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
def test_an_unusable_answer_is_an_error_without_a_retry(fake, open_engine, fault, message):
    fake.faults = [fault]
    with pytest.raises(GuardError, match=message):
        open_engine(fake, concurrency=1).label_logprobs(prompt_groups(1)[:1], LABELS)
    assert len(fake.bodies) == 1


def test_a_permanent_fault_is_an_error_after_the_last_retry(fake, open_engine):
    engine = open_engine(fake, retries=3, concurrency=1)
    fake.faults = [503] * 100
    with pytest.raises(GuardError, match="did not answer in 4 tries; the last failed with status"):
        engine.label_logprobs(prompt_groups(1)[:1], LABELS)
    fake.faults = []
    assert len(engine.label_logprobs(prompt_groups(1), LABELS)) == 3  # and may be asked again


@pytest.mark.parametrize("before", [480, 490, 495])
def test_a_message_does_not_show_the_first_half_of_a_key(fake, open_engine, monkeypatch, before):
    monkeypatch.setattr(
        FakeHandler,
        "complete",
        lambda self, fake, body, fault: self.answer(b"x" * before + KEY.encode(), 400),
    )
    with pytest.raises(GuardError, match="refused") as refused:
        open_engine(fake).label_logprobs(prompt_groups(1)[:1], LABELS)
    assert KEY[:2] not in str(refused.value).replace("star-dss", "")


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
def test_waits_grow_and_follow_retry_after(monkeypatch, attempt, after, least, most):
    monkeypatch.setattr(server, "_MAX_WAIT_SECONDS", 30.0)
    assert least <= server._wait(attempt, after) <= most


def test_a_retry_waits_for_the_date_that_the_server_gives(monkeypatch):
    monkeypatch.setattr(server, "_MAX_WAIT_SECONDS", 30.0)
    at = dt.datetime.now(dt.UTC) + dt.timedelta(seconds=20)
    assert 10 < server._wait(0, format_datetime(at, usegmt=True)) <= 20
