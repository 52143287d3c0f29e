"""A cache folder with files of other users: they are skipped, nothing outside is changed."""

import logging
import os
import socket

import pytest

from star_dss_plugin.data import cache as cache_module
from star_dss_plugin.data.cache import ScoreCache
from star_dss_plugin.data.requests import Trajectory
from star_dss_plugin.errors import CacheError

ENTRY = Trajectory((0.5,))
NAMESPACE = {"guard": "g"}


def cache_with_entry(root, key="mine"):
    """Return a cache to which an entry was written."""
    cache = ScoreCache(root, NAMESPACE)
    cache.put(key, ENTRY)
    cache.flush()
    return cache


def make_file(kind, path, outside):
    """Make a file of this kind, which is no shard."""
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "link":
        path.symlink_to(outside)
    elif kind == "dangling link":
        path.symlink_to(outside.parent / "not there")
    elif kind == "loop":
        path.symlink_to(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "folder":
        path.mkdir()
        (path / "inner").touch()
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as bound:
            bound.bind(os.path.relpath(path))
    elif kind == "huge":
        with path.open("wb") as file:
            file.truncate(1 << 42)


KINDS = ["pipe", "link", "dangling link", "loop", "device", "folder", "socket", "huge"]


@pytest.fixture
def outside(tmp_path):
    """Return a file of another program."""
    path = tmp_path / "outside"
    path.write_text("of another program")
    return path


@pytest.fixture
def root(tmp_path, monkeypatch):
    """Change to an empty folder; return the place of a cache in it."""
    monkeypatch.chdir(tmp_path)
    return tmp_path / "cache"


@pytest.mark.parametrize("kind", KINDS)
def test_files_that_are_no_shards_are_skipped_with_a_warning(root, outside, caplog, kind):
    folder = cache_with_entry(root).folder
    make_file(kind, folder / f"{'9' * 20}-x.shard", outside)
    cache = ScoreCache(root, NAMESPACE)
    with cache.lock():
        assert cache.get("mine") == ENTRY
        cache.put("more", ENTRY)
        cache.flush()
    assert ScoreCache(root, NAMESPACE).get("more") == ENTRY
    assert f"{'9' * 20}-x.shard" in caplog.text
    assert outside.read_text() == "of another program"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("part", ["", "eval"])
def test_locks_that_are_no_regular_files_are_set_aside(root, outside, caplog, kind, part):
    folder = cache_with_entry(root).folder
    make_file(kind, folder / f"lock{part}", outside)
    cache = ScoreCache(root, NAMESPACE)
    with cache.lock(part):
        assert cache.get("mine") == ENTRY
    assert outside.read_text() == "of another program"
    assert ("and not a file" in caplog.text) == (kind != "huge")


@pytest.mark.parametrize("kind", KINDS)
def test_other_files_in_the_folder_are_ignored(root, outside, kind):
    folder = cache_with_entry(root).folder
    (folder / "namespace.json").unlink()
    for name in ("namespace.json", "x.tmp", ".x.tmp", "x.damaged"):
        make_file(kind, folder / name, outside)
    cache = cache_with_entry(root, "more")
    assert ScoreCache(root, NAMESPACE).get("more") == ENTRY
    assert cache.get("more") == ENTRY
    assert outside.read_text() == "of another program"


def test_a_folder_that_is_a_link_is_refused(root, tmp_path):
    """Old temporary files in another folder would be removed as if they were the cache's."""
    other = tmp_path / "other"
    other.mkdir()
    old = other / "draft.tmp"
    old.touch()
    os.utime(old, (0, 0))
    root.mkdir()
    cache = ScoreCache(root, NAMESPACE)
    cache.folder.symlink_to(other)
    cache.put("mine", ENTRY)
    for use in (cache.flush, cache.refresh, lambda: cache.lock().__enter__()):
        with pytest.raises(CacheError, match="it is a link; remove it"):
            use()
    assert [path.name for path in other.iterdir()] == ["draft.tmp"]


def test_links_among_temporary_files_are_not_followed(root, tmp_path):
    folder = cache_with_entry(root).folder
    link = folder / "young.tmp"
    link.symlink_to(tmp_path)
    os.utime(tmp_path, (0, 0))
    cache_with_entry(root, "more")
    assert link.is_symlink()


@pytest.mark.parametrize("kind", ["junk", "pipe", "link", "format"])
def test_names_of_files_are_shown_on_one_line(root, outside, caplog, kind):
    caplog.set_level(logging.DEBUG)
    folder = cache_with_entry(root).folder
    path = folder / "0\x1b[2J\x1b]0;owned\x07\nFAKE LOG LINE\u202e\udcff.shard"
    if kind in ("junk", "format"):
        path.write_bytes(b"junk" if kind == "junk" else b"star-dss-cache 99 x")
    else:
        make_file(kind, path, outside)
    ScoreCache(root, NAMESPACE).refresh()
    warnings = [record.getMessage() for record in caplog.records]
    assert len(warnings) == 1
    assert "FAKE LOG LINE" in warnings[0]
    assert not set(warnings[0]) & set("\x1b\x07\n\u202e\udcff")


def test_larger_shards_than_are_ever_written_are_not_read(root, monkeypatch):
    folder = cache_with_entry(root).folder
    size = next(folder.glob("*.shard")).stat().st_size
    for most, found in ((size, ENTRY), (size - 1, None)):
        monkeypatch.setattr(cache_module, "_MAX_SHARD_BYTES", most)
        assert ScoreCache(root, NAMESPACE).get("mine") == found
