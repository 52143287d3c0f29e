"""Scoring and its cache: each response is scored once, in spite of kills, errors and damage."""

import errno
import json
import logging
import os
from pathlib import Path

import pytest
from datasets import Dataset, load_from_disk
from support.forks import FORKS
from support.guards import WordGuard
from support.scoring import SIMPLE, BatchGuard, HashGuard, chat, conversations, saved_bytes, scored
from transformers import AutoModelForCausalLM

from star_dss_plugin import (
    CacheError,
    GuardError,
    provenance_of,
    score_dataset,
)
from star_dss_plugin.data import cache
from star_dss_plugin.data.cache import ScoreCache
from star_dss_plugin.data.requests import Trajectory


def test_identical_responses_are_scored_once(tokenizer):
    guard = HashGuard()
    same, other = {"messages": chat("hi", "ok")}, {"messages": chat("bye", "ok")}
    found = scored(Dataset.from_list([same, same, other, same]), tokenizer, guard)
    assert guard.asked == ["ok", "ok"]  # once per context
    column = list(found["star_scores"])
    assert column[0] == column[1] == column[3]
    trained = [[s for s in scores if s != 1.0] for scores in column]
    assert trained[0] != trained[2]


def test_a_second_run_scores_nothing_and_writes_the_same_bytes(tokenizer, tmp_path):
    first, second = HashGuard(), HashGuard()
    one = scored(conversations(), tokenizer, first)
    two = scored(conversations(), tokenizer, second)
    assert len(first.asked) == 40
    assert second.asked == []
    assert saved_bytes(one, tmp_path / "one") == saved_bytes(two, tmp_path / "two")


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
    monkeypatch.setattr(
        AutoModelForCausalLM, "from_pretrained", lambda *_, **__: pytest.fail("weights were loaded")
    )
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
def test_a_guard_is_loaded_again_only_for_other_scores(tokenizer, tmp_path, changes, asked_again):
    options = {"guard": "test-words", "chunk_size": 5, "score_cache_dir": tmp_path / "cache"}
    data = Dataset.from_list([SIMPLE])
    scored(data, tokenizer, **options)
    if "score_cache_dir" in changes:
        changes = {"score_cache_dir": tmp_path / changes["score_cache_dir"]}
    before = WordGuard.loads
    scored(data, tokenizer, **{**options, **changes})
    assert (WordGuard.loads > before) == asked_again


def test_only_new_rows_are_scored(tokenizer):
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


def test_only_guards_loaded_by_name_are_closed(tokenizer, monkeypatch):
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


# Interrupted runs, concurrent runs, damaged caches


class Stop(BaseException):
    pass


def stop():
    raise Stop


def test_an_interrupted_run_resumes_after_its_last_batch(tokenizer, tmp_path):
    whole = scored(conversations(), tokenizer, BatchGuard(), score_cache_dir=tmp_path / "whole")
    first, second = BatchGuard(fail_at=6, action=stop), BatchGuard()
    with pytest.raises(Stop):
        scored(conversations(), tokenizer, first, score_cache_dir=tmp_path / "cut")
    found = scored(conversations(), tokenizer, second, score_cache_dir=tmp_path / "cut")
    assert len(first.batches) == 6
    assert len(second.batches) == 14 - 6
    assert saved_bytes(found, tmp_path / "a") == saved_bytes(whole, tmp_path / "b")


def test_a_missing_score_is_computed_with_its_whole_batch(tokenizer, tmp_path):
    """The last bits depend on the batch: if one of three is missing, all three are scored."""
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
    """Score conversations in a process, which dies at batch `fail_at`."""
    cache._FLUSH_SECONDS = 0.0
    guard = BatchGuard(fail_at, lambda: os._exit(7), delay)
    if start is not None:
        start.wait()
    scored(conversations(), tokenizer, guard, score_cache_dir=folder).save_to_disk(out)
    (out / "batches").write_text(str(len(guard.batches)))


