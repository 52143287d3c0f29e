"""Convert files of rows to Arrow, in the folder where `datasets` keeps copies of what it reads.

A copy is named by the contents it was made from, and mapped into memory. Files are opened by their
names: nothing in a name or in a file is a pattern, a path or an address. A file that holds much
more than its size is refused before it is expanded: rows that repeat compress a thousand times and
more, and a few kB can fill any memory.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import datasets
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from datasets import Dataset, DatasetInfo, Features, Split
from datasets.arrow_writer import ArrowWriter
from datasets.table import MemoryMappedTable, table_cast
from filelock import FileLock

from star_dss_plugin.data.files.json_lines import JsonRow, json_rows
from star_dss_plugin.data.files.json_types import features_of, stored, types_of
from star_dss_plugin.data.media import check_features
from star_dss_plugin.data.writing import atomic_file
from star_dss_plugin.errors import ConfigError, DataError

__all__ = ["MAX_EXPANSION", "json_dataset", "parquet_dataset", "parquet_tables"]

MAX_EXPANSION = "STAR_DSS_MAX_EXPANSION"
"""Environment variable: how many times its size a file may hold, at least 1; default 200."""
_EXPANSION = 200.0
_ALWAYS = 64 << 20
"""Bytes that a file of any size may hold."""
_FORMAT = b"star-dss-copy 1\n"  # counts up when the same file would be converted differently
_BATCH_ROWS = 1000
_BATCH_BYTES = 64 << 20
"""What a batch of rows may take in memory, unless a single row takes more."""


def json_dataset(paths: Sequence[Path]) -> Dataset:
    """Return the rows of JSON files; each column has the type that keeps its values as written.

    Raises:
        DataError: It cannot be read; the message says at which row, line and field.
        OSError: The file cannot be opened, or its copy not be written.
    """

    def write(file: BinaryIO) -> None:
        types = types_of(_rows(paths))
        if not types:
            raise DataError("its rows have no fields. Give objects with named fields.").at(
                file=str(paths[0])
            )
        room, features = _Room(paths), features_of(types)
        with ArrowWriter(features=features, stream=file, writer_batch_size=_BATCH_ROWS) as writer:
            for row in _rows(paths):
                writer.write(stored(row, types))
                room.check(file.tell())
            writer.finalize(close_stream=False)

    return _copy(paths, write)


def _rows(paths: Sequence[Path]) -> Iterator[JsonRow]:
    """Return the rows of JSON files; errors say in which file they are."""
    for path in paths:
        try:
            yield from json_rows(path)
        except DataError as error:
            error.at(file=str(path))
            raise


def parquet_dataset(paths: Sequence[Path]) -> Dataset:
    """Return the rows of parquet files of one schema, one file after the other.

    Raises:
        DataError: A column holds media, whose values name files, or a file holds too much.
        OSError: A file cannot be opened, or their copy not be written.
        pyarrow.ArrowException: A file is damaged.
    """

    def write(file: BinaryIO) -> None:
        tables = parquet_tables(paths)
        first = next(tables)
        with pa.ipc.new_stream(file, first.schema) as writer:
            writer.write_table(first)
            for table in tables:
                writer.write_table(table)

    return _copy(paths, write)


def parquet_tables(paths: Sequence[Path]) -> Iterator[pa.Table]:
    """Return the rows of parquet files in tables of bounded size; the first one may have no rows.

    Raises:
        As `parquet_dataset`.
    """
    features: Features | None = None
    for path in paths:
        with path.open("rb") as file:
            parquet = pq.ParquetFile(file)
            if features is None:
                features = Features.from_arrow_schema(parquet.schema_arrow)
                check_features(features, str(path))
                yield features.arrow_schema.empty_table()
            rows = _measured(path, parquet)
            for batch in parquet.iter_batches(batch_size=rows):
                yield table_cast(pa.Table.from_batches([batch]), features.arrow_schema)


def _measured(path: Path, parquet: pq.ParquetFile) -> int:
    """Check what a parquet file holds before it is expanded.

    Texts are read as numbers of a dictionary, as files store them, so that a text which is in a
    million rows is in memory once.

    Returns:
        How many rows fit into a batch.

    Raises:
        DataError: It holds too much.
    """
    room = _Room([path])
    metadata = parquet.metadata
    texts, fixed = set(), 0
    for group in range(metadata.num_row_groups):
        for i in range(metadata.num_columns):
            column = metadata.row_group(group).column(i)
            if column.physical_type == "BYTE_ARRAY":
                texts.add(column.path_in_schema)
                width = 4  # of a missing text too: one row may be a list of any number of them
            else:
                width = max(8, metadata.schema.column(i).length or 0)
            fixed += max(0, column.num_values) * width
    room.check(fixed)
    largest = 0
    with path.open("rb") as file:
        measured = pq.ParquetFile(file, read_dictionary=sorted(texts))
        for group in range(metadata.num_row_groups):  # each has dictionaries of its own
            for batch in measured.iter_batches(batch_size=_BATCH_ROWS, row_groups=[group]):
                size = sum(_plain_bytes(column) for column in batch.columns)
                largest = max(largest, size)
                room.add(size)
    return max(1, min(_BATCH_ROWS, _BATCH_ROWS * _BATCH_BYTES // max(1, largest)))


def _plain_bytes(array: pa.Array) -> int:
    """Return how many bytes an array takes with each text written out."""
    kind = array.type
    if pa.types.is_dictionary(kind):
        lengths = pc.binary_length(array.dictionary)
        total = pc.sum(pc.take(lengths, array.indices)).as_py() or 0
        return int(total) + 4 * len(array)
    if pa.types.is_struct(kind):
        return sum(_plain_bytes(field) for field in array.flatten())
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        return 8 * len(array) + _plain_bytes(array.flatten())
    return int(array.nbytes)


class _Room:
    """Count what files hold, up to what they may."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self._name = str(paths[0]) if len(paths) == 1 else str(paths[0].parent)
        self._size = sum(path.stat().st_size for path in paths)
        self._most = max(_ALWAYS, int(_expansion() * self._size))
        self._held = 0

    def add(self, held: int) -> None:
        """Count bytes; raise a DataError if that makes too many."""
        self._held += held
        self.check(self._held)

    def check(self, held: int) -> None:
        """Raise a DataError if so many bytes are too many."""
        if held > self._most:
            raise DataError(
                f"it has {self._size:,} bytes and holds more than {self._most:,}, as if made to "
                "fill the memory. If you trust it, set the environment variable "
                f"{MAX_EXPANSION} to more than {_expansion():g}, the number of times its size that "
                "a file may hold."
            ).at(file=self._name)


def _expansion() -> float:
    given = os.environ.get(MAX_EXPANSION, "").strip()
    try:
        found = float(given) if given else _EXPANSION
    except ValueError:
        found = math.nan
    if not 1 <= found < math.inf:
        raise ConfigError(
            f"The environment variable {MAX_EXPANSION} is {given!r}; it must be a number of at "
            "least 1: how many times its size a file may hold."
        )
    return found


def _copy(paths: Sequence[Path], write: Any) -> Dataset:
    """Return the data set that `write` makes of files, from the copy that is kept if there is one.

    Its fingerprint depends on the files' contents alone, never on their names or times.
    """
    digest = hashlib.sha256(_FORMAT + paths[0].suffix.encode())
    for path in paths:
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    name = digest.hexdigest()
    copy = Path(datasets.config.HF_DATASETS_CACHE) / "star_dss" / f"{name}.arrow"
    if not copy.is_file():
        copy.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(copy.with_suffix(".lock")):
            if not copy.is_file():
                with atomic_file(copy) as file:
                    write(file)
    table = MemoryMappedTable.from_file(str(copy))
    info = DatasetInfo(features=Features.from_arrow_schema(table.schema))
    return Dataset(table, info=info, split=Split.TRAIN, fingerprint=name[:16])
