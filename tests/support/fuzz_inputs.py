"""Hostile inputs: hypothesis strategies, and seeds of a fuzzer (for fuzz_targets.py)."""

import functools
import io
import json
import math
import struct
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from hypothesis import strategies as st

from star_dss_plugin.options import StarDSSOptions
from support.models import make_tokenizer


@functools.cache
def tokenizer():
    return make_tokenizer()


SPECIAL = ["<|im_start|>", "<|im_end|>", "<|endoftext|>"]
NASTY = [
    "",
    " ",
    "\n",
    "\0",
    "bad",
    "Safety: Safe",
    "</script><script>alert(1)</script>",
    "<!--",
    "]]>",
    "{{ 1/0 }}",
    "{% raw %}",
    "\u202e",
    "\u2028",
    "\ue0f00\ue0f1",
    "\ufffd",
    "👩‍👩‍👧",
    "e\u0301" * 9,
    "\ud800",
    "\udfff",
    "2020-01-01",
    "a.b?c!" * 9,
    " " * 300,
    "。",
    "'\"&<>",
    "\x1b]0;x\x07",
    *SPECIAL,
]
characters = st.characters(codec=None)  # lone surrogates too
hostile = st.lists(st.sampled_from(NASTY) | st.text(characters, max_size=8), max_size=6).map(
    "".join
)
readable = hostile.map(lambda text: text.encode("utf-8", "replace").decode())
numbers = (
    st.integers(-3, 5)
    | st.floats()
    | st.sampled_from([2**31, -(2**63), 2**63, 10**400, True, False])
)
json_values = st.recursive(
    st.none() | numbers | hostile,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(hostile, inner, max_size=3),
    max_leaves=8,
)
ROLES = ["user", "assistant", "system", "tool"]
roles = st.sampled_from(ROLES)
turns = st.fixed_dictionaries({"role": roles, "content": readable})
odd_turns = (
    turns
    | st.fixed_dictionaries({}, optional={"role": json_values | roles, "content": json_values})
    | st.fixed_dictionaries(
        {
            "role": roles,
            "content": st.lists(
                st.fixed_dictionaries({"type": st.just("text")}, optional={"text": json_values}),
                max_size=3,
            ),
        }
    )
    | json_values
)
conversations = st.lists(odd_turns, max_size=5)
kwargs = st.dictionaries(
    st.sampled_from(
        [
            "chat_template",
            "tokenize",
            "messages",
            "conversation",
            "tools",
            "padding",
            "enable_thinking",
            "return_tensors",
            "conversations",
            "x",
        ]
    ),
    json_values,
    max_size=2,
)
raw_rows = st.fixed_dictionaries(
    {},
    optional={
        "messages": conversations | json_values,
        "prompt": conversations | json_values,
        "completion": conversations | json_values,
        "text": json_values,
        "tools": json_values,
        "chat_template_kwargs": kwargs | json_values,
        "system": json_values,
    },
) | st.fixed_dictionaries({"messages": st.lists(turns, min_size=1, max_size=6)})


def _parquet(rows: list[dict]) -> bytes:
    return _written(pa.Table.from_pylist(rows))


def _written(table: pa.Table) -> bytes:
    """Return a parquet file, uncompressed, so that bytes of its texts can be changed."""
    buffer = io.BytesIO()
    pq.write_table(table, buffer, compression="none")
    return buffer.getvalue()


GOOD_ROWS = [
    {"messages": [{"role": "user", "content": "is it?"}, {"role": "assistant", "content": "yé s"}]},
    {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "bad"}]},
]
JSON_SEEDS = (
    b"\n".join(json.dumps(row).encode() for row in GOOD_ROWS),
    b'{"text": "a"}\n{"text": 5}\n',
    b'{"text": "h\xffi"}',
    b'{"text": "\\ud800"}',
    b"null",
    b"[null]",
    b'[{"text": "a"}]',
    b"[" * 5000,
    b'{"text": "2020-01-01"}',
    b'{"a": 1, "a": 2}',
    b"\xff\xfe{\0}\0",
    b"{}\n{}",
    b'{"messages": [{"role": "assistant", "content": ["x"]}]}',
    b'{\n "text": "a"\n}',
    b"",
    b'\xef\xbb\xbf{"text": "a"}\r\n\r\n{"text": "b"}',
    b'{"text": "a"}\n{"text": "b',
)


