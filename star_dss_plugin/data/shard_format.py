"""Read and write the shards of a score cache.

A shard is one line `star-dss-cache 1 <sha256 of the rest>`, one line with a JSON list of
[key, number of scores, number of label masses or null], and the entries as little-endian float64.
The 1 is the format's number.
"""

from __future__ import annotations

import hashlib
import json
import re
import struct
from collections.abc import Mapping
from typing import NamedTuple

from star_dss_plugin.data.requests import Trajectory

__all__ = ["MAGIC", "Packed", "checked_body", "encode", "entries", "header", "other_format"]

MAGIC = b"star-dss-cache 1 "
_ANY_FORMAT = re.compile(rb"star-dss-cache (\d+) ")


class Packed(NamedTuple):
    """Locate one entry's floats in the bytes of its shard: its scores, then its label masses.

    Attributes:
        shard: The shard's name.
        data: The shard's body.
        offset: Where the entry's floats begin in `data`, in bytes.
        scores: The number of scores.
        masses: The number of label masses; None if the guard has no label words.
    """

    shard: str
    data: bytes
    offset: int
    scores: int
    masses: int | None

    def unpack(self) -> Trajectory:
        floats = struct.unpack_from(f"<{self.scores + (self.masses or 0)}d", self.data, self.offset)
        masses = None if self.masses is None else floats[self.scores :]
        return Trajectory(floats[: self.scores], masses)


def header(body: bytes) -> bytes:
    """Return the first line of a shard with this body."""
    return MAGIC + hashlib.sha256(body).hexdigest().encode() + b"\n"


def encode(entries: Mapping[str, Packed]) -> bytes:
    """Return the body of a shard."""
    index = [[key, packed.scores, packed.masses] for key, packed in entries.items()]
    return json.dumps(index).encode("ascii") + b"\n" + b"".join(p.data for p in entries.values())


def other_format(data: bytes) -> int | None:
    """Return a shard's format number if it is not this version's, even if the shard is damaged."""
    found = None if data.startswith(MAGIC) else _ANY_FORMAT.match(data)
    return found and int(found[1])


def checked_body(data: bytes) -> bytes:
    """Return the body of a shard after verifying its checksum.

    Raises:
        ValueError: The checksum differs, or the data is not a shard.
    """
    head, newline, body = data.partition(b"\n")
    if not data.startswith(MAGIC):
        raise ValueError("not a cache file" if data else "empty file")
    if head + newline != header(body):
        raise ValueError("truncated or damaged (its checksum differs)")
    return body


def entries(shard: str, body: bytes) -> list[tuple[str, Packed]]:
    """Parse the body of a shard, which may come from any writer despite its valid checksum.

    Raises:
        ValueError: The index is malformed, or does not match the body's length.
    """
    found: list[tuple[str, Packed]] = []
    try:
        offset = body.index(b"\n") + 1
        for key, scores, masses in json.loads(body[:offset]):
            counts = (scores, 0 if masses is None else masses)
            if not isinstance(key, str) or not all(type(n) is int and n >= 0 for n in counts):
                raise ValueError(f"its index has the entry {[key, scores, masses]!r:.200}")
            found.append((key, Packed(shard, body, offset, scores, masses)))
            offset += 8 * sum(counts)
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"not as this version writes it ({error})") from error
    if offset != len(body):
        raise ValueError(f"not as this version writes it ({len(body)} bytes instead of {offset})")
    return found
