"""Rows to `star_scores`: the right floats on the right tokens, once, whatever happens meanwhile."""

import copy
import errno
import hashlib
import json
import logging
import multiprocessing
import os
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset, List, Value, load_from_disk
from support.guards import WordGuard
from support.models import CHATML

from star_dss_plugin import (
    CacheError,
    ConfigError,
    DataError,
    GuardError,
    load_guard,
    provenance_of,
    score_dataset,
)
from star_dss_plugin.data import cache
from star_dss_plugin.data.cache import ScoreCache
from star_dss_plugin.data.requests import Trajectory
from star_dss_plugin.data.responses import runs
from star_dss_plugin.guards.base import Guard, StreamingGuard
from star_dss_plugin.guards.verdict import VerdictGuard

PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload([__name__])  # torch and transformers are imported once for all


class HashGuard(StreamingGuard):
    """A score that depends on every character of the context and of the prefix."""

    name = "test-hash"

    def __init__(self, salt="") -> None:
        self.salt = salt
        self.asked = []

    @property
    def identity(self):
        return {"kind": "hash", "salt": self.salt}

    def value(self, context, prefix):
        turns = [[m["role"], m["content"]] for m in context]
        digest = hashlib.sha256(json.dumps([self.salt, turns, prefix]).encode()).digest()
        return int.from_bytes(digest[:4], "big") / 2**32

    def token_scores(self, responses):
        self.asked += [text for _, text in responses]
        return [
            [(end, self.value(context, text[:end])) for end in range(len(text) + 1)]
            for context, text in responses
        ]


class BatchGuard(Guard):
    """Asked in threes; like on a GPU, the last bits of a score depend on the whole batch."""

    name = "test-batches"
    identity = {"kind": "batches"}

    def __init__(self, fail_at=None, action=None, delay=0.0) -> None:
        self.fail_at, self.action, self.delay = fail_at, action, delay
        self.batches = []

    def plan(self, requests):
        return [list(range(i, min(i + 3, len(requests)))) for i in range(0, len(requests), 3)]

    def trajectories(self, requests):
        if len(self.batches) == self.fail_at:
            self.action()
        time.sleep(self.delay)
        self.batches.append([r.text for r in requests])
        noise = sum(len(r.text) for r in requests) * 1e-7
        return [Trajectory(tuple(1 / (2 + end) + noise for end in r.ends)) for r in requests]


def chat(*contents):
    roles = ["user", "assistant"] * len(contents)
    return [{"role": r, "content": c} for r, c in zip(roles, contents, strict=False)]


def conversations(count=20):
    return Dataset.from_list(
        [
            {
                "messages": chat(
                    f"is {i} bad?", f"no, {i} is good. but a bad {i}", "why?", f"{i} is {i}"
                )
            }
            for i in range(count)
        ]
    )


TALK = chat("how are you?", "i am fine, thank you. the fox is bad", "is it?", "no")
SIMPLE = {"messages": [TALK[0], TALK[1]]}


def scored(dataset, tokenizer, guard, **options):
    return score_dataset(dataset, tokenizer, guard=guard, **{"progress": False, **options})


# The values


