"""Hostile servers: their answers are refused with a readable error, in time and bounded memory."""

import contextlib
import gzip
import json
import logging
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from star_dss_plugin import GuardError

server = pytest.importorskip(
    "star_dss_plugin.engines.server", reason="needs httpx2 (pip install 'star-dss-plugin[server]')"
)

PROMPTS = [[[1, 2, 3], [1, 2, 3, 4]]]
LABELS = [5, 6]
ESCAPES = "\x1b[2J\x1b]0;owned\x07\nFAKE LOG LINE\u202e"
AT_ONCE = 60.0  # a timeout that a busy machine does not reach


def answer(prompts, **changes):
    """Return an answer like that of `vllm serve`, with some entries of its choices changed."""
    choices = []
    for i in range(len(prompts)):
        logprobs = {f"token_id:{label}": -1.0 - i for label in LABELS}
        choices.append({"index": i, "logprobs": {"top_logprobs": [logprobs]}})
    found = {"choices": choices, "usage": {"prompt_tokens": sum(map(len, prompts))}}
    return {**found, **changes}


class Hostile(ThreadingHTTPServer):
    """Answer with a value as JSON, with bytes, or with what a function writes."""

    daemon_threads = True

    def __init__(self):
        self.models = {"data": [{"id": "m"}]}
        self.completion = lambda handler, body: handler.send(200, answer(body["prompt"]))
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def send(self, status, body, headers=()):
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for header in headers:
            self.send_header(*header)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        with contextlib.suppress(OSError):
            self.wfile.write(data)

    def reply(self, given, body):
        if callable(given):
            given(self, body)
        else:
            self.send(200, given)

    def do_GET(self):
        self.reply(self.server.models, None)

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.reply(self.server.completion, body)


@pytest.fixture
def hostile():
    found = Hostile()
    yield found
    found.shutdown()
    found.server_close()


@pytest.fixture
def ask_server(hostile, monkeypatch):
    """Return a function that asks the server for the label log-probabilities of two prompts."""
    monkeypatch.setattr(server, "_MAX_WAIT_SECONDS", 0.01)

    def ask(**options):
        engine = server.ServerEngine(
            hostile.url, **{"model": "m", "retries": 0, "timeout": AT_ONCE, **options}
        )
        try:
            return [rows.tolist() for rows in engine.label_logprobs(PROMPTS, LABELS)]
        finally:
            engine.close()

    return ask


def test_a_valid_answer_is_accepted(ask_server):
    assert ask_server() == [[[-2.0, -2.0], [-1.0, -1.0]]]  # the longest prompt is sent first


