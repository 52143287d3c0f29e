"""The score cache returns exact values, and the same value to all readers."""

import json
import struct
import tempfile
import time
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from support.caches import ENTRY, NAMESPACE, bits, filled, shards, trajectories

from star_dss_plugin.data.cache import ScoreCache, default_cache_dir
from star_dss_plugin.data.fingerprints import content_key
from star_dss_plugin.data.requests import Trajectory
from star_dss_plugin.errors import CacheError


@settings(max_examples=60, deadline=None)
@given(st.dictionaries(st.text(), trajectories, max_size=6))
@example({"\ud800 é 🛡\n\x00": ENTRY, "": Trajectory((), ())})
@example({"edge": Trajectory((-0.0, 5e-324, 1 / 3, float("-inf")), None)})
def test_entries_come_back_bit_for_bit(entries):
    with tempfile.TemporaryDirectory() as root:
        writer = filled(Path(root), entries)
        reader = ScoreCache(Path(root), NAMESPACE)
        for cache in (writer, reader):
            assert {key: bits(cache.get(key)) for key in entries} == {
                key: bits(entry) for key, entry in entries.items()
            }
            assert cache.get("a missing key") is None


def test_entries_can_be_read_before_they_are_flushed(tmp_path):
    cache = ScoreCache(tmp_path, NAMESPACE)
    cache.put("a", ENTRY)
    assert cache.get("a") == ENTRY
    assert not shards(cache)


def test_flushing_no_entries_writes_no_file(tmp_path):
    cache = filled(tmp_path, {})
    assert not cache.folder.exists()
    cache.put("a", ENTRY)
    cache.flush()
    cache.flush()
    assert len(shards(cache)) == 1


def test_all_readers_get_the_latest_value(tmp_path):
    first, second, third = (Trajectory((x,)) for x in (0.1, 0.2, 0.3))
    early, late = ScoreCache(tmp_path, NAMESPACE), ScoreCache(tmp_path, NAMESPACE)
    early.put("a", first)
    early.put("a", second)
    early.flush()
    assert early.get("a") == second
    late.put("a", third)
    late.flush()
    early.refresh()
    late.refresh()
    fresh = ScoreCache(tmp_path, NAMESPACE)
    assert [cache.get("a") for cache in (early, late, fresh)] == [third] * 3


def test_a_new_value_replaces_one_from_a_fast_clock(tmp_path, monkeypatch):
    with monkeypatch.context() as ahead:
        ahead.setattr(time, "time_ns", lambda: 10**19)
        filled(tmp_path, {"a": Trajectory((0.1,))})
    here = ScoreCache(tmp_path, NAMESPACE)
    assert here.get("a") != ENTRY
    here.put("a", ENTRY)
    here.flush()
    assert here.get("a") == ScoreCache(tmp_path, NAMESPACE).get("a") == ENTRY


def test_a_new_value_counts_after_the_clock_is_set_back(tmp_path, monkeypatch):
    cache = filled(tmp_path, {"a": Trajectory((0.1,))})
    monkeypatch.setattr(time, "time_ns", lambda: 1)
    cache.put("a", ENTRY)
    cache.flush()
    assert cache.get("a") == ENTRY
    assert ScoreCache(tmp_path, NAMESPACE).get("a") == ENTRY


def test_entries_written_at_the_same_time_are_all_read(tmp_path, monkeypatch):
    monkeypatch.setattr(time, "time_ns", lambda: 1)
    filled(tmp_path, {"a": ENTRY})
    filled(tmp_path, {"b": ENTRY})
    fresh = ScoreCache(tmp_path, NAMESPACE)
    assert (fresh.get("a"), fresh.get("b")) == (ENTRY, ENTRY)


def test_refresh_reads_entries_of_other_writers(tmp_path):
    reader = ScoreCache(tmp_path, NAMESPACE)
    assert reader.get("a") is None
    filled(tmp_path, {"a": ENTRY})
    assert reader.get("a") is None
    reader.refresh()
    assert reader.get("a") == ENTRY


@pytest.mark.parametrize(
    "entry", [Trajectory((0.1, float("nan"))), Trajectory((0.1,), (float("nan"),))]
)
def test_nan_is_refused(tmp_path, entry):
    cache = ScoreCache(tmp_path, NAMESPACE)
    with pytest.raises(CacheError, match="NaN under key 'a'"):
        cache.put("a", entry)
    assert cache.get("a") is None


def test_shards_of_earlier_releases_can_be_read(tmp_path):
    folder = tmp_path / "b12011f68912d6bf"
    folder.mkdir()
    (folder / "0-0.shard").write_bytes(
        b"star-dss-cache 1 11244c6a0d56e04bd809fd0083ff7fee41143d38831e0f8487fc6f9cec2a072c\n"
        b'[["a", 1, 1], ["b", 1, null]]\n' + struct.pack("<3d", 0.25, 0.75, -1.5)
    )
    cache = ScoreCache(tmp_path, NAMESPACE)
    assert cache.get("a") == Trajectory((0.25,), (0.75,))
    assert cache.get("b") == Trajectory((-1.5,), None)


# Namespaces, keys and folders


def test_namespaces_are_separate(tmp_path):
    mine = filled(tmp_path, {"a": ENTRY})
    other = ScoreCache(tmp_path, {**NAMESPACE, "guard": "h"})
    assert other.get("a") is None
    assert other.folder != mine.folder


def test_a_namespace_does_not_depend_on_the_order_of_its_keys(tmp_path):
    turned = {"template": {"version": 1, "hash": "abc"}, "guard": "g"}
    assert list(turned) != list(NAMESPACE)
    cache = filled(tmp_path, {"a": ENTRY})
    assert ScoreCache(tmp_path, turned).get("a") == ENTRY
    assert json.loads((cache.folder / "namespace.json").read_text("utf-8")) == turned


def test_content_keys_are_stable_and_distinct():
    assert content_key({"a": 1, "b": [2.5, None]}) == content_key({"b": (2.5, None), "a": 1})
    different = [("a", "b"), ("ab",), (["a", "b"],), ("b", "a"), (1,), (1.0,), (True,), ("1",), ()]
    assert len({content_key(*parts) for parts in different}) == len(different)
    # A changed key would recompute everything that users have cached.
    assert content_key("é", 1, [0.1]) == (
        "f84ece1fc6f1e4eac730114fb125134200e33ed03946af8a305ee53a8b6e313f"
    )
    for value in (float("nan"), float("inf"), {1, 2}, b"bytes", object()):
        with pytest.raises((TypeError, ValueError)):
            content_key(value)


def test_the_default_folder_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("STAR_DSS_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert default_cache_dir() == tmp_path / ".cache" / "star_dss"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert default_cache_dir() == tmp_path / ".cache" / "star_dss"
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert default_cache_dir() == Path("/xdg/star_dss")
    monkeypatch.setenv("STAR_DSS_CACHE", "")
    assert default_cache_dir() == Path("/xdg/star_dss")
    monkeypatch.setenv("STAR_DSS_CACHE", "~/scores")
    assert default_cache_dir() == tmp_path / "scores"
