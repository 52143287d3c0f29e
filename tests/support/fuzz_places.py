"""Fuzz targets for hostile data folders, cache folders and servers.

A check returns whether the input worked, was refused with a readable error, or was skipped with a
warning. It raises if a file outside of the folder was read or written, a connection was opened, or
an error has no readable message.
"""

import contextlib
import functools
import json
import logging
import os
import socket
import tempfile
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset, DatasetDict
from hypothesis import strategies as st

from star_dss_plugin.data.cache import ScoreCache
from star_dss_plugin.data.files.folders import check_folder
from star_dss_plugin.data.reading import read_dataset
from star_dss_plugin.data.requests import Trajectory
from star_dss_plugin.data.shard_format import header
from star_dss_plugin.errors import GuardError, StarDSSError
from support.fuzz_inputs import CACHE_SEEDS, JSON_SEEDS, PARQUET_SEEDS, _damaged, json_values
from support.fuzzing import Target

SECRET = "the text of another file"
ACTS = set("\x1b\x07\x00\r\u202e\u2028")


# Folders


NAMES = [
    "train.jsonl",
    "train.json",
    "train.parquet",
    "train-00000-of-00002.parquet",
    "test.jsonl",
    "rows[1].jsonl",
    "a*b.parquet",
    "README.md",
    "state.json",
    "dataset_info.json",
    "dataset_dict.json",
    "star_dss.json",
    "data-00000-of-00001.arrow",
    "data/train-00000-of-00001.parquet",
    "data/train.jsonl",
    "train/state.json",
    "x\x1b[2J\n\u202e.jsonl",
    "run.py",
    "train.csv",
    "train.jsonl.gz",
]
PATHS = ["../secret/{}", "{root}/secret/{}", "http://127.0.0.1:9/{}", "file://{root}/secret/{}"]
SECRETS = ("rows.jsonl", "rows.parquet", "data-00000-of-00001.arrow")


@functools.cache
def arrow_bytes(text, compressed=False):
    table = pa.table({"text": [text]})
    sink = pa.BufferOutputStream()
    options = pa.ipc.IpcWriteOptions(compression="zstd" if compressed else None)
    with pa.ipc.new_stream(sink, table.schema, options=options) as writer:
        writer.write_table(table)
    return sink.getvalue().to_pybytes()


def parquet_bytes(text):
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({"text": [text]}), sink)
    return sink.getvalue().to_pybytes()


@st.composite
def contents(draw):
    """Draw the bytes of a file: valid contents, contents that name other files, or anything."""
    path = draw(st.sampled_from(PATHS)).format(draw(st.sampled_from(SECRETS)), root="{root}")
    state = {"_data_files": [{"filename": path}], "_fingerprint": "x", "_split": None}
    listed = draw(st.sampled_from([state, {"splits": [path, "../secret"]}, {"features": {}}]))
    card = f"---\nconfigs:\n- config_name: default\n  data_files:\n  - path: {path}\n---\n"
    media = {"features": {"text": {"_type": "Image"}}}
    made = st.sampled_from(
        [
            b'{"text": "mine"}\n',
            parquet_bytes("mine"),
            arrow_bytes("mine"),
            arrow_bytes("mine", compressed=True),
            json.dumps(listed).encode(),
            json.dumps(media).encode(),
            card.encode(),
            b"[" * 5000,
            *JSON_SEEDS,
            *PARQUET_SEEDS,
        ]
    )
    given = st.dictionaries(st.sampled_from(list(state)), json_values, max_size=2)
    return _damaged(draw, draw(made | given.map(lambda v: json.dumps(v).encode())))


kinds = st.sampled_from(["link", "folder link", "pipe", "folder", "dangling", "device"])
entries = st.dictionaries(st.sampled_from(NAMES), contents() | kinds, max_size=4)
folders = st.tuples(st.sampled_from(["", "saved", "splits", "shards"]), entries)


