"""Score caches in folders that cannot be written."""

import os
import resource
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
from support.caches import ENTRY, NAMESPACE, SPAWN, Log, filled, numbered

from star_dss_plugin.data.cache import ScoreCache
from star_dss_plugin.errors import CacheError, StarDSSError


def in_child(function, *args) -> dict[str, str]:
    """Run `function(connection, *args)` in another process and return what it sends."""
    result, theirs = SPAWN.Pipe(duplex=False)
    child = SPAWN.Process(target=function, args=(theirs, *args))
    child.start()
    theirs.close()
    assert result.poll(60)
    answer = result.recv()
    child.join()
    return answer


def error_of(function) -> str:
    """Return the class and the message of the error that a call raises."""
    try:
        function()
    except StarDSSError as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def use_read_only(answer: Connection, parent: Path) -> None:
    """Send what a read-only cache returns and raises, as a user who may not write."""
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


def test_a_read_only_folder_is_read_and_writing_names_the_cause(tmp_path):
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
    """Send what a cache returns and raises while files have at most 4 KiB."""
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


def test_a_full_disk_is_named_and_fails_only_the_flush(tmp_path):
    # A limit on the size of files ends a write half-way, as a full disk does.
    found = in_child(use_full_disk, tmp_path)
    assert found["full"].startswith("CacheError: Cannot write to the score cache")
    assert "File too large" in found["full"]
    assert found["left"] == "[]"
    assert found["seen"] == "(True, None)"
    later = ScoreCache(tmp_path, NAMESPACE)
    assert later.get("b") == numbered(0, 0, size=10_000)


def test_a_file_as_cache_folder_is_refused(tmp_path):
    root = tmp_path / "file"
    root.write_text("")
    cache = ScoreCache(root, NAMESPACE)
    with pytest.raises(CacheError, match="Cannot read the score cache"):
        cache.get("a")
