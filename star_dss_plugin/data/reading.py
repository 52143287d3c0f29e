"""Read data sets: files and folders by their names, and data sets of the hub by their ids."""

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
from star_dss_plugin.validation import not_a_file

__all__ = [
    "DEMO",
    "DEMO_MEANS",
    "check_readable",
    "in_file",
    "is_saved",
    "packaged",
    "read_dataset",
    "read_splits",
    "read_streams",
]

DEMO = "demo"
"""The name of the data that comes with the package, in place of a file, a folder or an id."""
DEMO_MEANS = "the data that comes with the package"
"""What the name stands for, in a few words."""

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(?:/[A-Za-z0-9][\w.-]*)?", re.ASCII)


def read_dataset(source: str, split: str = "train", *, config: str | None = None) -> Dataset:
    """Return a data set from a .jsonl, .json or .parquet file, a folder, or the hub.

    Args:
        source: Name of the file or folder, as it is; "demo": the conversations that come with the
            package, unless there is a file of that name; else the id of a data set on the hub.
        split: Which split of a folder or of the hub.
        config: Which configuration of a data set on the hub.

    Raises:
        DataError: It cannot be read; the reason is in the message.
    """
    if not source.strip():
        raise DataError("No data is named. Give a file, a folder, or the id of a data set.")
    with _explained(source):
        found = _load(source, Path(source), split, config)
        check_readable(found, source)
        return found


@contextlib.contextmanager
def _explained(source: str) -> Iterator[None]:
    """Turn what readers raise into an error that says what cannot be read."""
    try:
        yield
    except StarDSSError:
        raise
    except Exception as error:  # readers raise whatever their formats raise
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
    """Return all splits of what `read_dataset` reads.

    Args:
        source: As for `read_dataset`.
        split: One that it has to have; the name of all rows of a single file.
        config: As for `read_dataset`.

    Raises:
        DataError: As `read_dataset`.
    """
    first = read_dataset(source, split, config=config)
    others = [name for name in _splits(source, Path(source), config) if name != split]
    return {split: first} | {n: read_dataset(source, n, config=config) for n in others}


def read_streams(
    source: str, split: str, *, config: str | None = None
) -> dict[str, IterableDataset]:
    """Return all splits as streams: of the hub, and of scored shards, only what is used is read.

    Args:
        source: As for `read_dataset`.
        split: As for `read_splits`.
        config: As for `read_dataset`.

    Raises:
        DataError: As `read_dataset`.
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
    """Return the names of the splits of a data set that could be read."""
    if source == DEMO:
        return ()
    if not path.exists():
        return load_dataset_builder(source, name=config).info.splits or {}
    if not path.is_dir() or is_sharded(path):
        return ()
    return (saved_splits(path) or ()) if is_saved(path) else file_splits(path)


@contextlib.contextmanager
def in_file(source: str) -> Iterator[None]:
    """Add the file or folder to a StarDSSError about a row."""
    try:
        yield
    except StarDSSError as error:
        if error.where.rows:
            error.at(file=source)
        raise


def packaged(package: str, name: str) -> Dataset:
    """Return the rows of a .jsonl file that comes with the package.

    Args:
        package: The package with the folder `assets`.
        name: The file in that folder.
    """
    with as_file(files(package).joinpath("assets", name)) as path:
        return json_dataset([path])


def _load(source: str, path: Path, split: str, config: str | None) -> Dataset:
    if source == DEMO:
        not_a_file(DEMO, DEMO_MEANS)
        return packaged("star_dss_plugin.data", "demo_mix.jsonl")
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
    """Tell whether a folder was written by `save_to_disk` (as `star-dss score` does)."""
    return any((path / name).exists() for name in ("state.json", "dataset_dict.json"))


def _hub_builder(source: str, config: str | None) -> DatasetBuilder:
    """Return what reads a data set of the hub, if its repository keeps its files itself."""
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
    """Return what a reader stumbled over: `datasets` wraps it in an error that says nothing."""
    while isinstance(error, DatasetGenerationError) and error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {error}."


def check_readable(dataset: Dataset, source: str) -> None:
    """Check a data set that came from a file, before any of its values is used.

    Args:
        dataset: As read.
        source: Where from, for messages.

    Raises:
        DataError: Its bytes are not what they should be, or a column holds media, whose rows name
            files: those would be opened, and copied into whatever is written.
    """
    check_features(dataset.features, source)
    try:
        dataset.data.validate(full=True)
    except pa.ArrowInvalid as error:
        raise unreadable(dataset, error).at(file=source) from error
