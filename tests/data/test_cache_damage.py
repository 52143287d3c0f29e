"""The score cache with damage, foreign files and wrong clocks: no score is wrong."""

import hashlib
import os
import struct
import tempfile
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.caches import ENTRY, NAMESPACE, Log, filled, shards, trajectories

from star_dss_plugin.data import cache as cache_module
from star_dss_plugin.data.cache import ScoreCache
from star_dss_plugin.data.requests import Trajectory


@st.composite
def damages(draw):
    """Draw a function that damages bytes: a flipped bit, a lost or repeated end, a lost byte."""

    def damage(data: bytes) -> bytes:
        at = draw(st.integers(0, len(data) - 1))
        match draw(st.sampled_from(["flip", "cut", "append", "hole"])):
            case "flip":
                changed = bytearray(data)
                changed[at] ^= 1 << draw(st.integers(0, 7))
                return bytes(changed)
            case "cut":
                return data[:at]
            case "append":
                return data + data[at:]
            case _:
                return data[:at] + data[at + 1 :]

    return damage


@settings(max_examples=150, deadline=None)
@given(damages(), st.dictionaries(st.text(), trajectories, min_size=1, max_size=3))
def test_damaged_shards_are_detected(damage, entries):
    with tempfile.TemporaryDirectory() as root, Log() as warnings:
        filled(Path(root), {"intact": ENTRY})
        cache = filled(Path(root), entries)
        path = shards(cache)[-1]
        path.write_bytes(damage(path.read_bytes()))
        fresh = ScoreCache(Path(root), NAMESPACE)
        for key in entries.keys() - {"intact"}:
            assert fresh.get(key) is None
        fresh.refresh()
        assert fresh.get("intact") == ENTRY
        assert len(warnings) == 1
        assert str(path) in warnings[0]
        assert path.exists() == ("another version" in warnings[0])  # a flipped bit of the version


def test_every_flipped_bit_is_detected(tmp_path):
    cache = filled(tmp_path, {"key": Trajectory((0.5,))})
    (path,) = shards(cache)
    data = path.read_bytes()
    with Log() as warnings:
        for at in range(8 * len(data)):
            changed = bytearray(data)
            changed[at // 8] ^= 1 << at % 8
            path.write_bytes(changed)
            assert ScoreCache(tmp_path, NAMESPACE).get("key") is None, at
    assert len(warnings) == 8 * len(data)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "empty file"),
        (b"PK\x03\x04 not ours", "not a cache file"),
        (b"star-dss-cache 1 ", "truncated or damaged"),
        (b"star-dss-cache 1 " + b"0" * 64 + b"\n[]\n", "truncated or damaged"),
    ],
)
def test_foreign_files_are_set_aside(tmp_path, content, reason):
    cache = ScoreCache(tmp_path, NAMESPACE)
    cache.folder.mkdir(parents=True)
    path = cache.folder / "00-foreign.shard"
    path.write_bytes(content)
    with Log() as warnings:
        assert cache.get("a") is None
        cache.put("a", ENTRY)
        cache.flush()
        cache.refresh()
        assert ScoreCache(tmp_path, NAMESPACE).get("a") == ENTRY
    assert len(warnings) == 1
    assert str(path) in warnings[0]
    assert reason in warnings[0]
    assert path.with_name("00-foreign.shard.damaged").read_bytes() == content


@pytest.mark.parametrize(
    "index",
    [
        '[["a", 1e3, null]]',
        '[["a", -1, null]]',
        '[["a", true, null]]',
        '[[["a"], 1, null]]',
        '[["a", 1]]',
        '[["a", 2, null]]',
        '[["a", 99999999999999999999, null]]',
        "[]",
        "5",
        '{"a": 1}',
        "[" * 5000,
    ],
    ids=lambda index: index[:30],
)
def test_an_invalid_index_with_a_valid_checksum_is_set_aside(tmp_path, index):
    """A checksum detects damage, but not an index that another program wrote on purpose."""
    body = index.encode() + b"\n" + struct.pack("<d", 0.5)
    cache = filled(tmp_path, {"mine": ENTRY})
    path = cache.folder / "00-foreign.shard"
    head = b"star-dss-cache 1 " + hashlib.sha256(body).hexdigest().encode() + b"\n"
    path.write_bytes(head + body)
    with Log() as warnings:
        fresh = ScoreCache(tmp_path, NAMESPACE)
        assert fresh.get("a") is None
        assert fresh.get("mine") == ENTRY
    assert len(warnings) == 1
    assert "not as this version writes it" in warnings[0]
    assert not path.exists()


def test_a_folder_named_like_a_shard_is_ignored_and_kept(tmp_path):
    cache = filled(tmp_path, {"a": ENTRY})
    folder = cache.folder / "9-folder.shard"
    folder.mkdir()
    with Log() as warnings:
        fresh = ScoreCache(tmp_path, NAMESPACE)
        assert fresh.get("a") == ENTRY
        fresh.refresh()
    assert len(warnings) == 1
    assert folder.exists()


