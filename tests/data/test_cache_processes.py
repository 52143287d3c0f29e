"""The score cache with several processes: concurrent writes, kills, and the lock."""

import os
import random
import signal
import time
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
from support.caches import ENTRY, NAMESPACE, SPAWN, Log, filled, numbered, shards

from star_dss_plugin.data.cache import ScoreCache
from star_dss_plugin.data.requests import Trajectory

pytestmark = pytest.mark.slow


def write_many(root: Path, writer: int, flushes: int, ready) -> None:
    """Write entries of its own and a shared one, in this number of flushes."""
    cache = ScoreCache(root, NAMESPACE)
    ready.wait()
    for i in range(flushes):
        cache.put(f"{writer} {i}", numbered(writer, i))
        cache.put("shared", ENTRY)
        cache.flush()


def test_concurrent_writers_lose_no_entries(tmp_path):
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
    """Return an entry that takes long to write, so that kills at random hit the writing."""
    return Trajectory((float(i),) * 200_000)


def write_until_killed(root: Path, first: int, progress: Connection) -> None:
    """Write entry after entry and report each number."""
    cache = ScoreCache(root, NAMESPACE)
    for i in range(first, 10**9):
        cache.put(str(i), large(i))
        cache.flush()
        progress.send(i)


def test_a_killed_writer_leaves_all_flushed_entries_and_no_damage(tmp_path):
    done = -1
    for _ in range(8):
        progress, theirs = SPAWN.Pipe(duplex=False)
        writer = SPAWN.Process(target=write_until_killed, args=(tmp_path, done + 1, theirs))
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
    """Die in this function of `os`, which a flush calls."""
    cache = filled(root, {"flushed": ENTRY})
    setattr(os, step, lambda *args: os.kill(os.getpid(), signal.SIGKILL))
    cache.put("pending", ENTRY)
    cache.flush()


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_writer_killed_within_a_flush_leaves_no_damage(tmp_path, step):
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
    """Hold the lock for half a second and write an entry, or hold it until killed."""
    cache = ScoreCache(root, NAMESPACE)
    with cache.lock():
        started.send(True)
        time.sleep(0.5 if finish else 600)
        cache.put("a", ENTRY)
        cache.flush()


@pytest.mark.parametrize("finish", [True, False], ids=["finished", "killed"])
def test_a_second_process_waits_for_the_lock_and_reads_the_entries(tmp_path, finish):
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


def test_the_lock_is_released_after_an_error(tmp_path):
    cache = ScoreCache(tmp_path, NAMESPACE)
    with pytest.raises(RuntimeError), cache.lock():
        raise RuntimeError
    with Log() as warnings, ScoreCache(tmp_path, NAMESPACE).lock():
        assert not warnings