def check_data_folder(case):
    """Check that reading a folder reads only files within it and opens no connection."""
    form, entries = case
    with tempfile.TemporaryDirectory() as root, refuse_connections(), use_dataset_cache(root):
        root = Path(root)
        secret, folder = root / "secret", root / "given[1]"
        secret.mkdir()
        (secret / "rows.jsonl").write_text(json.dumps({"text": SECRET}))
        (secret / "rows.parquet").write_bytes(parquet_bytes(SECRET))
        (secret / "data-00000-of-00001.arrow").write_bytes(arrow_bytes(SECRET))
        (root / "given1").mkdir()
        (root / "given1" / "train.jsonl").write_text(json.dumps({"text": SECRET}))
        write_folder(form, folder)
        for name, content in entries.items():
            write_entry(folder / name, content, secret, root)
        with contextlib.suppress(StarDSSError):
            check_folder(folder)
        try:
            rows = read_dataset(str(folder)).to_list()
        except StarDSSError as error:
            check_words(str(error))
            return "refused"
        assert SECRET not in repr(rows)
        return "read"


def check_words(message):
    """Check that an error message is of sensible length and has no terminal control characters."""
    assert SECRET not in message
    assert not set(message) & ACTS, message
    assert 20 < len(message) < 3000, message


def write_folder(form, folder):
    """Write a folder of this form that holds one row of its own."""
    rows = Dataset.from_list([{"text": "mine"}])
    if form == "saved":
        rows.save_to_disk(folder)
    elif form == "splits":
        DatasetDict({"train": rows}).save_to_disk(folder)
    else:
        (folder / "data").mkdir(parents=True)
        if form == "shards":
            (folder / "star_dss.json").write_text("{}")
            shard = folder / "data" / "train-00000-of-00001.parquet"
            shard.write_bytes(parquet_bytes("mine"))


def write_entry(path, content, secret, root):
    """Write a file, folder, link or pipe to a path, in place of an existing file."""
    with contextlib.suppress(OSError):  # the parent may be a file
        path.parent.mkdir(parents=True, exist_ok=True)
        if os.path.lexists(path):
            path.unlink()
        if isinstance(content, bytes):
            path.write_bytes(content.replace(b"{root}", str(root).encode()))
        elif content == "pipe":
            os.mkfifo(path)
        elif content == "folder":
            path.mkdir()
        else:
            suffix = path.suffix if path.suffix in (".parquet", ".arrow") else ".jsonl"
            file = next(p for p in secret.iterdir() if p.suffix == suffix)
            targets = {"link": file, "folder link": secret, "device": Path("/dev/zero")}
            path.symlink_to(targets.get(content, root / "not there"))


@contextlib.contextmanager
def refuse_connections():
    """Make every connection an error, without telling datasets that the hub is offline."""
    connect, offline = socket.socket.connect, datasets.config.HF_HUB_OFFLINE

    def fail(self, address):
        raise AssertionError(f"a connection to {address} was opened")

    socket.socket.connect = fail
    datasets.config.HF_HUB_OFFLINE = False
    try:
        yield
    finally:
        socket.socket.connect, datasets.config.HF_HUB_OFFLINE = connect, offline


@contextlib.contextmanager
def use_dataset_cache(root):
    """Keep the cache of datasets in the folder."""
    before = datasets.config.HF_DATASETS_CACHE
    datasets.config.HF_DATASETS_CACHE = Path(root) / "copies"
    try:
        yield
    finally:
        datasets.config.HF_DATASETS_CACHE = before


# Cache folders


CACHE_NAMES = [
    "0.shard",
    f"{'9' * 20}-x.shard",
    "x\x1b[2J\n\u202e.shard",
    "lock",
    "lockeval",
    "namespace.json",
    "old.tmp",
    ".old.tmp",
    "0.shard.damaged",
]
shards = st.sampled_from(CACHE_SEEDS) | st.binary(max_size=40)
cache_contents = shards | shards.map(lambda body: header(body) + body) | kinds
cache_folders = st.dictionaries(st.sampled_from(CACHE_NAMES), cache_contents, max_size=5)


def check_cache_folder(entries):
    """Check that a cache works in any cache folder, and leaves files outside of it unchanged."""
    records, logger = Records(), logging.getLogger("star_dss_plugin")
    disabled = logging.root.manager.disable
    logging.disable(logging.NOTSET)
    logger.addHandler(records)
    try:
        with tempfile.TemporaryDirectory() as root:
            root = Path(root)
            secret = root / "secret"
            secret.mkdir()
            (secret / "rows.jsonl").write_text(SECRET)
            first = ScoreCache(root / "cache", {"what": "fuzz"})
            first.put("mine", Trajectory((0.5,)))
            first.flush()
            for name, content in entries.items():
                write_entry(first.folder / name, content, secret, root)
                with contextlib.suppress(OSError):
                    os.utime(first.folder / name, (0, 0), follow_symlinks=False)
            cache = ScoreCache(root / "cache", {"what": "fuzz"})
            for part in ("", "eval"):
                with cache.lock(part):
                    cache.put("more", Trajectory((0.25,)))
                    cache.flush()
            again = ScoreCache(root / "cache", {"what": "fuzz"})
            assert again.get("mine") is not None
            assert again.get("more") is not None
            assert (secret / "rows.jsonl").read_text() == SECRET
            assert os.listdir(secret) == ["rows.jsonl"]
    finally:
        logger.removeHandler(records)
        logging.disable(disabled)
    for message in records.messages:
        assert not set(message) & (ACTS | {"\n"}), message
    return "skipped in words" if records.messages else "worked"