def twin(row, tokenizer, contexts, chunk_size):
    """The slow twin: the guard is asked for each prefix of tokens, one by one."""
    guard, special = HashGuard(), set(tokenizer.all_special_ids)
    column = [1.0] * len(row["input_ids"])
    for (start, end), context in zip(runs(row["labels"]), contexts, strict=True):
        body = row["input_ids"][start:end]
        stops = [n for n, i in enumerate(body) if i in special]
        body = body[: stops[0]] if stops else body
        for n in range(start, end):
            chunk = min((n - start) // chunk_size, max(0, (len(body) - 1) // chunk_size))
            prefix = tokenizer.decode(body[: (chunk + 1) * chunk_size])
            column[n] = guard.score([[*context, {"role": "assistant", "content": prefix}]])[0]
    return np.asarray(column, dtype=np.float32)


def tokenized(tokenizer, row):
    made = scored(Dataset.from_list([row]), tokenizer, HashGuard())[0]
    return {"input_ids": made["input_ids"], "labels": made["labels"]}


QUESTION = "<|im_start|>user\nhow are you?<|im_end|>\n<|im_start|>assistant\n"
KINDS = {  # kind -> row, contexts of its responses
    "messages": ({"messages": TALK}, [TALK[:1], TALK[:3]]),
    "conversational": ({"prompt": TALK[:1], "completion": TALK[1:2]}, [TALK[:1]]),
    "the whole talk": ({"prompt": TALK[:3], "completion": TALK[3:]}, [TALK[:3]]),
    "plain": ({"prompt": "how are you?", "completion": " fine, and you?"}, [chat("how are you?")]),
    "text": ({"text": "the quick brown fox is bad"}, [[]]),
}


@pytest.mark.parametrize("chunk_size", [1, 3, 5, 1000])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("raw", [True, False], ids=["raw", "tokenized"])
def test_scores_are_those_of_the_prefixes(tokenizer, kind, raw, chunk_size):
    row, contexts = KINDS[kind]
    if not raw:
        row = row | tokenized(tokenizer, row)
    found = scored(Dataset.from_list([row]), tokenizer, HashGuard(), chunk_size=chunk_size)
    row = found[0]
    assert found.features["star_scores"] == List(Value("float32"))
    assert len(row["star_scores"]) == len(row["input_ids"]) == len(row["labels"])
    assert (
        np.asarray(row["star_scores"], dtype=np.float32).tolist()
        == twin(row, tokenizer, contexts, chunk_size).tolist()
    )
    assert all(
        score == 1.0
        for score, label in zip(row["star_scores"], row["labels"], strict=True)
        if label == -100
    )


def test_rows_of_tokens_alone_have_decoded_contexts(tokenizer, caplog):
    row = tokenized(tokenizer, SIMPLE)
    found = scored(Dataset.from_list([row]), tokenizer, HashGuard())
    expected = twin(row, tokenizer, [chat(QUESTION)], 5)
    assert found["star_scores"][0] == pytest.approx(expected.tolist(), abs=0)
    assert "For 1 responses the guard reads the decoded tokens before them" in caplog.text
    assert provenance_of(found)["raw_contexts"] == 1


def test_a_verdict_guards_scores_are_those_of_each_prefix_alone(tokenizer, model_dir):
    guard = load_guard(
        {
            "model": str(model_dir),
            "safe_labels": [" good"],
            "unsafe_labels": [" bad"],
            "self_check": False,
            "min_label_mass": 0.0,
            "device": "cpu",
        }
    )
    (row,) = scored(Dataset.from_list([SIMPLE]), tokenizer, guard, chunk_size=4)
    ((start, end),) = runs(row["labels"])
    body = row["input_ids"][start : end - 1]
    for n in range(start, end):
        text = tokenizer.decode(body[: (n - start) // 4 * 4 + 4] if n < end - 1 else body)
        (alone,) = guard.score([[TALK[0], {"role": "assistant", "content": text}]])
        assert row["star_scores"][n] == pytest.approx(alone, abs=1e-5)


@pytest.mark.parametrize("segmenter", ["words", "sentences", "whole"])
def test_a_score_belongs_to_the_chunk_that_ends_there(tokenizer, segmenter):
    found = scored(
        Dataset.from_list([SIMPLE]), tokenizer, "test-words", segmenter=segmenter, chunk_size=1
    )[0]
    ((start, end),) = runs(found["labels"])
    text = ""
    for n in range(start, end):
        text += tokenizer.decode([found["input_ids"][n]])
        unsafe = {
            "words": "bad" in text,
            "sentences": " the" in text,
            "whole": True,
        }[segmenter]
        assert found["star_scores"][n] == pytest.approx(0.1 if unsafe else 0.9)


def test_the_end_of_turn_has_the_last_score(tokenizer):
    found = scored(Dataset.from_list([SIMPLE]), tokenizer, "test-words")[0]
    assert found["labels"][-2:] == [tokenizer.eos_token_id, -100]
    assert found["star_scores"][-2:] == [pytest.approx(0.1), 1.0]


def test_an_empty_answer_has_a_score(tokenizer):
    found = scored(Dataset.from_list([{"messages": chat("hi", "")}]), tokenizer, HashGuard())[0]
    ((start, end),) = runs(found["labels"])
    assert found["star_scores"][start:end] == [pytest.approx(HashGuard().value(chat("hi"), ""))]


def test_max_length_cuts_before_anything_is_scored(tokenizer):
    guard = HashGuard()
    found = scored(conversations(1), tokenizer, guard, max_length=20)[0]
    assert len(found["input_ids"]) == len(found["star_scores"]) == 20
    ((start, end),) = runs(found["labels"])
    assert guard.asked == [tokenizer.decode(found["input_ids"][start:end])]


def test_raw_rows_use_the_template_they_are_given(tokenizer):
    template = CHATML.replace("<|im_start|>", "<|im_start|>the ")
    found = scored(Dataset.from_list([SIMPLE]), tokenizer, HashGuard(), chat_template=template)
    assert tokenizer.decode(found[0]["input_ids"]).startswith("<|im_start|>the user\n")
    assert provenance_of(found)["raw_contexts"] == 0
    bare = copy.deepcopy(tokenizer)
    bare.chat_template = None
    again = scored(Dataset.from_list([SIMPLE]), bare, HashGuard(), chat_template=template)
    assert again["star_scores"][:] == found["star_scores"][:]


def test_trained_questions_are_not_trained_any_more(tokenizer, caplog):
    ids = tokenized(tokenizer, {"messages": TALK})
    row = {"messages": TALK, "input_ids": ids["input_ids"], "labels": ids["input_ids"]}
    found = scored(Dataset.from_list([row, row | ids]), tokenizer, HashGuard())
    assert list(found["labels"]) == [ids["labels"]] * 2
    assert found["star_scores"][0] == found["star_scores"][1]
    assert "In 1 of 2 conversations what the user says was trained too" in caplog.text


# Asked once


def test_identical_responses_are_asked_once(tokenizer):
    guard = HashGuard()
    same, other = {"messages": chat("hi", "ok")}, {"messages": chat("bye", "ok")}
    found = scored(Dataset.from_list([same, same, other, same]), tokenizer, guard)
    assert guard.asked == ["ok", "ok"]  # once per context
    column = list(found["star_scores"])
    assert column[0] == column[1] == column[3]
    trained = [[s for s in scores if s != 1.0] for scores in column]
    assert trained[0] != trained[2]


def saved(dataset, folder: Path) -> dict[str, bytes]:
    dataset.save_to_disk(folder)
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_a_second_run_asks_nothing_and_is_the_same_to_the_byte(tokenizer, tmp_path):
    first, second = HashGuard(), HashGuard()
    one = scored(conversations(), tokenizer, first)
    two = scored(conversations(), tokenizer, second)
    assert len(first.asked) == 40
    assert second.asked == []
    assert saved(one, tmp_path / "one") == saved(two, tmp_path / "two")


def test_a_cached_run_loads_no_weights(tokenizer, model_dir, monkeypatch):
    options = {
        "model": str(model_dir),
        "safe_labels": [" good"],
        "unsafe_labels": [" bad"],
        "self_check": False,
        "min_label_mass": 0.0,
        "device": "cpu",
    }
    first = scored(Dataset.from_list([SIMPLE]), tokenizer, options)
    monkeypatch.setattr(VerdictGuard, "_load", lambda self: pytest.fail("weights were loaded"))
    second = scored(Dataset.from_list([SIMPLE]), tokenizer, options)
    assert first["star_scores"][:] == second["star_scores"][:]


@pytest.mark.parametrize(
    ("changes", "asked_again"),
    [
        ({}, False),
        ({"progress": True}, False),
        ({"score_batch_tokens": 7}, False),
        ({"chunk_size": 4}, True),
        ({"segmenter": "words"}, True),
        ({"guard": {"preset": "test-words", "word": "fox"}}, True),
        ({"guard": {"preset": "test-words", "unsafe": 0.2}}, True),
        ({"guard": {"preset": "test-words", "unsafe": 0.1}}, False),
        ({"score_cache_dir": "another"}, True),
    ],
    ids=str,
)
def test_what_is_asked_again(tokenizer, tmp_path, changes, asked_again):
    options = {"guard": "test-words", "chunk_size": 5, "score_cache_dir": tmp_path / "cache"}
    data = Dataset.from_list([SIMPLE])
    scored(data, tokenizer, **options)
    if "score_cache_dir" in changes:
        changes = {"score_cache_dir": tmp_path / changes["score_cache_dir"]}
    before = WordGuard.loads
    scored(data, tokenizer, **{**options, **changes})
    assert (WordGuard.loads > before) == asked_again


def test_new_rows_alone_are_asked(tokenizer):
    first, second = HashGuard(), HashGuard()
    scored(conversations(10), tokenizer, first)
    found = scored(conversations(11).shuffle(seed=1), tokenizer, second)
    assert sorted(second.asked) == ["10 is 10", "no, 10 is good. but a bad 10"]
    fresh = scored(
        conversations(11).shuffle(seed=1),
        tokenizer,
        HashGuard(""),
        score_cache_dir=str(Path(os.environ["STAR_DSS_CACHE"]) / "fresh"),
    )
    assert found["star_scores"][:] == fresh["star_scores"][:]


def test_a_guard_is_closed_by_who_loaded_it(tokenizer, monkeypatch):
    closed = []
    monkeypatch.setattr(WordGuard, "close", lambda self: closed.append(self))
    mine = WordGuard()
    scored(Dataset.from_list([SIMPLE]), tokenizer, mine)
    assert closed == []
    scored(Dataset.from_list([SIMPLE]), tokenizer, "test-words")
    monkeypatch.setattr(WordGuard, "token_scores", lambda self, responses: [[]])
    with pytest.raises(GuardError):
        scored(Dataset.from_list([SIMPLE]), tokenizer, {"preset": "test-words", "word": "other"})
    assert len(closed) == 2
    assert mine not in closed


@pytest.mark.parametrize(
    "places", [[30, 34, 39], [3, 1, 5], [-1, 2, 3]], ids=["of the prompt", "unordered", "negative"]
)
def test_places_that_are_not_the_responses_are_an_error(tokenizer, monkeypatch, places):
    """Each prefix would get some token's score, and none its own."""
    tokens = [(end, 0.9 - i / 10) for i, end in enumerate(places)]
    monkeypatch.setattr(WordGuard, "token_scores", lambda self, responses: [tokens])
    with pytest.raises(GuardError, match="must count from the beginning of the response"):
        scored(Dataset.from_list([SIMPLE]), tokenizer, "test-words")


@pytest.mark.parametrize("count", [0, 2])
def test_token_scores_of_other_responses_are_an_error(tokenizer, monkeypatch, count):
    monkeypatch.setattr(WordGuard, "token_scores", lambda *_: [[(0, 0.5)]] * count)
    with pytest.raises(GuardError, match=f"of {count} responses for 1; token_scores must"):
        scored(Dataset.from_list([SIMPLE]), tokenizer, "test-words")


# Interrupted, side by side, damaged


class Stop(BaseException):
    pass


def stop():
    raise Stop


def test_an_interrupted_run_goes_on_where_it_stopped(tokenizer, tmp_path):
    whole = scored(conversations(), tokenizer, BatchGuard(), score_cache_dir=tmp_path / "whole")
    first, second = BatchGuard(fail_at=6, action=stop), BatchGuard()
    with pytest.raises(Stop):
        scored(conversations(), tokenizer, first, score_cache_dir=tmp_path / "cut")
    found = scored(conversations(), tokenizer, second, score_cache_dir=tmp_path / "cut")
    assert len(first.batches) == 6
    assert len(second.batches) == 14 - 6
    assert saved(found, tmp_path / "a") == saved(whole, tmp_path / "b")


def test_what_a_batch_lost_is_computed_in_the_same_batch(tokenizer, tmp_path):
    """The last bits depend on the batch: one of three is missing, three are asked."""
    whole = scored(conversations(), tokenizer, BatchGuard(), score_cache_dir=tmp_path / "whole")
    some = conversations().select([0, 3, 4, 9])  # other batches, other last bits
    guard = BatchGuard()
    scored(some, tokenizer, guard, score_cache_dir=tmp_path / "whole")
    assert guard.batches == []
    again = BatchGuard()
    found = scored(conversations(21), tokenizer, again, score_cache_dir=tmp_path / "whole")
    assert [len(b) for b in again.batches] == [3]
    assert list(found["star_scores"])[:20] == list(whole["star_scores"])


def score_in_a_process(tokenizer, folder, out, fail_at, delay, start=None):
    cache._FLUSH_SECONDS = 0.0
    guard = BatchGuard(fail_at, lambda: os._exit(7), delay)
    if start is not None:
        start.wait()
    scored(conversations(), tokenizer, guard, score_cache_dir=folder).save_to_disk(out)
    (out / "batches").write_text(str(len(guard.batches)))


def run_together(*processes):
    for process in processes:
        process.start()
    for process in processes:
        process.join(600)
    return [process.exitcode for process in processes]


def arrow(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.arrow")}


def test_killed_and_started_again_by_two_at_once(tokenizer, tmp_path):
    """A run dies without a word after 4 batches; then two go on, and share what is left."""
    whole = scored(conversations(), tokenizer, BatchGuard(), score_cache_dir=tmp_path / "whole")
    cache = tmp_path / "cache"
    killed = PROCESSES.Process(
        target=score_in_a_process, args=(tokenizer, cache, tmp_path / "killed", 4, 0.0)
    )
    assert run_together(killed) == [7]
    assert not (tmp_path / "killed").exists()
    start = PROCESSES.Barrier(2)
    two = [
        PROCESSES.Process(
            target=score_in_a_process, args=(tokenizer, cache, tmp_path / name, None, 0.05, start)
        )
        for name in "ab"
    ]
    assert run_together(*two) == [0, 0]
    asked = [int((tmp_path / name / "batches").read_text()) for name in "ab"]
    assert sorted(asked) == [0, 14 - 4]
    whole.save_to_disk(tmp_path / "saved")
    assert arrow(tmp_path / "a") == arrow(tmp_path / "b") == arrow(tmp_path / "saved")
    assert provenance_of(load_from_disk(tmp_path / "a")) == provenance_of(whole)


def score_a_part(tokenizer, folder, first, out, start):
    cache._FLUSH_SECONDS = 0.0
    rows = conversations(24).select(range(first, first + 9))
    start.wait()
    found = scored(rows, tokenizer, HashGuard(), score_cache_dir=folder)
    out.write_text(json.dumps(list(found["star_scores"])))


def test_sixteen_processes_on_one_cache_lose_nothing(tokenizer, tmp_path):
    """Each scores nine rows of 24, most of which others score at the same time."""
    start, outs = PROCESSES.Barrier(16), [tmp_path / f"{i}.json" for i in range(16)]
    processes = [
        PROCESSES.Process(
            target=score_a_part, args=(tokenizer, tmp_path / "cache", i, outs[i], start)
        )
        for i in range(16)
    ]
    assert run_together(*processes) == [0] * 16
    alone = scored(conversations(24), tokenizer, HashGuard(), score_cache_dir=tmp_path / "alone")
    wanted = list(alone["star_scores"])
    for i, out in enumerate(outs):
        assert json.loads(out.read_text()) == wanted[i : i + 9]
    guard = HashGuard()
    again = scored(conversations(24), tokenizer, guard, score_cache_dir=tmp_path / "cache")
    assert list(again["star_scores"]) == wanted
    assert guard.asked == []
    left = {path.suffix for path in (tmp_path / "cache").rglob("*") if path.is_file()}
    assert left == {".shard", ".json", ""}  # nothing damaged or half-written; "" is the lock


def test_a_disk_that_fills_up_costs_what_was_not_written(tokenizer, tmp_path, monkeypatch):
    whole = scored(conversations(), tokenizer, BatchGuard(), score_cache_dir=tmp_path / "whole")
    monkeypatch.setattr(cache, "_FLUSH_SECONDS", -1.0)
    write, written = cache.ScoreCache._write, []

    def until_full(self, name, data):
        written.append(name)
        if len(written) > 4:  # namespace.json and three batches
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(self, name, data)

    with monkeypatch.context() as patched:
        patched.setattr(cache.ScoreCache, "_write", until_full)
        with pytest.raises(CacheError, match=r"No space left.*start the same command again"):
            scored(conversations(), tokenizer, BatchGuard(), score_cache_dir=tmp_path / "full")
    rest = BatchGuard()
    found = scored(conversations(), tokenizer, rest, score_cache_dir=tmp_path / "full")
    assert len(rest.batches) == 14 - 3
    assert saved(found, tmp_path / "a") == saved(whole, tmp_path / "b")


@pytest.mark.parametrize("damage", ["flip", "cut", "empty"])
def test_a_damaged_cache_is_computed_again(tokenizer, tmp_path, caplog, damage):
    first = scored(conversations(), tokenizer, HashGuard(), score_cache_dir=tmp_path / "cache")
    (shard,) = (tmp_path / "cache").glob("*/*.shard")
    data = bytearray(shard.read_bytes())
    data[-20] ^= 1
    kept = {"flip": bytes(data), "cut": bytes(data[: len(data) // 2]), "empty": b""}[damage]
    shard.write_bytes(kept)
    guard = HashGuard()
    again = scored(conversations(), tokenizer, guard, score_cache_dir=tmp_path / "cache")
    assert len(guard.asked) == 40
    assert "computed again" in caplog.text
    assert saved(again, tmp_path / "a") == saved(first, tmp_path / "b")


# Guards that answer nonsense


class Nonsense(Guard):
    """Returns what it is told to."""

    name = "test-nonsense"
    identity = {"kind": "nonsense"}

    def __init__(self, answer) -> None:
        self.answer = answer

    def trajectories(self, requests):
        return self.answer(requests)


def each(scores, mass=None):
    return lambda requests: [
        Trajectory(scores(len(r.ends)), None if mass is None else mass(len(r.ends)))
        for r in requests
    ]


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (each(lambda n: (float("nan"),) * n), "one probability in"),
        (each(lambda n: (0.5,) * (n - 1) + (float("nan"),)), "one probability in"),
        (each(lambda n: (float("inf"),) * n), "one probability in"),
        (each(lambda n: (-1e-6,) * n), "one probability in"),
        (each(lambda n: (1.000001,) * n), "one probability in"),
        (each(lambda n: (0.5,) * (n - 1)), "one probability in"),
        (each(lambda n: (0.5,) * (n + 1)), "one probability in"),
        (each(lambda n: ()), "one probability in"),
        (each(lambda n: (0.5,) * n, lambda n: (0.5,) * (n + 1)), "label_mass"),
        (each(lambda n: (0.5,) * n, lambda n: (float("nan"),) * n), "label_mass"),
        (each(lambda n: (0.5,) * n, lambda n: (2.0,) * n), "label_mass"),
        (lambda requests: [], "0 trajectories for 1 responses"),
        (lambda requests: [Trajectory((0.5,))] * 2, "2 trajectories for 1 responses"),
    ],
)
def test_nonsense_is_an_error_and_not_remembered(tokenizer, answer, message):
    data = conversations(2)
    with pytest.raises(GuardError, match=message):
        scored(data, tokenizer, Nonsense(answer))
    honest = scored(data, tokenizer, Nonsense(each(lambda n: (0.25,) * n)))
    assert {s for scores in honest["star_scores"] for s in scores} == {0.25, 1.0}


@pytest.mark.parametrize("edge", [0.0, 1.0])
def test_the_ends_of_the_range_are_scores(tokenizer, edge):
    found = scored(conversations(1), tokenizer, Nonsense(each(lambda n: (edge,) * n)))
    assert {s for scores in found["star_scores"] for s in scores} == {edge, 1.0}


def test_an_error_of_the_guard_names_the_row(tokenizer):
    def refuse(requests):
        if "7" in requests[0].text:
            raise GuardError("too long")
        return each(lambda n: (0.5,) * n)(requests)

    with pytest.raises(GuardError, match="^Row 7: too long"):
        scored(conversations(), tokenizer, Nonsense(refuse))


@pytest.mark.parametrize(
    ("mass", "minimum", "trusted"),
    [
        (0.6, 0.5, True),
        (0.4, 0.5, False),
        (0.4, 0.0, True),
        (1e-9, 0.5, False),
    ],
)
def test_label_mass_over_the_data(tokenizer, mass, minimum, trusted):
    guard = Nonsense(each(lambda n: (0.9,) * n, lambda n: (mass,) * n))
    guard.min_label_mass = minimum
    data = conversations(3)
    for _ in range(2):  # computed, and from the cache
        if trusted:
            found = provenance_of(scored(data, tokenizer, guard))["label_mass"]
            assert found == pytest.approx({"mean": mass, "min": mass, "p05": mass})
        else:
            with pytest.raises(GuardError, match="test-nonsense.*probability of only.*the data"):
                scored(data, tokenizer, guard)


# Provenance


def test_provenance_says_how_and_not_when(tokenizer, tmp_path):
    found = provenance_of(scored(conversations(3), tokenizer, HashGuard(), chunk_size=2))
    assert found == {
        "guard": "test-hash",
        "demonstration_guard": False,
        "guard_identity": {"kind": "hash", "salt": ""},
        "segmenter": "tokens",
        "chunk_size": 2,
        "rows": 3,
        "responses": 6,
        "prefixes": found["prefixes"],
        "trained_tokens": found["trained_tokens"],
        "raw_contexts": 0,
        "mean_prefix_score": found["mean_prefix_score"],
        "label_mass": None,
        "attempts": {},
        "truncated_contexts": 0,
        "guard_errors": 0,
        "tokenizer": tokenizer.name_or_path,
        "versions": found["versions"],
    }
    assert found["trained_tokens"] > found["prefixes"] > 6
    assert sorted(found["versions"]) == ["star-dss-plugin", "torch", "transformers"]
    again = scored(
        conversations(3),
        tokenizer,
        HashGuard(),
        chunk_size=2,
        score_cache_dir=tmp_path / "elsewhere",
    )
    assert provenance_of(again) == found


def test_provenance_survives(tokenizer, tmp_path):
    found = scored(conversations(4), tokenizer, HashGuard())
    expected = provenance_of(found)
    found.save_to_disk(tmp_path / "saved")
    for kept in (
        load_from_disk(tmp_path / "saved"),
        found.map(lambda row: {"more": 1}),
        found.select([2, 0]),
        found.filter(lambda row: True),
        found.shuffle(seed=1),
        found.train_test_split(0.5)["test"],
        found.remove_columns("messages"),
        found.with_format("torch"),
    ):
        assert provenance_of(kept) == expected


def test_a_description_is_kept(tokenizer):
    data = conversations(1)
    data.info.description = "Made of foxes.\nTwo lines."
    found = scored(data, tokenizer, HashGuard())
    assert found.info.description.startswith("Made of foxes.\nTwo lines.\n")
    assert provenance_of(found)["rows"] == 1
    assert data.info.description == "Made of foxes.\nTwo lines."
    assert provenance_of(data) is None


def test_scored_again_the_old_provenance_is_gone(tokenizer):
    first = scored(conversations(1), tokenizer, HashGuard())
    again = scored(first.remove_columns("star_scores"), tokenizer, HashGuard("salt"), chunk_size=2)
    assert provenance_of(again)["guard_identity"]["salt"] == "salt"
    assert provenance_of(again)["chunk_size"] == 2
    assert provenance_of(first)["guard_identity"]["salt"] == ""
    assert again["star_scores"][0] != first["star_scores"][0]


# Data sets of all kinds


def test_other_columns_and_order_are_kept(tokenizer):
    data = conversations(6).add_column("id", list("abcdef"))
    found = scored(data.select([4, 1, 3]), tokenizer, HashGuard())
    assert found["id"][:] == ["e", "b", "d"]
    whole = scored(data, tokenizer, HashGuard())
    assert found["star_scores"][:] == [whole["star_scores"][i] for i in (4, 1, 3)]
    assert set(found.column_names) == {"messages", "id", "input_ids", "labels", "star_scores"}
    assert "star_scores" not in data.column_names


@pytest.mark.parametrize("columns", [None, ["input_ids", "labels"]])
@pytest.mark.parametrize("kind", ["torch", "numpy"])
def test_formatted_data_sets(tokenizer, kind, columns):
    plain = Dataset.from_list([row | tokenized(tokenizer, row) for row in conversations(3)])
    expected = scored(plain, tokenizer, HashGuard())
    found = scored(plain.with_format(kind, columns=columns), tokenizer, HashGuard())
    assert found.format["type"] == kind
    assert found.with_format(None)["star_scores"][:] == expected["star_scores"][:]
    if columns is None:
        value = found[0]["star_scores"]
        assert isinstance(value, torch.Tensor if kind == "torch" else np.ndarray)


def test_narrow_integers(tokenizer):
    row = SIMPLE | tokenized(tokenizer, SIMPLE)
    data = Dataset.from_list([row])
    for name in ("input_ids", "labels"):
        data = data.cast_column(name, List(Value("int32")))
    found = scored(data, tokenizer, HashGuard())
    assert (
        found["star_scores"][0]
        == scored(Dataset.from_list([row]), tokenizer, HashGuard())["star_scores"][0]
    )


def test_rows_without_a_response_stay_without(tokenizer):
    ids = tokenized(tokenizer, SIMPLE)
    nothing = {"input_ids": [5, 6], "labels": [-100, -100]}
    empty = {"input_ids": [], "labels": []}
    found = scored(Dataset.from_list([nothing, ids, empty]), tokenizer, HashGuard())
    assert found["star_scores"][0] == [1.0, 1.0]
    assert found["star_scores"][2] == []
    assert provenance_of(found)["responses"] == 1


# What cannot be scored


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"input_ids": [5, 6], "labels": [-100, -100]}] * 2, "None of the 2 rows has a trained"),
        ([{"messages": chat("hi")}], "None of the 1 rows has a trained"),
        ([{"input_ids": [5, 6]}], "'input_ids' but no 'labels'"),
        ([SIMPLE | {"star_scores": [1.0]}], "already has a 'star_scores' column"),
        ([{"question": "hi"}], r"^Row 0: .*columns \['question'\]"),
        (
            [{"input_ids": [5], "labels": [5]}, {"input_ids": [5, 6], "labels": [-100, 5]}],
            "^Row 1: .*not the input's own tokens",
        ),
        (
            [{"input_ids": [5], "labels": [5]}, {"input_ids": [5, 6], "labels": [5]}],
            "^Row 1: input_ids has 2 tokens and labels has 1",
        ),
        (
            [{"messages": TALK, "input_ids": [5, 6], "labels": [5, 6]}],
            "^Row 0: .*not those of its chat template",
        ),
    ],
)
def test_data_that_cannot_be_scored(tokenizer, rows, message):
    guard = HashGuard()
    with pytest.raises(DataError, match=message):
        scored(Dataset.from_list(rows), tokenizer, guard)
    assert guard.asked == []


