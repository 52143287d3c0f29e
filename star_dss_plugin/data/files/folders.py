"""Read data sets from the regular files in a local folder.

A folder's own metadata (`state.json`, `README.md`, links) can neither name other paths nor start
downloads.
"""

from __future__ import annotations

import json
import os
import re
import struct
from pathlib import Path
from typing import Any

import pyarrow as pa
from datasets import Dataset, DatasetInfo, Split
from datasets.table import MemoryMappedTable, concat_tables

from star_dss_plugin.data.files.conversion import json_dataset, parquet_dataset
from star_dss_plugin.data.files.regular import kind_of
from star_dss_plugin.data.media import check_features
from star_dss_plugin.errors import DataError
from star_dss_plugin.validation import shortened

__all__ = [
    "FORMATS",
    "check_folder",
    "file_splits",
    "load_files",
    "load_saved",
    "read_settings",
    "regular_file",
    "saved_splits",
]

FORMATS = {".jsonl": "json", ".json": "json", ".parquet": "parquet"}
"""Formats of data files by their suffix."""
_SETTINGS_BYTES = 64 << 20
"""Limit for metadata files, which are much smaller."""
_FORBIDDEN_IN_NAMES = frozenset("/\\\0")
_SPLITS = ("train", "test", "validation", "valid", "val", "dev", "eval", "evaluation")
_SPLIT_NAME = re.compile(rf"({'|'.join(_SPLITS)})(?:[-_.].*)?", re.DOTALL)
_DATA_FILES_HEADER = re.compile(
    r"\A\s*---\s*\n.*?\bdata_files\b.*?^---\s*$", re.DOTALL | re.MULTILINE
)
"""Matches a data set card whose header assigns files to splits."""


def regular_file(folder: Path, name: Any) -> Path:
    """Return the path of a regular file in a folder.

    Raises:
        DataError: The name is not a plain file name, or the file is missing, a link, a pipe, a
            device or a folder.
    """
    if not isinstance(name, str) or name in ("", ".", "..") or set(name) & _FORBIDDEN_IN_NAMES:
        raise DataError(
            f"{folder} names {shortened(name)} as one of its files, which is no name of a file in "
            "it. A data folder does not choose paths: write it again with save_to_disk."
        )
    path: Path = folder / name
    try:
        kind = kind_of(path)
    except FileNotFoundError as error:
        raise DataError("it is missing. Copy the whole folder again.").at(file=str(path)) from error
    if kind:
        raise DataError(
            f"it is {kind}, and a data folder is read only from regular files that lie in it. "
            "Copy it with its links resolved (cp -rL), or remove the file."
        ).at(file=str(path))
    return path


def read_settings(folder: Path, name: str) -> dict[str, Any]:
    """Return the JSON object in a file of a folder.

    Raises:
        DataError: The file is missing, not regular, too large, or not a JSON object.
    """
    path = regular_file(folder, name)
    if path.stat().st_size > _SETTINGS_BYTES:
        raise DataError(f"{path} has more than {_SETTINGS_BYTES:,} bytes. Copy the folder again.")
    try:
        found = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is damaged: {error}. Copy the folder again.") from error
    if not isinstance(found, dict):
        raise DataError(f"{path} is damaged: it holds no object. Copy the folder again.")
    return found


def saved_splits(folder: Path) -> list[str] | None:
    """Return the splits of a folder that `save_to_disk` wrote; None for a data set without splits.

    Raises:
        DataError: The file that lists them is damaged.
    """
    if not (folder / "dataset_dict.json").exists():
        return None
    splits = read_settings(folder, "dataset_dict.json").get("splits")
    if not isinstance(splits, list) or not all(isinstance(split, str) for split in splits):
        raise DataError(f"{folder / 'dataset_dict.json'} lists no splits. Copy the folder again.")
    return splits


def load_saved(folder: Path, split: str) -> Dataset:
    """Return a data set that `save_to_disk` wrote, mapped into memory.

    A saved format such as "torch" is ignored: rows are plain values.

    Raises:
        DataError: The folder has no such split, or `save_to_disk` did not write it.
    """
    splits = saved_splits(folder)
    if splits is not None:
        if split not in splits:
            raise DataError(f"{folder} has no split {split!r} (it has {', '.join(splits)}).")
        inner = folder / split
        if set(split) & _FORBIDDEN_IN_NAMES or split in (".", "..") or inner.is_symlink():
            raise DataError(f"The split {split!r} is no folder in {folder}. Copy it again.")
        folder = inner
    state = read_settings(folder, "state.json")
    listed = state.get("_data_files")
    if not isinstance(listed, list) or not all(isinstance(one, dict) for one in listed):
        raise DataError(f"{folder / 'state.json'} lists no files. Copy the folder again.")
    info = DatasetInfo.from_dict(read_settings(folder, "dataset_info.json"))
    if info.features is not None:
        check_features(info.features, str(folder))
    tables = [_memory_mapped(regular_file(folder, one.get("filename"))) for one in listed]
    if not tables:
        if info.features is None:
            raise DataError(f"{folder} has no rows and no columns.")
        return Dataset.from_dict({name: [] for name in info.features}, features=info.features)
    named, fingerprint = state.get("_split"), state.get("_fingerprint")
    return Dataset(
        concat_tables(tables),
        info=info,
        split=Split(named) if isinstance(named, str) else None,
        fingerprint=fingerprint if isinstance(fingerprint, str) else None,
    )