def run_together(*processes):
    """Run processes at the same time; return their exit codes."""
    for process in processes:
        process.start()
    for process in processes:
        process.join(600)
    return [process.exitcode for process in processes]


def arrow_files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.arrow")}


def test_two_processes_resume_a_killed_run_and_score_each_batch_once(tokenizer, tmp_path):
    """A run is killed after 4 batches; then two runs continue, and share the remaining ones."""
    whole = scored(conversations(), tokenizer, BatchGuard(), score_cache_dir=tmp_path / "whole")
    cache = tmp_path / "cache"
    killed = FORKS.Process(
        target=score_in_a_process, args=(tokenizer, cache, tmp_path / "killed", 4, 0.0)
    )
    assert run_together(killed) == [7]
    assert not (tmp_path / "killed").exists()
    start = FORKS.Barrier(2)
    two = [
        FORKS.Process(
            target=score_in_a_process, args=(tokenizer, cache, tmp_path / name, None, 0.05, start)
        )
        for name in "ab"
    ]
    assert run_together(*two) == [0, 0]
    asked = [int((tmp_path / name / "batches").read_text()) for name in "ab"]
    assert sorted(asked) == [0, 14 - 4]
    whole.save_to_disk(tmp_path / "saved")
    assert (
        arrow_files(tmp_path / "a")
        == arrow_files(tmp_path / "b")
        == arrow_files(tmp_path / "saved")
    )
    assert provenance_of(load_from_disk(tmp_path / "a")) == provenance_of(whole)


def score_a_part(tokenizer, folder, first, out, start):
    """Score nine of 24 conversations; write the scores to a file."""
    cache._FLUSH_SECONDS = 0.0
    rows = conversations(24).select(range(first, first + 9))
    start.wait()
    found = scored(rows, tokenizer, HashGuard(), score_cache_dir=folder)
    out.write_text(json.dumps(list(found["star_scores"])))


def test_sixteen_processes_share_one_cache(tokenizer, tmp_path):
    """Each scores nine of 24 rows; most of them are scored by other processes, too."""
    start, outs = FORKS.Barrier(16), [tmp_path / f"{i}.json" for i in range(16)]
    processes = [
        FORKS.Process(target=score_a_part, args=(tokenizer, tmp_path / "cache", i, outs[i], start))
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
    assert left == {".shard", ".json", ""}  # no damaged or temporary file; "" is the lock


def test_a_full_disk_loses_only_unwritten_scores(tokenizer, tmp_path, monkeypatch):
    whole = scored(conversations(), tokenizer, BatchGuard(), score_cache_dir=tmp_path / "whole")
    monkeypatch.setattr(cache, "_FLUSH_SECONDS", -1.0)
    write, written = cache.ScoreCache._write, []

    def write_until_full(self, name, data):
        written.append(name)
        if len(written) > 4:  # namespace.json and three batches
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(self, name, data)

    with monkeypatch.context() as patched:
        patched.setattr(cache.ScoreCache, "_write", write_until_full)
        with pytest.raises(CacheError, match=r"No space left.*start the same command again"):
            scored(conversations(), tokenizer, BatchGuard(), score_cache_dir=tmp_path / "full")
    resumed = BatchGuard()
    found = scored(conversations(), tokenizer, resumed, score_cache_dir=tmp_path / "full")
    assert len(resumed.batches) == 14 - 3
    assert saved_bytes(found, tmp_path / "a") == saved_bytes(whole, tmp_path / "b")


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
    assert saved_bytes(again, tmp_path / "a") == saved_bytes(first, tmp_path / "b")


@pytest.mark.parametrize("entry", [(), (0.5,) * 99, (float("inf"),), (-1.0,)])
def test_an_invalid_entry_of_the_cache_is_computed_again(tmp_path, tokenizer, caplog, entry):
    """A valid checksum does not show that the entry is a valid answer."""
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