@pytest.mark.parametrize("columns", [{"messages": []}, {"input_ids": [], "labels": []}], ids=str)
def test_an_empty_data_set(tokenizer, columns):
    with pytest.raises(DataError, match="None of the 0 rows"):
        scored(Dataset.from_dict(columns), tokenizer, HashGuard())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"guard": None}, "No guard was given"),
        ({"guard": "test-wrods"}, "Unknown guard 'test-wrods'. Did you mean 'test-words'"),
        ({"segmenter": "word"}, "Unknown segmenter 'word'. Did you mean 'words'"),
        ({"chunk_size": 0}, "chunk_size is 0"),
        ({"chunk_size": -5}, "chunk_size is -5"),
        ({"chunk_size": 2.5}, "chunk_size is 2.5"),
        ({"chunk_size": True}, "chunk_size is True"),
        ({"trajectory": "adaptiv"}, "Unknown trajectory 'adaptiv'. Did you mean 'adaptive'"),
        ({"trajectory_epsilon": 2}, "trajectory_epsilon is 2"),
        ({"score_batch_tokens": 0}, "score_batch_tokens is 0"),
        ({"on_guard_error": "safe"}, "Unknown on_guard_error 'safe'"),
        ({"guard": {"preset": "test-words", "wrod": "x"}}, "wrod"),
        ({"guard": {}}, "lacks model, safe_labels, unsafe_labels"),
    ],
)
def test_options_that_cannot_work(tokenizer, options, message):
    with pytest.raises(ConfigError, match=message):
        scored(conversations(1), tokenizer, **{"guard": "test-words", **options})