@st.composite
def json_files(draw):
    rows = draw(st.lists(raw_rows | json_values, min_size=1, max_size=4))
    data = b"\n".join(json.dumps(row).encode() for row in rows)
    return _damaged(draw, draw(st.sampled_from([data, *JSON_SEEDS])))


def _damaged(draw, data: bytes) -> bytes:
    """Return the data, sometimes with a few bytes changed or cut off the end."""
    changed = bytearray(data)
    for _ in range(draw(st.sampled_from([0, 0, 0, 1, 3]))):
        if changed:
            changed[draw(st.integers(0, len(changed) - 1))] = draw(st.integers(0, 255))
    return bytes(changed[: draw(st.sampled_from([None, None, -1, -9]))])


_NAMES_A_FILE = {
    b"huggingface": json.dumps(
        {
            "info": {
                "features": {
                    "text": {"dtype": "string", "_type": "Value"},
                    "image": {"_type": "Image"},
                }
            }
        }
    ).encode()
}
_STORED = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
_IMAGE = pa.table(
    {
        "text": ["a"],
        "image": pa.array([{"path": "/etc/hostname", "bytes": None}], _STORED),
    }
)
PARQUET_SEEDS = (
    _parquet(GOOD_ROWS),
    _parquet([{"text": "a"}, {"text": "é"}]),
    b"PAR1",
    b"",
    _parquet(GOOD_ROWS).replace("é".encode(), b"\xff\xa9"),
    _written(_IMAGE.replace_schema_metadata(_NAMES_A_FILE)),
)


@st.composite
def parquet_files(draw):
    return _damaged(draw, draw(st.sampled_from(PARQUET_SEEDS)))


# Rows of a data set


token_values = st.integers(0, 399) | st.integers(0, 2) | st.sampled_from([-100, -1, 2**32, 10**9])
columns_of_tokens = st.lists(token_values, max_size=12)


@st.composite
def tokenized_rows(draw):
    ids = draw(columns_of_tokens | json_values)
    if isinstance(ids, list) and draw(st.integers(0, 4)):
        labels = [i if draw(st.booleans()) else -100 for i in ids]
    else:
        labels = draw(columns_of_tokens | json_values)
    row = {"input_ids": ids, "labels": labels}
    return {**row, **draw(raw_rows)} if draw(st.booleans()) else row


@st.composite
def score_columns(draw):
    rows = []
    kind = draw(
        st.sampled_from(
            [
                st.floats(0, 1),
                st.integers(0, 1),
                numbers,
                st.booleans(),
                readable,
                st.none() | st.floats(0, 1),
                st.lists(st.floats(0, 1), max_size=1),
            ]
        )
    )
    for _ in range(draw(st.integers(1, 3))):
        ids = draw(st.lists(st.integers(0, 399), min_size=1, max_size=6))
        length = len(ids) if draw(st.integers(0, 5)) else draw(st.integers(0, 7))
        scores: Any = [draw(kind) for _ in range(length)]
        if draw(st.integers(0, 9)) == 0:
            scores = draw(json_values)
        rows.append({"input_ids": ids, "labels": [-100, *ids[1:]], "star_scores": scores})
    return rows


CACHE_SEEDS = (
    b'[["a", 1, null]]\n' + struct.pack("<d", 0.5),
    b'[["a", 1, 1]]\n' + struct.pack("<2d", 0.5, 1),
    b"[]\n",
    b"",
    b"\n",
    b'[["a", -1, null]]\n',
    b'[["a", 1e3, null]]\n',
    b"[" * 5000 + b"\n",
    b'{"a": 1}\n',
    b'[["a", 99999999999999, 3]]\n',
    b"star-dss-cache 1 ",
    b"SQLite format 3\0",
    b'[["a", 1, null]]\n' + struct.pack("<d", math.nan),
    b'[[["a"], true, null]]\n',
)


@st.composite
def cache_files(draw):
    return _damaged(draw, draw(st.sampled_from(CACHE_SEEDS) | st.binary(max_size=40)))


# Provenance, and reports that show it


GOOD_NOTE = {
    "guard": "g",
    "demonstration_guard": False,
    "guard_identity": {"guards": [{"trajectory": {}}]},
    "segmenter": "tokens",
    "chunk_size": 5,
    "responses": 1,
    "raw_contexts": 1,
    "attempts": {},
    "disagreement": {"mean": 0.1, "opposite": 0.2},
    "truncated_contexts": 1,
    "guard_errors": 0,
    "tokenizer": "m",
    "rows": 1,
}


