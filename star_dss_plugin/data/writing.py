"""Write files and folders atomically."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from datasets import Dataset

from star_dss_plugin.data.columns import with_attention_mask
from star_dss_plugin.data.provenance import PROVENANCE_FILE, provenance_of
from star_dss_plugin.errors import OutputError

__all__ = [
    "SCRATCH",
    "atomic_file",
    "atomic_folder",
    "check_writable",
    "write_dataset",
    "write_text",
    "writing",
]

SCRATCH = ".tmp"
"""Suffix of files and folders that are still being written."""


@contextlib.contextmanager
def writing(path: str | os.PathLike[str]) -> Iterator[None]:
    """Turn an OSError into an OutputError that says what to do.

    Args:
        path: The result that is being written.

    Raises:
        OutputError: The block raised an OSError.
    """
    try:
        yield
    except OSError as error:
        raise OutputError(
            f"{os.fspath(path)} cannot be written: {error}. Free space there, or name an output "
            "that can be written, and start the same command again: what guards and models have "
            "answered so far is kept, and nothing that was complete is lost."
        ) from error


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """Open a temporary file that replaces `path` when the block ends without an error.

    The file is synced before it replaces `path`, so a power cut loses nothing. Its mode follows the
    umask. Parent folders are created.

    Raises:
        OSError: The file cannot be written; `path` is unchanged.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = _scratch(path)
    try:
        with scratch.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(scratch, path)
    except BaseException:
        with contextlib.suppress(OSError):
            scratch.unlink()
        raise
    with contextlib.suppress(OSError):  # not every file system can sync a folder
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


@contextlib.contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Create a temporary folder that is renamed to `path` when the block ends without an error.

    Raises:
        OSError: The folder cannot be written, or `path` exists already.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = _scratch(path)
    scratch.mkdir()
    try:
        yield scratch
        scratch.rename(path)
    except BaseException:
        shutil.rmtree(scratch, ignore_errors=True)
        raise


def _scratch(path: Path) -> Path:
    """Return a unique temporary path in the folder of `path`, not longer than names may be."""
    return path.with_name(f".{path.name[:32]}.{uuid.uuid4().hex}{SCRATCH}")


def write_dataset(dataset: Dataset, folder: Path) -> None:
    """Write a scored data set and its provenance (`star_dss.json`) to a new folder, atomically.

    Raises:
        OutputError: The folder cannot be written.
    """
    dataset = with_attention_mask(dataset)
    with writing(folder), atomic_folder(folder) as building:
        dataset.save_to_disk(str(building), num_proc=None)
        text = json.dumps(provenance_of(dataset), indent=2, sort_keys=True)
        (building / PROVENANCE_FILE).write_text(text + "\n", encoding="utf-8")


def check_writable(output: Path) -> None:
    """Check that the folder of `output` is writable, before hours of work.

    Raises:
        OutputError: It is not.
    """
    with writing(output):
        output.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{output.name[:32]}-", dir=output.parent):
            pass


def write_text(path: Path, text: str) -> None:
    """Write or replace a UTF-8 file, atomically.

    Raises:
        OutputError: The file cannot be written.
    """
    with writing(path), atomic_file(path) as file:
        file.write(text.encode("utf-8"))