def test_progress_counts_prefixes_and_stays_silent_when_nothing_is_asked(tokenizer, capsys):
    found = scored(conversations(3), tokenizer, HashGuard(), progress=True)
    prefixes = provenance_of(found)["prefixes"]
    assert f"{prefixes}/{prefixes}" in capsys.readouterr().err
    scored(conversations(3), tokenizer, HashGuard(), progress=True)
    assert "prefix" not in capsys.readouterr().err


def test_nothing_is_logged_where_nothing_is_odd(tokenizer, caplog):
    with caplog.at_level(logging.WARNING, logger="star_dss_plugin"):
        scored(conversations(2), tokenizer, HashGuard())
    assert caplog.records == []


@pytest.mark.parametrize("entry", [(), (0.5,) * 99, (float("inf"),), (-1.0,)])
def test_an_entry_of_the_cache_that_is_no_answer_is_computed_again(
    tmp_path, tokenizer, caplog, entry
):
    """Its checksum says that it is whole, and nothing of who wrote it."""
    data = conversations(2)
    options = {"guard": WordGuard(), "score_cache_dir": tmp_path, "progress": False}
    options["segmenter"] = "whole"
    expected = score_dataset(data, tokenizer, **options)
    (shard,) = tmp_path.glob("*/*.shard")
    lines = shard.read_bytes().split(b"\n", 2)
    cache = ScoreCache(tmp_path, json.loads((shard.parent / "namespace.json").read_text()))
    for key, _, _ in json.loads(lines[1]):
        cache.put(key, Trajectory(entry))
    cache.flush()
    with caplog.at_level(logging.WARNING):
        again = score_dataset(data, tokenizer, **options)
    assert again["star_scores"][:] == expected["star_scores"][:]
    assert caplog.text.count("entries of the cache") == 1
    assert "Ignored 4 entries of the cache" in caplog.text
    caplog.clear()
    assert score_dataset(data, tokenizer, **options)["star_scores"][:] == again["star_scores"][:]
    assert not caplog.text