def _memory_mapped(path: Path) -> MemoryMappedTable:
    """Map an uncompressed Arrow file into memory.

    Raises:
        DataError: The file is compressed, which `save_to_disk` never does: expanding it could fill
            the memory.
    """
    with pa.memory_map(str(path)) as source:
        for message in pa.ipc.MessageReader.open_stream(source):
            if message.type != "schema" and _is_compressed(message):
                raise DataError(
                    f"{path} is compressed or uses dictionaries, which save_to_disk does not "
                    "write. Load it with `datasets`, and save it again."
                )
    return MemoryMappedTable.from_file(str(path))


def _is_compressed(message: pa.ipc.Message) -> bool:
    """Return whether a message is anything but an uncompressed record batch.

    The metadata is a flatbuffer: a table begins with the distance to its vtable, which lists the
    offsets of its fields. `compression` is the fourth field of a record batch, and the record batch
    is the third field of a message.
    """
    if message.type != "record batch":
        return True
    data = bytes(message.metadata)

    def field(table: int, number: int) -> int:
        fields = table - struct.unpack_from("<i", data, table)[0]
        if 4 + 2 * number >= struct.unpack_from("<H", data, fields)[0]:
            return 0
        offset = int(struct.unpack_from("<H", data, fields + 4 + 2 * number)[0])
        return offset and table + offset

    def follow(place: int) -> int:
        return place + int(struct.unpack_from("<I", data, place)[0])

    batch = field(follow(0), 2)
    return not batch or bool(field(follow(batch), 3))


def check_folder(folder: Path) -> None:
    """Check a local folder before a host framework reads it and trusts its metadata.

    Raises:
        DataError: The folder's name is a glob pattern or an address, its README.md assigns files to
            splits, or it contains something other than regular files and folders.
    """
    if not folder.is_dir():
        return
    if set(str(folder)) & set("*?[]") or "::" in str(folder):
        raise DataError(f"{folder} has a name that would be taken for a pattern. Rename it.")
    _check_card(folder)
    for place, folders, names in os.walk(folder):
        for name in folders:
            if (Path(place) / name).is_symlink():
                raise DataError("it is a link. Copy what it links to (cp -rL).").at(
                    file=str(Path(place) / name)
                )
        for name in names:
            regular_file(Path(place), name)


def load_files(folder: Path, split: str) -> Dataset:
    """Return the rows of one split of the .jsonl, .json or .parquet files in a folder.

    The files lie in the folder or in its subfolder `data`. A file belongs to the split with which
    its name begins ("train-00000-of-00002.parquet"). If no file's name begins with a split, all
    files are "train".

    Raises:
        DataError: The split has no files or files of several formats, or README.md assigns files to
            splits.
    """
    by_split = file_splits(folder)
    found = by_split.get(split, [])
    if not found:
        raise DataError(
            f"{folder} has no files of the split {split!r}. Files of rows end in "
            f"{', '.join(FORMATS)} and lie in the folder or in its folder 'data'; it has "
            f"{_listed(by_split)}. Name one of the files instead."
        )
    formats = {FORMATS[path.suffix] for path in found}
    if len(formats) > 1:
        raise DataError(
            f"{folder} has files of several formats for the split {split!r}: {_listed(by_split)}. "
            "Name one of the files instead, or remove those that are not meant."
        )
    return parquet_dataset(found) if formats == {"parquet"} else json_dataset(found)


def file_splits(folder: Path) -> dict[str, list[Path]]:
    """Return the data files of each split of a folder, sorted by name.

    Raises:
        DataError: A file is not regular, or README.md assigns files to splits.
    """
    _check_card(folder)
    named: dict[str, list[Path]] = {}
    for place in (folder, folder / "data"):
        if place != folder and (place.is_symlink() or not place.is_dir()):
            continue
        for path in sorted(place.iterdir()):
            if path.suffix in FORMATS and not path.name.startswith("."):
                match = _SPLIT_NAME.fullmatch(path.name)
                split = match[1] if match else ""
                named.setdefault(split, []).append(regular_file(place, path.name))
    if set(named) == {""}:
        return {"train": named[""]}
    return named


def _check_card(folder: Path) -> None:
    """Reject a data set card that assigns files to splits, since this module does not follow it.

    Raises:
        DataError: The header of README.md has `data_files`.
    """
    if not os.path.lexists(folder / "README.md"):
        return
    with regular_file(folder, "README.md").open("rb") as file:
        text = file.read(_SETTINGS_BYTES).decode("utf-8", "replace")
    if _DATA_FILES_HEADER.search(text):
        raise DataError(
            f"{folder / 'README.md'} says which files belong to which split (data_files), and a "
            "data folder does not choose what is read. Name one of its files, or remove that part "
            "of README.md to read them by their names."
        )


def _listed(by_split: dict[str, list[Path]]) -> str:
    """Return the names of a folder's first files for a message."""
    names = [shortened(path.name) for paths in by_split.values() for path in paths]
    return ", ".join(names[:5]) + (", …" if len(names) > 5 else "") if names else "none"
