"""Cache the outputs of guards and reference models on disk, as arrays of floats by content hash.

A cache is a folder of immutable *shards*: a writer collects entries in memory, and `flush` moves a
finished file into place. So readers need no lock, a killed writer loses only entries that it had
not flushed, and any number of processes may write.

A shard (`data/shard_format.py`) with a wrong checksum is renamed, and its entries are computed
again. A shard of another format is left alone.

The folder may be writable for others. Pipes, devices, links and oversized files with the names of
shards or locks are skipped with a warning, and never change anything outside the folder.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import struct
import time
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from star_dss_plugin.data import shard_format
from star_dss_plugin.data.files.regular import kind_of, read_regular
from star_dss_plugin.data.fingerprints import content_key
from star_dss_plugin.data.requests import Trajectory
from star_dss_plugin.data.writing import SCRATCH, atomic_file
from star_dss_plugin.errors import CacheError
from star_dss_plugin.visible import visible_line

__all__ = ["ScoreCache", "default_cache_dir"]

logger = logging.getLogger(__name__)

_SHARD = ".shard"
_DAY = 24 * 60 * 60.0
_FLUSH_SECONDS = 20.0
_MAX_SHARD_BYTES = 1 << 30
"""Limit of a shard's size; entries computed between two flushes take far less."""
_DIGITS = 20
"""Digits of the time in nanoseconds with which a shard's name begins."""


def default_cache_dir() -> Path:
    """Return $STAR_DSS_CACHE, else `star_dss` in the user's cache folder.

    That is $XDG_CACHE_HOME, or ~/.cache.
    """
    if chosen := os.environ.get("STAR_DSS_CACHE"):
        return Path(chosen).expanduser()
    xdg = Path(os.environ.get("XDG_CACHE_HOME", ""))
    # The XDG specification says to ignore relative paths.
    return (xdg if xdg.is_absolute() else Path.home() / ".cache") / "star_dss"


