"""Read data sets from files, folders and the hub."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterable, Iterator
from importlib.resources import as_file, files
from pathlib import Path

import datasets
import pyarrow as pa
from datasets import Dataset, DatasetBuilder, IterableDataset, load_dataset_builder
from datasets.exceptions import DatasetGenerationError

from star_dss_plugin.data.files.conversion import json_dataset, parquet_dataset
from star_dss_plugin.data.files.folders import (
    FORMATS,
    file_splits,
    load_files,
    load_saved,
    saved_splits,
)
from star_dss_plugin.data.files.parquet_shards import is_sharded, load_scored
from star_dss_plugin.data.media import check_features
from star_dss_plugin.data.rows import unreadable
from star_dss_plugin.errors import DataError, StarDSSError
from star_dss_plugin.validation import check_reserved_name

__all__ = [
    "DEMO",
    "DEMO_MEANING",
    "check_readable",
    "is_saved",
    "read_dataset",
    "read_packaged",
    "read_splits",
    "read_streams",
    "with_file_name",
]

DEMO = "demo"
"""The name of the data that comes with the package, accepted where a file or folder is."""
DEMO_MEANING = "the data that comes with the package"
"""What `DEMO` stands for, for messages."""

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(?:/[A-Za-z0-9][\w.-]*)?", re.ASCII)


def read_dataset(source: str, split: str = "train", *, config: str | None = None) -> Dataset:
    """Return a data set from a .jsonl, .json or .parquet file, a folder, or the hub.

    Args:
        source: Name of a file or folder, without patterns; "demo" for the conversations that come
            with the package (an error if a file has that name); or a data set's id on the hub.
        split: The split to read from a folder or the hub.
        config: The configuration of a data set on the hub.

    Raises:
        DataError: The data set cannot be read; the message has the reason.
        ConfigError: `source` is "demo", and a file or folder has that name.
    """
    if not source.strip():
        raise DataError("No data is named. Give a file, a folder, or the id of a data set.")
    with _explained(source):
        found = _load(source, Path(source), split, config)
        check_readable(found, source)
        return found


@contextlib.contextmanager
def _explained(source: str) -> Iterator[None]:
    """Turn any exception of a reader into a DataError that names the source."""
    try:
        yield
    except StarDSSError:
        raise
    except Exception as error:  # each format's reader raises its own exceptions
        cause = error.__cause__ or error
        if isinstance(cause, OSError) and not isinstance(cause, FileNotFoundError):
            copies = datasets.config.HF_DATASETS_CACHE
            raise DataError(
                f"{source} cannot be read: {type(cause).__name__}: {cause}. A copy of what is read "
                f"is kept in {copies}: free space there, or set HF_DATASETS_CACHE to a folder that "
                f"can be written. If it is {source} that cannot be read, change that."
            ) from error
        raise DataError(
            f"{source} cannot be read: {_cause(error)} Give a .jsonl or .parquet file, a folder "
            "of such files or one written by save_to_disk, or a data set id."
        ) from error


def read_splits(source: str, split: str, *, config: str | None = None) -> dict[str, Dataset]:
    """Return all splits of a data set.

    Args:
        source: As for `read_dataset`.
        split: A split that must exist; for a single file, the name for its rows.
        config: As for `read_dataset`.

    Raises:
        DataError: As for `read_dataset`.
    """
    first = read_dataset(source, split, config=config)
    others = [name for name in _splits(source, Path(source), config) if name != split]
    return {split: first} | {n: read_dataset(source, n, config=config) for n in others}


def read_streams(
    source: str, split: str, *, config: str | None = None
) -> dict[str, IterableDataset]:
    """Return all splits as streams; data of the hub and scored shards are read on demand.

    Args:
        source: As for `read_dataset`.
        split: As for `read_splits`.
        config: As for `read_dataset`.

    Raises:
        DataError: As for `read_dataset`.
    """
    path = Path(source)
    if is_sharded(path):
        return {split: load_scored(path, streaming=True)}
    if source == DEMO or path.exists():
        found = read_splits(source, split, config=config)
        return {name: dataset.to_iterable_dataset() for name, dataset in found.items()}
    with _explained(source):
        return dict(_hub_builder(source, config).as_streaming_dataset())


def _splits(source: str, path: Path, config: str | None) -> Iterable[str]:
    """Return the split names of a data set that `read_dataset` can read."""
    if source == DEMO:
        return ()
    if not path.exists():
        return load_dataset_builder(source, name=config).info.splits or {}
    if not path.is_dir() or is_sharded(path):
        return ()
    return (saved_splits(path) or ()) if is_saved(path) else file_splits(path)


@contextlib.contextmanager
def with_file_name(source: str) -> Iterator[None]:
    """Add the file or folder to any StarDSSError about a row."""
    try:
        yield
    except StarDSSError as error:
        if error.where.rows:
            error.at(file=source)
        raise


def read_packaged(package: str, name: str) -> Dataset:
    """Return the rows of a .jsonl file that comes with the package.

    Args:
        package: The package whose folder `assets` contains the file.
        name: The file's name.
    """
    with as_file(files(package).joinpath("assets", name)) as path:
        return json_dataset([path])


def _load(source: str, path: Path, split: str, config: str | None) -> Dataset:
    if source == DEMO:
        check_reserved_name(DEMO, DEMO_MEANING)
        return read_packaged("star_dss_plugin.data", "demo_mix.jsonl")
    if config is not None and path.exists():
        raise DataError(
            f"{source} is a local file or folder, which has no configurations: remove "
            f"the configuration {config!r}, or name the file that is meant."
        )
    if path.is_file():
        if path.suffix not in FORMATS:
            raise DataError(
                f"{source} is a {path.suffix or 'nameless'} file. Give a .jsonl, .json or "
                ".parquet file, or a data set folder."
            )
        return (json_dataset if FORMATS[path.suffix] == "json" else parquet_dataset)([path])
    if path.is_dir():
        if is_sharded(path):
            return load_scored(path)
        return load_saved(path, split) if is_saved(path) else load_files(path, split)
    if path.exists():
        raise DataError(f"{source} is a pipe or a device. Write the rows to a file.")
    builder = _hub_builder(source, config)
    builder.download_and_prepare()
    found = builder.as_dataset(split=split)
    assert isinstance(found, Dataset)
    return found


def is_saved(path: Path) -> bool:
    """Return whether `save_to_disk` wrote a folder (`star-dss score` uses it)."""
    return any((path / name).exists() for name in ("state.json", "dataset_dict.json"))


def _hub_builder(source: str, config: str | None) -> DatasetBuilder:
    """Return the builder of a data set on the hub.

    Raises:
        DataError: `source` is not a data set's id, or the data set names files outside its own
            repository or has columns of media.
    """
    if Path(source).suffix in FORMATS or not _HUB_ID.fullmatch(source):
        raise DataError(
            f"{source} cannot be read: there is no file or folder of this name, and it is no id of "
            "a data set on the hub (such as 'name' or 'owner/name')."
        )
    builder = load_dataset_builder(source, name=config)
    repository = f"hf://datasets/{source}@"
    for named in (builder.config.data_files or {}).values():
        for file in named:
            if not str(file).startswith(repository):
                raise DataError(
                    f"The data set {source!r} names {str(file)!r} as one of its files, which is "
                    "not in its repository. A data set does not choose paths or downloads: get "
                    "that file yourself if you trust it, and name it."
                )
    check_features(builder.info.features or {}, source)
    return builder


def _cause(error: BaseException) -> str:
    """Return the original error as text; `datasets` wraps it in an uninformative one."""
    while isinstance(error, DatasetGenerationError) and error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {error}."


def check_readable(dataset: Dataset, source: str) -> None:
    """Validate a data set that was read from a file, before any of its values is used.

    Args:
        dataset: The data set as read.
        source: The file, for messages.

    Raises:
        DataError: The Arrow data is damaged, or a column contains media (see `check_features`).
    """
    check_features(dataset.features, source)
    try:
        dataset.data.validate(full=True)
    except pa.ArrowInvalid as error:
        raise unreadable(dataset, error).at(file=source) from error
