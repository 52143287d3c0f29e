"""Keep on disk what guards and reference models answered: arrays of floats by their contents.

A cache is a folder of *shards* that are written once, whole, and never changed: a writer collects
entries in memory and `flush` moves a finished file into place. So readers need no lock, a killed
writer loses what it had not flushed and nothing else, and any number of processes may write.

A shard (`data/shard_format.py`) that does not match its checksum is set aside, and its entries are
computed again. One of another format is left as it is.

Others may write to the folder. Pipes, devices, links and files of any size that are named like
shards or locks are skipped with a warning, and change nothing outside the folder.
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
"""More than is computed between two flushes."""
_DIGITS = 20
"""Of the time, in nanoseconds, that a shard's name begins with."""


def default_cache_dir() -> Path:
    """Return $STAR_DSS_CACHE, else `star_dss` in the user's cache folder.

    That is $XDG_CACHE_HOME, or ~/.cache.
    """
    if chosen := os.environ.get("STAR_DSS_CACHE"):
        return Path(chosen).expanduser()
    xdg = Path(os.environ.get("XDG_CACHE_HOME", ""))
    # The XDG specification says that relative paths are to be ignored.
    return (xdg if xdg.is_absolute() else Path.home() / ".cache") / "star_dss"


class ScoreCache:
    """Keep the entries of one namespace below one root folder.

    Entries are bit-for-bit what was put. Of several values for one key the latest counts.

    Args:
        root: The cache folder; created by the first `flush`.
        namespace: JSON values that everything in this cache depends on (which guard, which
            template). Other values, other folder; `namespace.json` in it says which.
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

        The first call refreshes.
        """
        if not self._loaded:
            self.refresh()
        found = self._pending.get(key) or self._index.get(key)
        return None if found is None else found.unpack()

    def put(self, key: str, entry: Trajectory) -> None:
        """Remember an entry; `flush` writes it.

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
        """Flush if an entry has waited for 20 seconds, which is what a kill may cost.

        Raises:
            CacheError: As `flush`.
        """
        if self._pending and time.monotonic() - self._waiting_since > _FLUSH_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Write what was put since the last flush, as one shard: all of it or nothing.

        Raises:
            CacheError: The folder cannot be written. The entries stay pending.
        """
        if not self._pending:
            return
        # Shard names sort by time, so that all processes agree which of two values is the latest:
        # ours, whatever the clocks of those whose shards are here already.
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
        """Pick up the shards that other processes have written; warn of damaged ones, once.

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
        """Keep other processes with this namespace out, so that nothing is computed twice.

        Waits if another process is in; afterwards its entries are here. The lock of a process that
        dies is free at once.

        Args:
            part: Only processes that do the same part of the work are kept out.

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
        """Check that the folder is none of other files, which a link could make it.

        Raises:
            NotADirectoryError: It is a link, or no folder.
        """
        if self.folder.is_symlink():
            raise NotADirectoryError("it is a link; remove it")

    def _set_aside_if_no_file(self, path: Path) -> None:
        """Rename what is in the place of a file: a link could name any file, a pipe blocks."""
        with contextlib.suppress(FileNotFoundError):
            if kind := kind_of(path):
                aside = path.with_name(f"{path.name}.{uuid.uuid4().hex}.damaged")
                logger.warning("Renamed %s: it is %s and not a file.", _shown(path), kind)
                os.replace(path, aside)

    def _prepare(self) -> None:
        """Make the folder and say what it is for."""
        self._make_folder()
        if not os.path.lexists(self.folder / "namespace.json"):
            text = json.dumps(self._namespace, indent=2, sort_keys=True, ensure_ascii=False)
            self._write("namespace.json", text.encode())

    def _tidy(self, now: float) -> None:
        """Remove what killed writers left behind a day ago, by the clock of the file system.

        The clock of this machine may be wrong, and the writer of another one at work.
        """
        for path in self.folder.glob(f"*{SCRATCH}"):
            with contextlib.suppress(OSError):  # another process may be removing it too
                if not kind_of(path) and now - path.lstat().st_mtime > _DAY:
                    path.unlink()

    def _write(self, name: str, data: bytes) -> float:
        """Write a file whole or not at all.

        Returns:
            When the file system says it was written, in seconds.
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
                        "Left %s alone, and whatever is like it: it has the format %d of another "
                        "version of star-dss-plugin. What it holds is computed again.",
                        _shown(path),
                        other,
                    )
                self._foreign = True
                return
            self._add(name, shard_format.checked(data))
        except FileNotFoundError:
            pass  # another process has set it aside
        except (OSError, ValueError) as error:
            self._seen.add(name)
            logger.warning(
                "Ignored %s: %s. What it held is computed again.",
                _shown(path),
                visible_line(str(error)),
            )
            # A file that cannot be read here stays; so does every file of a read-only folder.
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
    """Return a path for a log: others may have given the file its name."""
    return visible_line(str(path), 500)