class ScoreCache:
    """Store the entries of one namespace below a root folder.

    Entries are returned bit for bit. If a key was put several times, the latest value counts.

    Args:
        root: The cache folder; created by the first `flush`.
        namespace: JSON values on which all entries depend (the guard, its template). Each namespace
            has its own folder, in which `namespace.json` contains these values.
    """

    def __init__(self, root: Path, namespace: Mapping[str, Any]) -> None:
        self.folder = root / content_key(shard_format.MAGIC.decode(), dict(namespace))[:16]
        self._namespace = dict(namespace)
        self._index: dict[str, shard_format.Packed] = {}
        self._pending: dict[str, shard_format.Packed] = {}
        self._seen: set[str] = set()
        self._foreign = False
        self._loaded = False
        self._stamp = 0
        self._waiting_since = 0.0

    def get(self, key: str) -> Trajectory | None:
        """Return an entry that was put here or was on disk at the last `refresh`, or None.

        The first call calls `refresh`.
        """
        if not self._loaded:
            self.refresh()
        found = self._pending.get(key) or self._index.get(key)
        return None if found is None else found.unpack()

    def put(self, key: str, entry: Trajectory) -> None:
        """Add an entry, which `flush` will write.

        Raises:
            CacheError: The entry contains NaN.
        """
        floats = (*entry.scores, *(entry.label_mass or ()))
        if any(math.isnan(x) for x in floats):
            raise CacheError(f"Refused to store NaN under key {key!r}: {entry}.")
        masses = None if entry.label_mass is None else len(entry.label_mass)
        data = struct.pack(f"<{len(floats)}d", *floats)
        if not self._pending:
            self._waiting_since = time.monotonic()
        self._pending[key] = shard_format.Packed("", data, 0, len(entry.scores), masses)

    def flush_if_due(self) -> None:
        """Flush if an entry is older than 20 seconds, to limit what a killed run loses.

        Raises:
            CacheError: As `flush`.
        """
        if self._pending and time.monotonic() - self._waiting_since > _FLUSH_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Write the entries since the last flush atomically, as one shard.

        Raises:
            CacheError: The folder cannot be written. The entries stay pending.
        """
        if not self._pending:
            return
        # Shard names sort by time, so that all processes agree which of two values is the latest.
        # This shard sorts last even if the clocks of other writers are ahead.
        newest = max((int(n[:_DIGITS]) for n in self._seen if n[:_DIGITS].isdecimal()), default=0)
        stamp = max(self._stamp + 1, newest + 1, time.time_ns())
        self._stamp = min(stamp, 10**_DIGITS - 1)
        name = f"{self._stamp:0{_DIGITS}d}-{uuid.uuid4().hex}{_SHARD}"
        body = shard_format.encode(self._pending)
        with self._explained("write to"):
            self._prepare()
            self._tidy(now=self._write(name, shard_format.header(body) + body))
        self._add(name, body)
        self._pending.clear()

    def refresh(self) -> None:
        """Read the shards that other processes have written; warn about each damaged one once.

        Raises:
            CacheError: The folder cannot be listed.
        """
        with self._explained("read"), contextlib.suppress(FileNotFoundError):
            self._check_folder()
            names = {name for name in os.listdir(self.folder) if name.endswith(_SHARD)}
            for name in sorted(names - self._seen):
                self._read(name)
        self._loaded = True

    @contextlib.contextmanager
    def lock(self, part: str = "") -> Iterator[None]:
        """Lock the namespace, so that no two processes compute the same entries.

        Waits for another process that holds the lock, and then reads its entries. A process that
        dies releases its lock.

        Args:
            part: The part of the work; processes with different parts do not exclude each other.

        Raises:
            CacheError: The folder cannot be written.
        """
        with self._explained("lock"):
            self._make_folder()
            path = self.folder / f"lock{part}"
            self._set_aside_if_no_file(path)
            lock = FileLock(path)
            try:
                lock.acquire(blocking=False)
            except Timeout:
                logger.warning("Waiting for the process that is filling %s.", _shown(self.folder))
                lock.acquire()
        try:
            self.refresh()
            yield
        finally:
            lock.release()

    def _make_folder(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self._check_folder()

    def _check_folder(self) -> None:
        """Check that the folder is not a link, which could point anywhere.

        Raises:
            NotADirectoryError: The folder is a link.
        """
        if self.folder.is_symlink():
            raise NotADirectoryError("it is a link; remove it")

    def _set_aside_if_no_file(self, path: Path) -> None:
        """Rename a path that is not a regular file: a link may point anywhere, a pipe blocks."""
        with contextlib.suppress(FileNotFoundError):
            if kind := kind_of(path):
                aside = path.with_name(f"{path.name}.{uuid.uuid4().hex}.damaged")
                logger.warning("Renamed %s: it is %s and not a file.", _shown(path), kind)
                os.replace(path, aside)

    def _prepare(self) -> None:
        """Create the folder with `namespace.json`."""
        self._make_folder()
        if not os.path.lexists(self.folder / "namespace.json"):
            text = json.dumps(self._namespace, indent=2, sort_keys=True, ensure_ascii=False)
            self._write("namespace.json", text.encode())

    def _tidy(self, now: float) -> None:
        """Remove temporary files of killed writers that are older than a day.

        Args:
            now: The file system's time in seconds; the machine's own clock may differ from it.
        """
        for path in self.folder.glob(f"*{SCRATCH}"):
            with contextlib.suppress(OSError):  # another process may be removing it too
                if not kind_of(path) and now - path.lstat().st_mtime > _DAY:
                    path.unlink()

    def _write(self, name: str, data: bytes) -> float:
        """Write a file atomically.

        Returns:
            The file's modification time in seconds.
        """
        with atomic_file(self.folder / name) as file:
            file.write(data)
            file.flush()
            return os.fstat(file.fileno()).st_mtime

    def _read(self, name: str) -> None:
        path = self.folder / name
        try:
            data = read_regular(path, _MAX_SHARD_BYTES)
            if other := shard_format.other_format(data):
                self._seen.add(name)
                if not self._foreign:
                    logger.warning(
                        "Left %s alone, and others like it: it has the format %d of another "
                        "version of star-dss-plugin. Its entries are computed again.",
                        _shown(path),
                        other,
                    )
                self._foreign = True
                return
            self._add(name, shard_format.checked_body(data))
        except FileNotFoundError:
            pass  # another process has set it aside
        except (OSError, ValueError) as error:
            self._seen.add(name)
            logger.warning(
                "Ignored %s: %s. Its entries are computed again.",
                _shown(path),
                visible_line(str(error)),
            )
            # A damaged file is renamed; an unreadable one stays, as does a read-only folder's.
            if isinstance(error, ValueError):
                with contextlib.suppress(OSError):
                    os.replace(path, path.with_name(f"{name}.damaged"))

    def _add(self, name: str, body: bytes) -> None:
        for key, packed in shard_format.entries(name, body):
            known = self._index.get(key)
            if known is None or known.shard < name:
                self._index[key] = packed
        self._seen.add(name)

    @contextlib.contextmanager
    def _explained(self, doing: str) -> Iterator[None]:
        """Turn an error of the file system into one that says what to do."""
        try:
            yield
        except OSError as error:
            raise CacheError(
                f"Cannot {doing} the score cache in {self.folder}: {error}. Free space there or "
                "name a writable folder: the option score_cache_dir, or the environment variable "
                "STAR_DSS_CACHE (with --shard-rows or --ray: another output). Then start the same "
                "command again: what had been written is not computed again."
            ) from error


def _shown(path: Path) -> str:
    """Return a path that is safe to log, although others may have named the file."""
    return visible_line(str(path), 500)
