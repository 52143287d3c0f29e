"""The score cache: exact, crash-safe, shared by many processes, and never silently wrong."""

import hashlib
import json
import logging
import multiprocessing
import os
import random
import resource
import signal
import struct
import tempfile
import time
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from star_dss_plugin.data import cache as cache_module
from star_dss_plugin.data.cache import ScoreCache, default_cache_dir
from star_dss_plugin.data.fingerprints import content_key
from star_dss_plugin.data.requests import Trajectory
from star_dss_plugin.errors import CacheError, StarDSSError

NAMESPACE = {"guard": "g", "template": {"hash": "abc", "version": 1}}
SPAWN = multiprocessing.get_context("spawn")
ENTRY = Trajectory((0.25, 0.5), (0.75, 1.0))

floats = st.lists(st.floats(allow_nan=False), max_size=5).map(tuple)
trajectories = st.builds(Trajectory, floats, st.none() | floats)


def bits(entry: Trajectory | None) -> tuple[bytes, bytes | None] | None:
    def pack(values: tuple[float, ...]) -> bytes:
        return struct.pack(f"{len(values)}d", *values)

    if entry is None:
        return None
    return pack(entry.scores), None if entry.label_mass is None else pack(entry.label_mass)


def shards(cache: ScoreCache) -> list[Path]:
    return sorted(cache.folder.glob("*.shard"))


def filled(root: Path, entries: dict[str, Trajectory]) -> ScoreCache:
    cache = ScoreCache(root, NAMESPACE)
    for key, entry in entries.items():
        cache.put(key, entry)
    cache.flush()
    return cache


# What is put comes back


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
            assert cache.get("a key that nobody put") is None


def test_entries_are_there_before_they_are_flushed(tmp_path):
    cache = ScoreCache(tmp_path, NAMESPACE)
    cache.put("a", ENTRY)
    assert cache.get("a") == ENTRY
    assert not shards(cache)


def test_nothing_to_flush_writes_nothing(tmp_path):
    cache = filled(tmp_path, {})
    assert not cache.folder.exists()
    cache.put("a", ENTRY)
    cache.flush()
    cache.flush()
    assert len(shards(cache)) == 1


def test_of_several_values_the_latest_counts_for_everybody(tmp_path):
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


def test_what_is_put_replaces_what_a_clock_that_is_ahead_left(tmp_path, monkeypatch):
    with monkeypatch.context() as ahead:
        ahead.setattr(time, "time_ns", lambda: 10**19)
        filled(tmp_path, {"a": Trajectory((0.1,))})
    here = ScoreCache(tmp_path, NAMESPACE)
    assert here.get("a") != ENTRY
    here.put("a", ENTRY)
    here.flush()
    assert here.get("a") == ScoreCache(tmp_path, NAMESPACE).get("a") == ENTRY


def test_a_clock_that_is_set_back_does_not_bring_old_values_back(tmp_path, monkeypatch):
    cache = filled(tmp_path, {"a": Trajectory((0.1,))})
    monkeypatch.setattr(time, "time_ns", lambda: 1)
    cache.put("a", ENTRY)
    cache.flush()
    assert cache.get("a") == ENTRY
    assert ScoreCache(tmp_path, NAMESPACE).get("a") == ENTRY


def test_two_writers_at_the_same_tick_of_the_clock_both_count(tmp_path, monkeypatch):
    monkeypatch.setattr(time, "time_ns", lambda: 1)
    filled(tmp_path, {"a": ENTRY})
    filled(tmp_path, {"b": ENTRY})
    fresh = ScoreCache(tmp_path, NAMESPACE)
    assert (fresh.get("a"), fresh.get("b")) == (ENTRY, ENTRY)


def test_refresh_picks_up_what_others_wrote(tmp_path):
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


# Names of things


def test_namespaces_do_not_mix(tmp_path):
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


def test_content_keys():
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


def test_default_folder(monkeypatch, tmp_path):
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


