"""A cache folder that others write to: what is in it is skipped, and nothing outside is touched."""

import logging
import os
import socket

import pytest

from star_dss_plugin.data import cache as cache_module
from star_dss_plugin.data.cache import ScoreCache
from star_dss_plugin.data.requests import Trajectory
from star_dss_plugin.errors import CacheError

ANSWER = Trajectory((0.5,))
NAMESPACE = {"guard": "g"}


def written(root, key="mine"):
    cache = ScoreCache(root, NAMESPACE)
    cache.put(key, ANSWER)
    cache.flush()
    return cache


def make(kind, path, outside):
    """Put something that is no shard in the place of one."""
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
    path = tmp_path / "outside"
    path.write_text("of another program")
    return path


@pytest.fixture
def root(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path / "cache"


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_no_shard_is_skipped_in_words(root, outside, caplog, kind):
    folder = written(root).folder
    make(kind, folder / f"{'9' * 20}-x.shard", outside)
    cache = ScoreCache(root, NAMESPACE)
    with cache.lock():
        assert cache.get("mine") == ANSWER
        cache.put("more", ANSWER)
        cache.flush()
    assert ScoreCache(root, NAMESPACE).get("more") == ANSWER
    assert f"{'9' * 20}-x.shard" in caplog.text
    assert outside.read_text() == "of another program"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("part", ["", "eval"])
def test_locks_that_are_no_files_are_set_aside(root, outside, caplog, kind, part):
    folder = written(root).folder
    make(kind, folder / f"lock{part}", outside)
    cache = ScoreCache(root, NAMESPACE)
    with cache.lock(part):
        assert cache.get("mine") == ANSWER
    assert outside.read_text() == "of another program"
    assert ("and not a file" in caplog.text) == (kind != "huge")


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_else_in_the_folder_matters(root, outside, kind):
    folder = written(root).folder
    (folder / "namespace.json").unlink()
    for name in ("namespace.json", "x.tmp", ".x.tmp", "x.damaged"):
        make(kind, folder / name, outside)
    cache = written(root, "more")
    assert ScoreCache(root, NAMESPACE).get("more") == ANSWER
    assert cache.get("more") == ANSWER
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
    cache.put("mine", ANSWER)
    for use in (cache.flush, cache.refresh, lambda: cache.lock().__enter__()):
        with pytest.raises(CacheError, match="it is a link; remove it"):
            use()
    assert [path.name for path in other.iterdir()] == ["draft.tmp"]


def test_links_among_leftovers_are_not_followed(root, tmp_path):
    folder = written(root).folder
    young = folder / "young.tmp"
    young.symlink_to(tmp_path)
    os.utime(tmp_path, (0, 0))
    written(root, "more")
    assert young.is_symlink()


@pytest.mark.parametrize("kind", ["junk", "pipe", "link", "format"])
def test_names_of_files_are_shown_on_one_line(root, outside, caplog, kind):
    caplog.set_level(logging.DEBUG)
    folder = written(root).folder
    path = folder / "0\x1b[2J\x1b]0;owned\x07\nFAKE LOG LINE\u202e\udcff.shard"
    if kind in ("junk", "format"):
        path.write_bytes(b"junk" if kind == "junk" else b"star-dss-cache 99 x")
    else:
        make(kind, path, outside)
    ScoreCache(root, NAMESPACE).refresh()
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 1
    assert "FAKE LOG LINE" in said[0]
    assert not set(said[0]) & set("\x1b\x07\n\u202e\udcff")


def test_a_shard_may_be_as_large_as_is_ever_written(root, monkeypatch):
    folder = written(root).folder
    size = next(folder.glob("*.shard")).stat().st_size
    for most, found in ((size, ANSWER), (size - 1, None)):
        monkeypatch.setattr(cache_module, "_MAX_SHARD_BYTES", most)
        assert ScoreCache(root, NAMESPACE).get("mine") == found
