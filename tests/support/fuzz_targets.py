"""Fuzz targets: hostile input must work correctly or be refused with a readable error.

Each target is a property and a strategy for its inputs. Two drivers use them: test_fuzz.py draws
some hundreds of inputs with hypothesis, benchmarks/fuzz.py any number, guided by coverage. A target
raises if the property does not hold, or if an error is not a StarDSSError.
"""

import contextlib
import functools
import io
import json
import logging
import math
import struct
import tempfile
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
from datasets import Dataset
from hypothesis import strategies as st
from rich.console import Console

from star_dss_plugin.cli.check import check_config
from star_dss_plugin.data.cache import ScoreCache
from star_dss_plugin.data.provenance import provenance_of
from star_dss_plugin.data.reading import read_dataset
from star_dss_plugin.data.requests import Trajectory
from star_dss_plugin.data.responses import find_responses
from star_dss_plugin.data.shard_format import header
from star_dss_plugin.data.templates.chat import ChatTokenizer
from star_dss_plugin.data.tokenization import tokenize_row
from star_dss_plugin.errors import DataError
from star_dss_plugin.evaluate.prompts import read_prompts
from star_dss_plugin.guards.loading import load_guard
from star_dss_plugin.options import StarDSSOptions
from star_dss_plugin.report.inspection import Inspection
from star_dss_plugin.report.page import render_page
from star_dss_plugin.report.reading import ScoredData, read_scored
from star_dss_plugin.scoring.scorer import score_dataset
from star_dss_plugin.scoring.strictness import stricter_dataset, stricter_scores
from star_dss_plugin.segmenters import sentences, tokens, whole, words
from star_dss_plugin.training.rows.prepare import prepare_dataset
from support.fuzz_inputs import (
    CACHE_SEEDS,
    GOOD_NOTE,
    JSON_SEEDS,
    PARQUET_SEEDS,
    ROLES,
    YAML_SEEDS,
    cache_files,
    descriptions,
    guard_mappings,
    json_files,
    json_values,
    option_values,
    options,
    parquet_files,
    raw_rows,
    score_columns,
    scored_rows,
    tokenized_rows,
    tokenizer,
    turns,
    yaml_files,
)
from support.fuzzing import Target, refused
from support.guards import WordGuard

# Files of rows


def check_json_file(data: bytes, suffix: str = ".jsonl") -> None:
    with _file(data, f"rows{suffix}") as path, refused(path.name):
        found = read_dataset(str(path))
        rows = found.to_list()
        assert rows
        lines = [line for line in data.removeprefix(b"\xef\xbb\xbf").split(b"\n") if line.strip()]
        if suffix == ".jsonl" and all(_is_object(line) for line in lines):
            assert len(rows) == len(lines), "a row is missing"
        with refused("Row "):
            _check_scored(found)