WRONG = {
    "deep": b'{"choices":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "deep objects": b'{"a":' * 100_000,
    "digits": b'{"choices": ' + b"9" * 100_000 + b"}",
    "not UTF-8": b'{"choices": "\xff"}',
    "nothing": b"",
    "a list": [],
    "null": None,
    "no choices": {},
    "choices: number": {"choices": 5, "usage": {"prompt_tokens": 7}},
    "choices: texts": {"choices": ["a", "b"], "usage": {"prompt_tokens": 7}},
    "choices: object": {"choices": {"a": 1}, "usage": {"prompt_tokens": 7}},
    "usage: list": {"choices": [], "usage": [7]},
}


@pytest.mark.parametrize("kind", WRONG)
def test_an_answer_of_the_wrong_shape_is_refused(hostile, ask_server, kind):
    hostile.completion = WRONG[kind]
    with pytest.raises(GuardError):
        ask_server()


@pytest.mark.parametrize(
    "models",
    [
        {"data": 5},
        {"data": {"id": "m"}},
        {"data": "m"},
        {"data": [["m"], 5, None, {"id": ["m"]}, {"id": {"m": 1}}]},
        {"data": [{"id": ESCAPES * 1000}] * 1000},
        {"data": None},
        {},
        b"[" * 100_000,
    ],
)
def test_an_invalid_list_of_models_is_refused(hostile, ask_server, models):
    hostile.models = models
    with pytest.raises(GuardError) as stop:
        ask_server()
    check_printable(str(stop.value))
    assert len(str(stop.value)) < 2000


def check_printable(text):
    assert not set(text) & set("\x1b\x07\n\u202e"), text


@pytest.mark.parametrize(
    "indices", [[0, 0], [1, 1], [-1, 0], [0, 2], [1, 2], ["0", "1"], [0.0, 1.0], [True, False]]
)
def test_each_prompt_has_one_answer(hostile, ask_server, indices):
    def reply(handler, body):
        found = answer(body["prompt"])
        for choice, index in zip(found["choices"], indices, strict=True):
            choice["index"] = index
        handler.send(200, found)

    hostile.completion = reply
    with pytest.raises(GuardError, match="numbers its answers|without log-probabilities"):
        ask_server()


@pytest.mark.parametrize(
    "logprobs",
    [
        {"token_id:5": "-1.0", "token_id:6": -1.0},
        {"token_id:5": True, "token_id:6": -1.0},
        {"token_id:5": None, "token_id:6": -1.0},
        {"token_id:5": [-1.0], "token_id:6": -1.0},
        {"token_id:5": 1e308, "token_id:6": -1.0},
        {"token_id:5": 10**400, "token_id:6": -1.0},
        {"token_id:5": float("nan"), "token_id:6": -1.0},
        {"token_id:5": float("inf"), "token_id:6": -1.0},
        {"token_id:5": 0.5, "token_id:6": -1.0},
        {"token_id: 5": -1.0, "token_id:6": -1.0},
        {"token_id:５": -1.0, "token_id:6": -1.0},
        {ESCAPES * 1000: -1.0},
        [["token_id:5", -1.0]],
        "token_id:5",
    ],
)
def test_log_probabilities_are_numbers_of_token_ids(hostile, ask_server, logprobs):
    def reply(handler, body):
        found = answer(body["prompt"])
        found["choices"][0]["logprobs"]["top_logprobs"] = [logprobs]
        handler.send(200, found)

    hostile.completion = reply
    with pytest.raises(GuardError) as stop:
        ask_server()
    check_printable(str(stop.value))
    assert len(str(stop.value)) < 2000


@pytest.mark.parametrize("tokens", ["7", 7.5, True, None, [7], 6, -7, 10**30])
def test_the_count_of_tokens_is_the_prompts(hostile, ask_server, tokens):
    hostile.completion = lambda handler, body: handler.send(
        200, answer(body["prompt"], usage={"prompt_tokens": tokens})
    )
    with pytest.raises(GuardError, match="It changes prompts"):
        ask_server()


# Slow answers


def send_slowly(head, piece, done):
    """Return a reply that sends `head`, then `piece` again and again until the test is over."""

    def reply(handler, body):
        with contextlib.suppress(OSError):
            handler.wfile.write(head)
            while not done.wait(0.02):
                handler.wfile.write(piece)
                handler.wfile.flush()
        handler.close_connection = True

    return reply


@pytest.mark.parametrize(
    ("head", "piece"),
    [
        (b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n", b" "),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", b"1\r\n \r\n"),
        (b"HTTP/1.1 200 OK\r\nX: ", b"x"),
        (b"HTTP/1.1 200 OK\r\n", b"X: x\r\n"),
        (b"", b"HTTP/1.1 102 Processing\r\n\r\n"),
        (b"", b""),
    ],
)
@pytest.mark.parametrize("first", ["models", "completion"])
def test_a_request_ends_in_time_however_slow_its_answer(hostile, ask_server, head, piece, first):
    """Each read ends in time, but all reads together never would."""
    done = threading.Event()
    setattr(hostile, first, send_slowly(head, piece, done))
    try:
        with pytest.raises(GuardError, match="did not answer in 1 tries"):
            ask_server(timeout=0.4)
    finally:
        done.set()


def test_a_request_after_a_timeout_has_a_new_connection(hostile, ask_server):
    done, times = threading.Event(), []
    slow = send_slowly(b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n", b"", done)

    def reply(handler, body):
        times.append(time.monotonic())
        if len(times) == 1:
            return slow(handler, body)
        return handler.send(200, answer(body["prompt"]))

    hostile.completion = reply
    try:
        assert ask_server(timeout=2.0, retries=20) == [[[-2.0, -2.0], [-1.0, -1.0]]]
    finally:
        done.set()
    assert len(times) > 1


# Endless bodies


def test_an_endless_answer_is_refused(hostile, ask_server):
    done, sent = threading.Event(), []

    def reply(handler, body):
        handler.send_response(200)
        handler.send_header("Content-Length", str(1 << 40))
        handler.end_headers()
        with contextlib.suppress(OSError):
            while not done.is_set():
                handler.wfile.write(b" " * 65536)
                sent.append(65536)

    hostile.completion = reply
    try:
        with pytest.raises(GuardError, match="its answer is damaged .it has more than"):
            ask_server()
    finally:
        done.set()
    assert sum(sent) < 32 << 20  # the longest answer, and the buffers of sockets


@pytest.mark.parametrize("encoding", ["gzip", "deflate", "br", "zstd", "gzip, gzip", "x"])
def test_compressed_answers_are_not_expanded(hostile, ask_server, encoding):
    small = gzip.compress(b" " * (50 << 20), 9)
    hostile.completion = lambda handler, body: handler.send(
        200, small, [("Content-Encoding", encoding)]
    )
    with pytest.raises(GuardError, match="it is compressed, though it was asked not to be"):
        ask_server()


# Messages


@pytest.mark.parametrize("status", [200, 302, 400, 401, 404, 500, 503])
def test_a_body_is_shown_on_one_line_and_cut(hostile, ask_server, caplog, status):
    caplog.set_level(logging.INFO)
    body = (ESCAPES * 2000).encode()
    hostile.completion = lambda handler, _: handler.send(status, body)
    with pytest.raises(GuardError) as stop:
        ask_server(retries=1)
    for text in (str(stop.value), *(record.getMessage() for record in caplog.records)):
        check_printable(text)
        assert len(text) < 1500


@pytest.mark.parametrize("after", ["9" * 5000, "-1", "nan", "1e9", "٣", "Wed, 21 Oct 2099"])
def test_the_wait_that_a_server_asks_for_is_limited(hostile, ask_server, after):
    hostile.completion = lambda handler, _: handler.send(
        503, b"", [("Retry-After", after.encode().decode("latin-1"))]
    )
    with pytest.raises(GuardError, match="did not answer in 2 tries"):
        ask_server(retries=1)