class Records(logging.Handler):
    """Record log messages."""

    def __init__(self):
        super().__init__()
        self.messages = []

    def emit(self, record):
        self.messages.append(record.getMessage())


# Servers


PROMPTS = [[[1, 2, 3], [1, 2, 3, 4]]]
LABELS = [5, 6]


def answer(**changes):
    choices = [
        {"index": i, "logprobs": {"top_logprobs": [{f"token_id:{t}": -1.0 for t in LABELS}]}}
        for i in range(2)
    ]
    return {"choices": choices, "usage": {"prompt_tokens": 7}, **changes}


@st.composite
def answers(draw):
    """Draw status, headers, body and missing bytes: a changed valid answer, or anything."""
    found = answer()
    for _ in range(draw(st.integers(0, 2))):
        change(draw, found)
    body = json.dumps(found).encode()
    special = [b"[" * 20_000, b"", b"\xff", b"9" * 5000, b'{"choices": NaN}', b"\x1b[2J\n" * 99]
    body = draw(st.sampled_from([*[body] * 20, *special]) | st.just(body))
    headers = draw(
        st.dictionaries(
            st.sampled_from(["Content-Encoding", "Retry-After", "Location", "Content-Type"]),
            st.sampled_from(["gzip", "identity", "9" * 400, "-1", "http://127.0.0.1:9/", "a;b=\t"]),
            max_size=draw(st.sampled_from([0, 0, 0, 2])),
        )
    )
    status = draw(st.sampled_from([*[200] * 20, 201, 204, 301, 400, 401, 429, 500, 599]))
    length = draw(st.sampled_from([*[0] * 20, -1, -5]))  # fewer bytes than the header says
    return status, headers, _damaged(draw, body), length


def change(draw, value):
    """Change one value somewhere in a JSON value."""
    while True:
        keys = list(value) if isinstance(value, dict) else list(range(len(value)))
        if not keys:
            return
        key = draw(st.sampled_from(keys))
        inner = value[key]
        if isinstance(inner, dict | list) and draw(st.booleans()):
            value = inner
            continue
        if draw(st.integers(0, 3)) == 0:
            del value[key]
        else:
            value[key] = draw(json_values)
        return


class Server(ThreadingHTTPServer):
    """Answer each completion request with `given`."""

    daemon_threads = True
    given = (200, {}, b"", 0)

    def handle_error(self, request, client_address):
        """Ignore errors: clients hang up on answers that they do not read to the end."""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def reply(self, status, headers, body, less=0):
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body) - less))
        self.end_headers()
        self.wfile.write(body)
        self.close_connection = self.close_connection or bool(less)

    def do_GET(self):
        self.reply(200, {}, b'{"data": [{"id": "m"}]}')

    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        self.reply(*self.server.given)


@functools.cache
def server_and_engine():
    """Return the server and the engine that asks it; all cases share them."""
    from star_dss_plugin.engines import server as module

    server = Server(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_address[1]}"
    return server, module.ServerEngine(url, model="m", retries=0, timeout=2.0)


def check_server(given):
    """Check that any answer gives each prompt's log-probabilities, or a GuardError, in time."""
    server, engine = server_and_engine()
    server.given = given
    try:
        [rows] = engine.label_logprobs(PROMPTS, LABELS)
    except GuardError as error:
        check_words(str(error))
        return "refused"
    assert rows.shape == (2, 2)
    assert (rows.exp().sum(dim=1) <= 1.06).all()
    return "answered"


PLACES = {
    "folders": Target(check_data_folder, folders, 60),
    "cache-folders": Target(check_cache_folder, cache_folders, 40),
    "servers": Target(check_server, answers(), 60),
}
