"""Small score caches, and a record of the warnings that a cache logs."""

import logging
import multiprocessing
import random
import struct
from pathlib import Path

from hypothesis import strategies as st

from star_dss_plugin.data.cache import ScoreCache
from star_dss_plugin.data.requests import Trajectory

NAMESPACE = {"guard": "g", "template": {"hash": "abc", "version": 1}}
SPAWN = multiprocessing.get_context("spawn")
ENTRY = Trajectory((0.25, 0.5), (0.75, 1.0))
floats = st.lists(st.floats(allow_nan=False), max_size=5).map(tuple)
trajectories = st.builds(Trajectory, floats, st.none() | floats)


def bits(entry: Trajectory | None) -> tuple[bytes, bytes | None] | None:
    """Return the bytes of an entry's numbers, which tell 0.0 from -0.0."""

    def pack(values: tuple[float, ...]) -> bytes:
        return struct.pack(f"{len(values)}d", *values)

    if entry is None:
        return None
    return pack(entry.scores), None if entry.label_mass is None else pack(entry.label_mass)


def shards(cache: ScoreCache) -> list[Path]:
    return sorted(cache.folder.glob("*.shard"))


def filled(root: Path, entries: dict[str, Trajectory]) -> ScoreCache:
    """Return a cache that has written these entries to a shard."""
    cache = ScoreCache(root, NAMESPACE)
    for key, entry in entries.items():
        cache.put(key, entry)
    cache.flush()
    return cache


class Log(logging.Handler):
    """Record the cache's warnings; unlike caplog, also in a hypothesis example or a child."""

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


def numbered(writer: int, i: int, size: int = 3) -> Trajectory:
    """Return the i-th entry of a writer, with numbers of its own."""
    return Trajectory(tuple(random.Random(f"{writer} {i}").random() for _ in range(size)))