def _is_object(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def _check_scored(rows: Dataset) -> None:
    """Score rows and show the result, or accept a known error."""
    try:
        with tempfile.TemporaryDirectory() as cache:
            scored = score_dataset(
                rows, tokenizer(), guard=WordGuard(), score_cache_dir=cache, progress=False
            )
    except DataError as error:
        if (
            "None of the" in str(error)
            or "already has" in str(error)
            or "no 'labels'" in str(error)
        ):
            return
        raise
    assert len(scored) == len(rows)
    for row in scored.to_list():
        assert len(row["star_scores"]) == len(row["input_ids"]) == len(row["labels"])
        assert all(0 <= score <= 1 for score in row["star_scores"])
        assert all(
            label == -100 or label == token
            for label, token in zip(row["labels"], row["input_ids"], strict=True)
        )
    _check_page(read_scored(scored, tokenizer(), source=None))


@contextlib.contextmanager
def _file(data: bytes, name: str):
    """Write a temporary file; delete it and the caches of reading it afterwards."""
    with tempfile.TemporaryDirectory() as folder:
        before = datasets.config.HF_DATASETS_CACHE
        datasets.config.HF_DATASETS_CACHE = Path(folder) / "cache"
        path = Path(folder) / name
        path.write_bytes(data)
        try:
            yield path
        finally:
            datasets.config.HF_DATASETS_CACHE = before


def check_parquet_file(data: bytes) -> None:
    with _file(data, "rows.parquet") as path, refused(path.name):
        found = read_dataset(str(path))
        found.to_list()
        if len(found):
            with refused("Row "):
                _check_scored(found)


def check_raw_row(row: dict) -> None:
    with refused():
        found = tokenize_row(row, ChatTokenizer(tokenizer()))
        ids, labels = found["input_ids"], found["labels"]
        assert len(ids) == len(labels)
        _check_responses({**row, **found})
    with contextlib.suppress(
        pa.ArrowException, UnicodeEncodeError, OverflowError, TypeError, ValueError
    ):
        dataset = Dataset.from_list([row])  # Arrow cannot hold every row
    if "dataset" in locals():
        with refused("Row 0" if row else "no rows"):
            read_prompts(dataset, "harmful")


def _check_responses(row: dict) -> None:
    for cut in (tokens, words, sentences, whole):
        for size in (1, 3):
            end = 0
            for found in find_responses(row, ChatTokenizer(tokenizer()), cut, size):
                assert found.start >= end
                end = found.end
                assert found.chunk_ends[-1] == found.end
                assert list(found.chunk_ends) == sorted(set(found.chunk_ends))
                assert found.chunk_ends[0] > found.start
                assert found.request.ends[-1] == len(found.request.text)
                assert len(found.chunk_ends) == len(found.request.ends)
            assert [label for label in row["labels"][end:] if label != -100] == []


def check_tokenized_row(row: dict) -> None:
    with refused():
        _check_responses(row)


# Score columns


def check_score_column(rows: list[dict]) -> None:
    try:
        dataset = Dataset.from_list(rows)
    except (pa.ArrowException, UnicodeEncodeError, OverflowError, TypeError, ValueError):
        return
    with refused():
        read = read_scored(dataset, tokenizer())
        assert all(0 <= s <= 1 for response in read.responses for s in response.scores)
        _check_page(read)
    with refused():
        prepared, summary = prepare_dataset(
            dataset,
            ChatTokenizer(tokenizer(), None),
            StarDSSOptions(),
            name="train",
            truncation=(None, None),
            progress=False,
        )
        for row in prepared.to_list():
            assert len(row["star_scores"]) == len(row["input_ids"])
            assert all(0 <= score <= 1 for score in row["star_scores"])
        assert 0 <= summary.mean_score <= 1


def check_strictness(case: tuple[list[float], dict]) -> None:
    scores, rules = case
    found = stricter_scores(scores, **rules)
    assert len(found) == len(scores)
    assert all(after <= before for after, before in zip(found, scores, strict=True))


# The cache


_BODY = b'[["mine", 1, null]]\n' + struct.pack("<d", 0.5)
SHARD = header(_BODY) + _BODY


def check_cache_file(data: bytes) -> None:
    """Check that a cache with a damaged shard works: its entries are valid, or not found."""
    logging.disable(logging.WARNING)
    try:
        with tempfile.TemporaryDirectory() as root:
            cache = ScoreCache(Path(root), {"what": "fuzz"})
            cache.folder.mkdir()
            for name, content in (("0", data), ("1", header(data) + data), ("2", SHARD)):
                (cache.folder / f"{name}.shard").write_bytes(content)
            cache.refresh()
            for key in cache._index:
                entry = cache.get(key)
                assert entry is not None
                assert all(isinstance(score, float) for score in entry.scores)
            assert cache.get("mine") == Trajectory((0.5,))
    finally:
        logging.disable(logging.NOTSET)


def check_description(text: Any) -> None:
    ids = tokenizer()("it is bad", add_special_tokens=False)["input_ids"]
    dataset = Dataset.from_list(
        [{"input_ids": ids, "labels": ids, "star_scores": [0.5] * len(ids)}]
    )
    dataset.info.description = text
    with refused("description"):
        _check_page(read_scored(dataset, tokenizer()))
    with refused(), tempfile.TemporaryDirectory() as folder:
        stricter_dataset(dataset, ChatTokenizer(tokenizer()), StarDSSOptions(monotone=True))
        path = Path(folder) / "scored"
        dataset.save_to_disk(path)
        assert provenance_of(read_dataset(str(path))) == provenance_of(dataset)


class _Page(HTMLParser):
    """Collect the elements and attributes of a page."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: set[str] = set()
        self.feed(page)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes |= {name for name, _ in attrs}


@functools.cache
def _harmless_page(text: bool) -> _Page:
    """Return a page with every element that a page can have."""
    ids = tokenizer()("fine", add_special_tokens=False)["input_ids"]
    rows = [{"input_ids": ids, "labels": ids, "star_scores": [0.5] * len(ids), "source": "a"}]
    dataset = Dataset.from_list(rows)
    dataset.info.description = f"star_dss scores: {json.dumps(GOOD_NOTE)}"
    return _Page(render_page(read_scored(dataset, tokenizer()), name="x", text=text))


MARKUP = {"strong", "p"}  # elements of a page that reports missing provenance


def _check_page(data: ScoredData) -> None:
    """Check that no text of the data becomes markup or a terminal control character."""
    for text in (True, False):
        html = render_page(data, name="</title><script>" + data.guard, text=text)
        html.encode("utf-8")
        page, plain = _Page(html), _harmless_page(text)
        assert page.tags.count("script") == plain.tags.count("script")
        for found, known in (
            (set(page.tags), set(plain.tags)),
            (page.attributes, plain.attributes),
        ):
            assert found - known <= MARKUP, found - known
    shown = Inspection(data, 0)
    console = Console(file=io.StringIO(), width=80, force_terminal=True)
    console.print(shown)
    written = console.file.getvalue()  # type: ignore[attr-defined]
    assert not set(written) & set("\0\u202e\u2028\ud800\x9b")
    assert set(_Page(shown._repr_html_()).tags) <= {"div", "p", "b", "bdi", "br", "span"}


def check_report(rows: list[dict]) -> None:
    dataset = Dataset.from_list(rows)
    with refused():
        _check_page(read_scored(dataset, tokenizer(), source="source"))


# Options


def check_options(chosen: dict) -> None:
    with refused():
        made = StarDSSOptions(**chosen)
        made.validate()
        for name in ("chunk_size", "score_batch_tokens"):
            assert isinstance(getattr(made, name), int)
            assert getattr(made, name) >= 1
        assert math.isfinite(made.kl_coef)
        assert 0 <= made.threshold <= 1
        assert 0 <= made.trajectory_epsilon <= 1
        assert made.probe_sample >= 20
        assert 0 <= made.probe_tolerance <= 1
        assert isinstance(made.monotone, bool)


def check_block(chosen: dict) -> None:
    """Check options as Axolotl's configuration block passes them."""
    from pydantic import ValidationError
    from star_dss_axolotl.args import StarDSSBlock

    with contextlib.suppress(ValidationError):
        StarDSSBlock.model_validate(chosen)


def check_guard(described: Any) -> None:
    with refused():
        load_guard(described)


def check_yaml(data: bytes) -> None:
    """Check a TRL configuration; its argument parser may print its usage and exit."""
    silence, stop = contextlib.redirect_stderr(io.StringIO()), contextlib.suppress(SystemExit)
    with _file(data, "run.yaml") as path, refused(), silence, stop:
        found = check_config(path, data=False, integration="trl")
        assert all(isinstance(line, str) for line in (*found.notes, *found.problems))


# A chat template's inverse


@functools.cache
def _inverse():
    """Return the inverse of the tiny tokenizer's chat template."""
    from star_dss_plugin.data.templates.inverse import TemplateInverse

    return TemplateInverse(tokenizer(), tokenizer().chat_template)


def check_inverse(case: tuple[list[dict], int]) -> None:
    """Check that the messages found in a text render to it; they may differ from the input."""
    messages, cut = case
    text = tokenizer().apply_chat_template(messages, tokenize=False)
    text = text[: len(text) - cut] if cut < len(text) else text
    found = _inverse().messages(text)
    if found is not None:
        again = "".join(tokenizer().apply_chat_template(found, tokenize=False).split())
        text = "".join(text.split())
        # If the text was cut, it may end with the beginning of another turn.
        begun = text.removeprefix(again)
        opened = any(f"<|im_start|>{role}".startswith(begun) for role in ROLES)
        assert again.startswith(text) or opened


# Large rows


class _QuickGuard(WordGuard):
    """Score each response in constant time, with two scores."""

    def token_scores(self, responses):
        return [[(0, self.safe), (len(text), self.unsafe)] for _, text in responses]


def check_sizes(megabytes: float, turns: int) -> None:
    """Score and show a very long response and a conversation of many turns, from file to page.

    Not a target: there is one input, and it takes long.

    Args:
        megabytes: The size of the response.
        turns: The number of turns of the conversation.
    """
    long = "it is a <bad> word. 👍 " * round(megabytes * 1e6 / 24)
    said = [
        [("user", "why?"), ("assistant", long)],
        [(("user", "assistant")[i % 2], f"turn {i}") for i in range(turns)],
    ]
    data = "\n".join(
        json.dumps({"messages": [{"role": r, "content": c} for r, c in talk]}) for talk in said
    )
    with _file(data.encode(), "rows.jsonl") as path:
        rows = read_dataset(str(path))
        scored = score_dataset(
            rows, tokenizer(), guard=_QuickGuard(), score_cache_dir=path.parent, progress=False
        )
        read = read_scored(scored, tokenizer())
    assert "".join(read.responses[0].pieces) == long
    assert len(read.responses) == 1 + turns // 2
    assert not any(response.raw_context for response in read.responses)
    _check_page(read)


TARGETS = {
    "jsonl": Target(check_json_file, json_files(), 25, JSON_SEEDS),
    "json": Target(lambda data: check_json_file(data, ".json"), json_files(), 15, JSON_SEEDS),
    "parquet": Target(check_parquet_file, parquet_files(), 20, PARQUET_SEEDS),
    "raw-rows": Target(check_raw_row, raw_rows, 80),
    "tokenized-rows": Target(check_tokenized_row, tokenized_rows(), 100),
    "score-columns": Target(check_score_column, score_columns(), 40),
    "strictness": Target(
        check_strictness,
        st.tuples(
            st.lists(st.floats(0, 1), max_size=20),
            st.fixed_dictionaries(
                {
                    "threshold": st.floats(0, 1),
                    "unsafe_lookahead": st.integers(0, 30),
                    "monotone": st.booleans(),
                }
            ),
        ),
        50,
    ),
    "cache": Target(check_cache_file, cache_files(), 80, CACHE_SEEDS),
    "descriptions": Target(check_description, descriptions() | json_values, 30),
    "report": Target(check_report, scored_rows(), 15),
    "options": Target(check_options, options, 200),
    "guards": Target(check_guard, guard_mappings | option_values, 60),
    "yaml": Target(check_yaml, yaml_files(), 15, YAML_SEEDS),
}
AXOLOTL_TARGETS = {  # run in a process of their own, because Axolotl patches transformers
    "block": Target(check_block, options, 60),
    "template-inverse": Target(
        check_inverse, st.tuples(st.lists(turns, min_size=1, max_size=5), st.integers(0, 20)), 60
    ),
}