def test_a_shard_that_another_process_just_moved_causes_no_warning(tmp_path, monkeypatch):
    cache = filled(tmp_path, {"a": ENTRY})
    listed = [*os.listdir(cache.folder), "1-gone.shard"]
    monkeypatch.setattr(os, "listdir", lambda folder: listed)
    with Log() as warnings:
        assert ScoreCache(tmp_path, NAMESPACE).get("a") == ENTRY
    assert not warnings


def test_temporary_files_of_killed_writers_are_removed_after_a_day(tmp_path):
    cache = filled(tmp_path, {"a": ENTRY})
    old, young = cache.folder / "x.shard.1.tmp", cache.folder / "x.shard.2.tmp"
    for path in (old, young):
        path.write_bytes(b"star-dss-cache 1 ")
    os.utime(old, (time.time() - 25 * 3600,) * 2)
    with Log() as warnings:
        cache.refresh()
        assert old.exists()
        cache.put("b", ENTRY)
        cache.flush()
        assert ScoreCache(tmp_path, NAMESPACE).get("b") == ENTRY
    assert not warnings
    assert not old.exists()
    assert young.exists()


# Wrong clocks


def test_a_wrong_clock_does_not_remove_new_temporary_files(tmp_path, monkeypatch):
    cache = filled(tmp_path, {"a": ENTRY})
    theirs = cache.folder / "x.shard.1.tmp"
    theirs.write_bytes(b"star-dss-cache 1 ")
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + 3 * 24 * 3600)
    monkeypatch.setattr(time, "time_ns", lambda: 10**9 * int(now + 3 * 24 * 3600))
    filled(tmp_path, {"b": ENTRY})
    assert theirs.exists()


@pytest.mark.parametrize("days", [-400_000, -20_000, -2, 2, 400_000])
def test_files_with_any_modification_time_are_read(tmp_path, days):
    """Such files come from a machine with another clock, or from a copy without times."""
    cache = filled(tmp_path, {"a": ENTRY})
    for path in [*shards(cache), cache.folder / "namespace.json", cache.folder]:
        os.utime(path, (max(time.time() + days * 86400, -(2**31)),) * 2)
    with Log() as warnings:
        filled(tmp_path, {"b": ENTRY})
        fresh = ScoreCache(tmp_path, NAMESPACE)
        assert (fresh.get("a"), fresh.get("b")) == (ENTRY, ENTRY)
        with fresh.lock():
            pass
    assert not warnings


@settings(max_examples=40, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(0, 2), st.sampled_from("abc"), st.integers(-(10**9), 10**20 - 1)),
        max_size=8,
    )
)
def test_readers_agree_on_entries_of_writers_with_different_clocks(puts):
    with tempfile.TemporaryDirectory() as root, pytest.MonkeyPatch.context() as patched:
        writers = [ScoreCache(Path(root), NAMESPACE) for _ in range(3)]
        given: dict[str, set[Trajectory]] = {}
        for i, (writer, key, clock) in enumerate(puts):
            patched.setattr(time, "time_ns", lambda clock=clock: clock)
            entry = Trajectory((float(i),))
            given.setdefault(key, set()).add(entry)
            writers[writer].put(key, entry)
            writers[writer].flush()
        for writer in writers:
            writer.refresh()
        fresh = ScoreCache(Path(root), NAMESPACE)
        for key in "abc":
            assert len({cache.get(key) for cache in [*writers, fresh]}) == 1
            assert fresh.get(key) in given.get(key, {None})


# Other versions of this package


def test_two_versions_share_a_cache_folder(tmp_path, monkeypatch):
    old = filled(tmp_path, {"a": ENTRY})
    newer = Trajectory((0.125,))
    with monkeypatch.context() as patched, Log() as warnings:
        patched.setattr(cache_module.shard_format, "MAGIC", b"star-dss-cache 2 ")
        new = ScoreCache(tmp_path, NAMESPACE)
        assert new.get("a") is None
        new.put("a", newer)
        new.flush()
        assert ScoreCache(tmp_path, NAMESPACE).get("a") == newer
        assert new.folder != old.folder
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with Log() as more:
        fresh = ScoreCache(tmp_path, NAMESPACE)
        assert fresh.get("a") == ENTRY
        fresh.put("b", ENTRY)
        fresh.flush()
    assert not warnings + more
    assert {path: path.read_bytes() for path in before} == before


def test_shards_of_another_format_are_kept_and_named_once(tmp_path):
    cache = filled(tmp_path, {"a": ENTRY})
    others = {
        cache.folder / f"{i:020d}-other.shard": b"star-dss-cache %d whatever comes then" % i
        for i in (2, 3, 17)
    }
    for path, data in others.items():
        path.write_bytes(data)
    with Log() as warnings:
        fresh = ScoreCache(tmp_path, NAMESPACE)
        assert fresh.get("a") == ENTRY
        fresh.refresh()
    assert len(warnings) == 1
    assert "format 2 of another version of star-dss-plugin" in warnings[0]
    assert str(min(others)) in warnings[0]
    assert {path: path.read_bytes() for path in others} == others