# Damage is found, said once, and repaired by computing again


class Log(logging.Handler):
    """The cache's warnings; unlike caplog usable inside one hypothesis example and in a child."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())

    def __enter__(self) -> list[str]:
        logging.getLogger("star_dss_plugin.data.cache").addHandler(self)
        return self.messages

    def __exit__(self, *error: object) -> None:
        logging.getLogger("star_dss_plugin.data.cache").removeHandler(self)


@st.composite
def damages(draw):
    """A function that damages bytes: one flipped bit, a lost or a doubled end, or other bytes."""

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
def test_any_damage_is_found(damage, entries):
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
        assert path.exists() == ("another version" in warnings[0])  # one bit of its number


def test_every_single_bit_counts(tmp_path):
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
def test_foreign_files_are_set_aside_and_their_entries_computed_again(tmp_path, content, reason):
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
def test_what_has_a_checksum_and_is_no_index_is_set_aside_too(tmp_path, index):
    """A checksum finds damage, and not what another version, or somebody, wrote on purpose."""
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


def test_what_cannot_be_read_is_ignored_but_left_where_it_is(tmp_path):
    cache = filled(tmp_path, {"a": ENTRY})
    folder = cache.folder / "9-folder.shard"
    folder.mkdir()
    with Log() as warnings:
        fresh = ScoreCache(tmp_path, NAMESPACE)
        assert fresh.get("a") == ENTRY
        fresh.refresh()
    assert len(warnings) == 1
    assert folder.exists()


def test_a_file_that_another_process_has_just_set_aside_is_no_news(tmp_path, monkeypatch):
    cache = filled(tmp_path, {"a": ENTRY})
    listed = [*os.listdir(cache.folder), "1-gone.shard"]
    monkeypatch.setattr(os, "listdir", lambda folder: listed)
    with Log() as warnings:
        assert ScoreCache(tmp_path, NAMESPACE).get("a") == ENTRY
    assert not warnings


def test_what_killed_writers_left_behind_is_ignored_and_removed_after_a_day(tmp_path):
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


# Clocks that are wrong


def test_a_wrong_clock_here_does_not_remove_what_others_are_writing(tmp_path, monkeypatch):
    cache = filled(tmp_path, {"a": ENTRY})
    theirs = cache.folder / "x.shard.1.tmp"
    theirs.write_bytes(b"star-dss-cache 1 ")
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + 3 * 24 * 3600)
    monkeypatch.setattr(time, "time_ns", lambda: 10**9 * int(now + 3 * 24 * 3600))
    filled(tmp_path, {"b": ENTRY})
    assert theirs.exists()


@pytest.mark.parametrize("days", [-400_000, -20_000, -2, 2, 400_000])
def test_files_of_another_day_are_read_like_all(tmp_path, days):
    """As a machine with another clock, or a copy without times, leaves them."""
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
def test_writers_whose_clocks_disagree_lose_nothing_and_all_readers_agree(puts):
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


def test_two_versions_share_a_cache_folder_and_leave_each_other_alone(tmp_path, monkeypatch):
    old = filled(tmp_path, {"a": ENTRY})
    newer = Trajectory((0.125,))
    with monkeypatch.context() as patched, Log() as warnings:
        patched.setattr(cache_module, "_MAGIC", b"star-dss-cache 2 ")
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


def test_shards_of_another_format_are_left_alone_and_named_once(tmp_path):
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


# Many processes


def numbered(writer: int, i: int, size: int = 3) -> Trajectory:
    return Trajectory(tuple(random.Random(f"{writer} {i}").random() for _ in range(size)))


def write_many(root: Path, writer: int, flushes: int, ready) -> None:
    cache = ScoreCache(root, NAMESPACE)
    ready.wait()
    for i in range(flushes):
        cache.put(f"{writer} {i}", numbered(writer, i))
        cache.put("shared", ENTRY)
        cache.flush()


def test_processes_that_write_at_once_lose_nothing(tmp_path):
    flushes = 40
    ready = SPAWN.Barrier(3)
    writers = [
        SPAWN.Process(target=write_many, args=(tmp_path, w, flushes, ready)) for w in range(2)
    ]
    for writer in writers:
        writer.start()
    ready.wait(60)
    reader = ScoreCache(tmp_path, NAMESPACE)
    with Log() as warnings:
        while any(writer.is_alive() for writer in writers):
            reader.refresh()
        reader.refresh()
    assert [writer.exitcode for writer in writers] == [0, 0]
    assert not warnings
    assert len(shards(reader)) == 2 * flushes
    for w in range(2):
        for i in range(flushes):
            assert reader.get(f"{w} {i}") == numbered(w, i)
    assert reader.get("shared") == ENTRY


def large(i: int) -> Trajectory:
    """Quick to make and slow to write, so that kills at random hit the writing."""
    return Trajectory((float(i),) * 200_000)


def write_for_ever(root: Path, first: int, progress: Connection) -> None:
    cache = ScoreCache(root, NAMESPACE)
    for i in range(first, 10**9):
        cache.put(str(i), large(i))
        cache.flush()
        progress.send(i)


def test_a_killed_writer_leaves_everything_it_had_flushed_and_nothing_broken(tmp_path):
    done = -1
    for _ in range(8):
        progress, theirs = SPAWN.Pipe(duplex=False)
        writer = SPAWN.Process(target=write_for_ever, args=(tmp_path, done + 1, theirs))
        writer.start()
        theirs.close()
        assert progress.poll(60)
        done = progress.recv()
        time.sleep(random.uniform(0, 0.05))
        writer.kill()
        writer.join()
        while progress.poll():
            try:
                done = progress.recv()
            except EOFError:
                break
        with Log() as warnings:
            survivor = ScoreCache(tmp_path, NAMESPACE)
            for i in range(done + 1):
                assert survivor.get(str(i)) == large(i)
            # The last one may have been moved into place without being reported.
            assert survivor.get(str(done + 1)) in (None, large(done + 1))
        assert not warnings


def die_in(step: str, root: Path) -> None:
    cache = filled(root, {"flushed": ENTRY})
    setattr(os, step, lambda *args: os.kill(os.getpid(), signal.SIGKILL))
    cache.put("pending", ENTRY)
    cache.flush()


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_writer_killed_at_the_worst_moment_breaks_nothing(tmp_path, step):
    writer = SPAWN.Process(target=die_in, args=(step, tmp_path))
    writer.start()
    writer.join()
    assert writer.exitcode == -signal.SIGKILL
    with Log() as warnings:
        survivor = ScoreCache(tmp_path, NAMESPACE)
        assert (survivor.get("flushed"), survivor.get("pending")) == (ENTRY, None)
    assert not warnings
    assert len(list(survivor.folder.glob("*.tmp"))) == 1


def hold_the_lock(root: Path, started: Connection, finish: bool) -> None:
    cache = ScoreCache(root, NAMESPACE)
    with cache.lock():
        started.send(True)
        time.sleep(0.5 if finish else 600)
        cache.put("a", ENTRY)
        cache.flush()


@pytest.mark.parametrize("finish", [True, False], ids=["finished", "killed"])
def test_the_second_process_waits_for_the_first_and_then_has_its_entries(tmp_path, finish):
    started, theirs = SPAWN.Pipe(duplex=False)
    holder = SPAWN.Process(target=hold_the_lock, args=(tmp_path, theirs, finish))
    holder.start()
    assert started.poll(60)
    cache = ScoreCache(tmp_path, NAMESPACE)
    assert cache.get("a") is None
    if not finish:
        holder.kill()
    with Log() as warnings, cache.lock():
        assert cache.get("a") == (ENTRY if finish else None)
    if finish:
        assert "Waiting" in warnings[0]
    holder.join()


def test_the_lock_is_free_again_after_an_error(tmp_path):
    cache = ScoreCache(tmp_path, NAMESPACE)
    with pytest.raises(RuntimeError), cache.lock():
        raise RuntimeError
    with Log() as warnings, ScoreCache(tmp_path, NAMESPACE).lock():
        assert not warnings


# Folders that cannot be written


def in_child(function, *args) -> dict[str, str]:
    """Runs `function(connection, *args)` in another process and returns what it sends."""
    result, theirs = SPAWN.Pipe(duplex=False)
    child = SPAWN.Process(target=function, args=(theirs, *args))
    child.start()
    theirs.close()
    assert result.poll(60)
    answer = result.recv()
    child.join()
    return answer


def error_of(function) -> str:
    try:
        function()
    except StarDSSError as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def use_read_only(answer: Connection, parent: Path) -> None:
    os.chdir(parent)
    if os.geteuid() == 0:  # root may write everywhere
        os.setuid(65534)
    cache = ScoreCache(Path("cache"), NAMESPACE)
    with Log() as warnings:
        read = cache.get("a") == ENTRY
        cache.refresh()
    cache.put("b", ENTRY)
    found = {
        "read": str(read),
        "warnings": "\n".join(warnings),
        "flush": error_of(cache.flush),
        "kept": str(cache.get("b") == ENTRY),
        "lock": error_of(lambda: cache.lock().__enter__()),
        "new": error_of(filled_elsewhere),
    }
    answer.send(found)


def filled_elsewhere() -> None:
    filled(Path("nowhere"), {"a": ENTRY})


def test_a_read_only_folder_can_be_read_and_says_why_it_cannot_be_written(tmp_path):
    cache = filled(tmp_path / "cache", {"a": ENTRY})
    damaged = cache.folder / "9-damaged.shard"
    damaged.write_bytes(b"")
    for folder in (cache.folder, cache.folder.parent, tmp_path):
        folder.chmod(0o555)
    try:
        found = in_child(use_read_only, tmp_path)
    finally:
        for folder in (tmp_path, cache.folder.parent, cache.folder):
            folder.chmod(0o755)
    assert found["read"] == "True"
    assert found["kept"] == "True"
    assert found["warnings"].count("empty file") == 1
    assert damaged.exists()
    for key in ("flush", "lock", "new"):
        assert found[key].startswith("CacheError: Cannot")
        assert "Permission denied" in found[key]
        assert "score_cache_dir" in found[key]
        assert "STAR_DSS_CACHE" in found[key]
    assert str(Path("cache") / cache.folder.name) in found["flush"]


def use_full_disk(answer: Connection, root: Path) -> None:
    cache = filled(root, {"a": ENTRY})
    cache.put("b", numbered(0, 0, size=10_000))
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    full = error_of(cache.flush)
    left = sorted(path.name for path in cache.folder.glob("*.tmp"))
    fresh = ScoreCache(root, NAMESPACE)
    seen = str((fresh.get("a") == ENTRY, fresh.get("b")))
    resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    cache.flush()
    answer.send({"full": full, "left": str(left), "seen": seen})


def test_a_full_disk_is_named_and_costs_nothing_but_the_flush(tmp_path):
    # A limit on the size of files ends a write half-way, as a full disk does.
    found = in_child(use_full_disk, tmp_path)
    assert found["full"].startswith("CacheError: Cannot write to the score cache")
    assert "File too large" in found["full"]
    assert found["left"] == "[]"
    assert found["seen"] == "(True, None)"
    later = ScoreCache(tmp_path, NAMESPACE)
    assert later.get("b") == numbered(0, 0, size=10_000)


def test_a_root_that_is_a_file_is_named(tmp_path):
    root = tmp_path / "file"
    root.write_text("")
    cache = ScoreCache(root, NAMESPACE)
    with pytest.raises(CacheError, match="Cannot read the score cache"):
        cache.get("a")
