"""Reading data sets from files, and writing scored ones whole or not at all."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
from datasets import Dataset, DatasetDict, Json, LargeList, List, load_dataset, load_from_disk
from datasets.exceptions import DatasetGenerationError

from star_dss_plugin.data.json_lines import check_json, json_fault
from star_dss_plugin.data.parquet_shards import is_sharded, load_scored
from star_dss_plugin.data.rows import unreadable
from star_dss_plugin.errors import DataError, StarDSSError

__all__ = ["check_readable", "in_file", "is_saved_dataset", "read_dataset"]

_READERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet"}


def is_saved_dataset(path: str | Path) -> bool:
    """Whether a folder was written by `save_to_disk` (as `star-dss score` does)."""
    return any((Path(path) / name).is_file() for name in ("state.json", "dataset_dict.json"))


def read_dataset(source: str, split: str = "train") -> Dataset:
    """A data set from a .jsonl, .json or .parquet file, a saved data set folder, or the hub.

    Raises:
        DataError: It cannot be read; the reason is in the message.
    """
    path = Path(source)
    try:
        found = _load(source, path, split)
        check_readable(found, source)
        return found
    except DataError:
        raise
    except Exception as error:  # readers raise whatever their formats raise
        cause = error.__cause__ or error
        if isinstance(cause, OSError) and not isinstance(cause, FileNotFoundError):
            copies = datasets.config.HF_DATASETS_CACHE
            raise DataError(
                f"{source} cannot be read: {type(cause).__name__}: {cause}. `datasets` keeps a "
                f"copy of what it reads in {copies}: free space there, or set HF_DATASETS_CACHE to "
                f"a folder that can be written. If it is {source} that cannot be read, change that."
            ) from error
        fault = json_fault(path) if _READERS.get(path.suffix) == "json" and path.is_file() else ""
        raise DataError(
            f"{source} cannot be read: {fault or _cause(error)} Give a .jsonl or .parquet file, a "
            "folder written by save_to_disk, or a data set id."
        ) from error


@contextlib.contextmanager
def in_file(source: str) -> Iterator[None]:
    """Add the file or folder to a StarDSSError about a row."""
    try:
        yield
    except StarDSSError as error:
        if error.where.rows:
            error.at(file=source)
        raise


def _load(source: str, path: Path, split: str) -> Dataset:
    if path.is_file():
        if path.suffix not in _READERS:
            raise DataError(
                f"{source} is a {path.suffix or 'nameless'} file. Give a .jsonl, .json or "
                ".parquet file, or a data set folder."
            )
        if _READERS[path.suffix] == "json":
            check_json(path)
        return load_dataset(_READERS[path.suffix], data_files=str(path), split="train")
    if is_sharded(path):
        return load_scored(path)
    if is_saved_dataset(path):
        found = load_from_disk(str(path))
        return found[split] if isinstance(found, DatasetDict) else found
    return load_dataset(source, split=split)


def _cause(error: BaseException) -> str:
    """What a reader stumbled over: `datasets` wraps it in an error that says nothing."""
    while isinstance(error, DatasetGenerationError) and error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {error}."


def check_readable(dataset: Dataset, source: str) -> None:
    """Checks a data set that came from a file, before any of its values is used.

    Args:
        dataset: As read.
        source: Where from, for messages.

    Raises:
        DataError: Its bytes are not what they should be, or a column holds media, whose rows name
            files: those would be opened, and copied into whatever is written.
    """
    for name, feature in dataset.features.items():
        if _names_files(feature):
            raise DataError(
                f"{source}: the column {name!r} is {feature}, whose values name files to be "
                "opened. Only text can be scored: remove the column."
            )
    try:
        dataset.data.validate(full=True)
    except pa.ArrowInvalid as error:
        raise unreadable(dataset, error).at(file=source) from error


def _names_files(feature: Any) -> bool:
    """Whether a column holds images, sounds or the like, at any depth."""
    if isinstance(feature, List | LargeList):
        return _names_files(feature.feature)
    if isinstance(feature, dict):
        return any(map(_names_files, feature.values()))
    return hasattr(feature, "decode_example") and not isinstance(feature, Json)