@st.composite
def descriptions(draw):
    note = {**GOOD_NOTE, **draw(st.dictionaries(st.sampled_from(list(GOOD_NOTE)), json_values))}
    written = draw(
        st.sampled_from(
            [
                json.dumps(note),
                json.dumps(draw(json_values)),
                "[" * 5000,
                '{"guards": [' * 600,
                json.dumps({**GOOD_NOTE, "guard_errors": 10**400}),
                "9" * 5000,
            ]
        )
    )
    damaged = _damaged(draw, written.encode()).decode("utf-8", "replace")
    return draw(hostile) + "\nstar_dss scores: " + damaged if draw(st.booleans()) else damaged


@st.composite
def scored_rows(draw):
    rows = []
    for _ in range(draw(st.integers(1, 3))):
        text, question = draw(readable), draw(readable)
        ids = tokenizer()(question + "<|im_end|>" + text, add_special_tokens=False)["input_ids"]
        start = draw(st.integers(0, len(ids)))
        scores = draw(st.lists(st.floats(0, 1), min_size=len(ids), max_size=len(ids)))
        rows.append(
            {
                "input_ids": ids,
                "labels": [-100] * start + ids[start:],
                "star_scores": scores,
                "source": draw(readable),
                "messages": draw(st.none() | st.lists(turns, max_size=3)),
            }
        )
    return rows


GUARD_KEYS = [
    "preset",
    "model",
    "safe_labels",
    "unsafe_labels",
    "prefill",
    "template_kwargs",
    "guards",
    "combine",
    "calibration",
    "word",
    "chat_template",
    "turns",
    "temperature",
    "threshold",
    "engine",
]
names = st.sampled_from(
    [
        "test-words",
        "demo",
        "qwen3guard",
        "star_dss",
        "tokens",
        "local",
        "k2",
        "full",
        "auto",
        "mean",
        "http://h:1",
        "http://[",
        "vllm",
        "no/such",
    ]
)
guard_mappings = st.recursive(
    st.dictionaries(st.sampled_from(GUARD_KEYS), names | json_values, max_size=4),
    lambda inner: st.fixed_dictionaries(
        {"guards": st.lists(inner | names, max_size=3)},
        optional={"combine": names | json_values, "calibration": json_values},
    ),
    max_leaves=4,
)
option_values = st.one_of(
    names,
    json_values,
    guard_mappings,
    guard_mappings.map(lambda m: json.dumps(m)),
    st.sampled_from(["{" * 5000, '{"a":' * 3000, "{" + "9" * 5000, "x" * 5000, b"\xff"]),
    st.dictionaries(st.sampled_from(["model", "timeout", "retries", "max_requests"]), json_values),
)
OPTIONS = list(StarDSSOptions.__dataclass_fields__)
options = st.dictionaries(st.sampled_from(OPTIONS), option_values, max_size=4)


YAML_SEEDS = (
    b"model_name_or_path: m\ndataset_name: d\noutput_dir: o\nguard: demo\nuse_cpu: true\nbf16: no",
    b"loss_type: star_dss\nguard: {preset: demo}\nchunk_size: 3\nkl_coef: .inf\nthreshold: .nan\n",
    b"a: 2001-99-99",
    b"a: 0b_",
    b"a: !!python/object:os.system x",
    b"\xff\xfe",
    b"[" * 5000,
    b"&a [*a]",
    b"a: &a {<<: *a}",
    b"1: 2",
    b"? [a]\n: b",
    b"- a",
    b"",
    b"guard: {1: 2}",
    b"env: 3",
    b"\xef\xbb\xbfguard: demo",
    b'guard: |\n  {"preset": "demo"}',
    b"config: x",
    b"use_cpu: \x00",
)


@st.composite
def yaml_files(draw):
    keys = [
        *OPTIONS,
        "model_name_or_path",
        "output_dir",
        "dataset_name",
        "config",
        "env",
        "per_device",
    ]
    values = draw(st.dictionaries(st.sampled_from(keys), option_values, max_size=4))
    lines = [f"{name}: {json.dumps(value, default=repr)}" for name, value in values.items()]
    written = "\n".join(lines).encode()
    return _damaged(draw, draw(st.sampled_from([written, written, *YAML_SEEDS])))
