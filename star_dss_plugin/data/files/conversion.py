"""Convert data files to Arrow files in the cache folder of `datasets`.

A converted file is named by a hash of its sources' contents and mapped into memory. File names and
contents are never used as patterns, paths or addresses. A file that would expand to many times its
size is rejected before it is expanded, because repeated rows compress more than a thousandfold and
a few kB could fill any memory.
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
from star_dss_plugin.data.files.json_types import converted_row, features_of, types_of
from star_dss_plugin.data.media import check_features
from star_dss_plugin.data.writing import atomic_file
from star_dss_plugin.errors import ConfigError, DataError

__all__ = ["MAX_EXPANSION", "json_dataset", "parquet_dataset", "parquet_tables"]

MAX_EXPANSION = "STAR_DSS_MAX_EXPANSION"
"""Environment variable: to how many times its size a file may expand, at least 1; default 200."""
_DEFAULT_EXPANSION = 200.0
_MIN_LIMIT_BYTES = 64 << 20
"""Bytes to which a file of any size may expand."""
_FORMAT = b"star-dss-copy 1\n"  # increase the number when the conversion changes
_BATCH_ROWS = 1000
_BATCH_BYTES = 64 << 20
"""Limit of a batch in memory; exceeded only if a single row is larger."""


def json_dataset(paths: Sequence[Path]) -> Dataset:
    """Return the rows of JSON files; each column has the type that keeps its values as written.

    Raises:
        DataError: A file cannot be read; the error has the row, line and field.
        OSError: A file cannot be opened, or the Arrow file cannot be written.
    """

    def write(file: BinaryIO) -> None:
        types = types_of(_rows(paths))
        if not types:
            raise DataError("its rows have no fields. Give objects with named fields.").at(
                file=str(paths[0])
            )
        expansion, features = _Expansion(paths), features_of(types)
        with ArrowWriter(features=features, stream=file, writer_batch_size=_BATCH_ROWS) as writer:
            for row in _rows(paths):
                writer.write(converted_row(row, types))
                expansion.check(file.tell())
            writer.finalize(close_stream=False)

    return _converted_dataset(paths, write)


def _rows(paths: Sequence[Path]) -> Iterator[JsonRow]:
    """Yield the rows of JSON files; errors name the file."""
    for path in paths:
        try:
            yield from json_rows(path)
        except DataError as error:
            error.at(file=str(path))
            raise


def parquet_dataset(paths: Sequence[Path]) -> Dataset:
    """Return the rows of parquet files with the same schema, in order.

    Raises:
        DataError: A column contains media, whose values name files, or a file expands too much.
        OSError: A file cannot be opened, or the Arrow file cannot be written.
        pyarrow.ArrowException: A file is damaged.
    """

    def write(file: BinaryIO) -> None:
        tables = parquet_tables(paths)
        first = next(tables)
        with pa.ipc.new_stream(file, first.schema) as writer:
            writer.write_table(first)
            for table in tables:
                writer.write_table(table)

    return _converted_dataset(paths, write)


def parquet_tables(paths: Sequence[Path]) -> Iterator[pa.Table]:
    """Yield the rows of parquet files in tables of bounded size, after an empty first table.

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
            rows = _rows_per_batch(path, parquet)
            for batch in parquet.iter_batches(batch_size=rows):
                yield table_cast(pa.Table.from_batches([batch]), features.arrow_schema)


def _rows_per_batch(path: Path, parquet: pq.ParquetFile) -> int:
    """Measure the expanded size of a parquet file without expanding it.

    Strings are read in dictionary encoding, so that a string in a million rows is in memory once.

    Returns:
        How many rows fit into a batch.

    Raises:
        DataError: The file expands too much.
    """
    expansion = _Expansion([path])
    metadata = parquet.metadata
    texts, fixed = set(), 0
    for group in range(metadata.num_row_groups):
        for i in range(metadata.num_columns):
            column = metadata.row_group(group).column(i)
            if column.physical_type == "BYTE_ARRAY":
                texts.add(column.path_in_schema)
                width = 4  # counted for nulls too: one row may be a list of any number of them
            else:
                width = max(8, metadata.schema.column(i).length or 0)
            fixed += max(0, column.num_values) * width
    expansion.check(fixed)
    largest = 0
    with path.open("rb") as file:
        measured = pq.ParquetFile(file, read_dictionary=sorted(texts))
        for group in range(metadata.num_row_groups):  # each has its own dictionaries
            for batch in measured.iter_batches(batch_size=_BATCH_ROWS, row_groups=[group]):
                size = sum(_plain_bytes(column) for column in batch.columns)
                largest = max(largest, size)
                expansion.add(size)
    return max(1, min(_BATCH_ROWS, _BATCH_ROWS * _BATCH_BYTES // max(1, largest)))


def _plain_bytes(array: pa.Array) -> int:
    """Return an array's size in bytes without dictionary encoding."""
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


class _Expansion:
    """Count the expanded bytes of files, up to their limit."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self._name = str(paths[0]) if len(paths) == 1 else str(paths[0].parent)
        self._size = sum(path.stat().st_size for path in paths)
        self._limit = max(_MIN_LIMIT_BYTES, int(_max_expansion() * self._size))
        self._total = 0

    def add(self, size: int) -> None:
        """Add bytes to the count; raise a DataError if it exceeds the limit."""
        self._total += size
        self.check(self._total)

    def check(self, size: int) -> None:
        """Raise a DataError if `size` bytes exceed the limit."""
        if size > self._limit:
            raise DataError(
                f"it has {self._size:,} bytes and holds more than {self._limit:,}, as if made to "
                "fill the memory. If you trust it, set the environment variable "
                f"{MAX_EXPANSION} to more than {_max_expansion():g}, the number of times its size "
                "that a file may hold."
            ).at(file=self._name)


def _max_expansion() -> float:
    given = os.environ.get(MAX_EXPANSION, "").strip()
    try:
        found = float(given) if given else _DEFAULT_EXPANSION
    except ValueError:
        found = math.nan
    if not 1 <= found < math.inf:
        raise ConfigError(
            f"The environment variable {MAX_EXPANSION} is {given!r}; it must be a number of at "
            "least 1: how many times its size a file may hold."
        )
    return found


def _converted_dataset(paths: Sequence[Path], write: Any) -> Dataset:
    """Return the data set that `write` converts files to, from the cached Arrow file if it exists.

    The data set's fingerprint depends only on the files' contents, not on their names or times.
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
