"""Write results whole or not at all."""

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
"""How the name of what is not whole yet ends."""


@contextlib.contextmanager
def writing(path: str | os.PathLike[str]) -> Iterator[None]:
    """Turn an error of the file system into one that says what to do.

    Args:
        path: The result that is being written.

    Raises:
        OutputError: In place of an OSError.
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
    """Open a new file that takes the place of `path` when the block ends without an error.

    It gets there whole, with the mode that the umask leaves, and stays after a power cut. The
    folders above it are made.

    Raises:
        OSError: It cannot be written; what was at `path` is as it was.
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
    """Make a new folder that is called `path` when the block ends without an error.

    Raises:
        OSError: It cannot be written, or there is something at `path` already.
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
    """Return a name beside `path` that no other writer has, and that is not too long for a name."""
    return path.with_name(f".{path.name[:32]}.{uuid.uuid4().hex}{SCRATCH}")


def write_dataset(dataset: Dataset, folder: Path) -> None:
    """Write a scored data set and its provenance (`star_dss.json`) to a new folder.

    The folder appears when it is complete: a killed run leaves nothing that looks like a result.

    Raises:
        OutputError: It cannot be written.
    """
    dataset = with_attention_mask(dataset)
    with writing(folder), atomic_folder(folder) as building:
        dataset.save_to_disk(str(building), num_proc=None)
        text = json.dumps(provenance_of(dataset), indent=2, sort_keys=True)
        (building / PROVENANCE_FILE).write_text(text + "\n", encoding="utf-8")


def check_writable(output: Path) -> None:
    """Check before hours of work that something can be made where a result will go.

    Raises:
        OutputError: Nothing can.
    """
    with writing(output):
        output.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{output.name[:32]}-", dir=output.parent):
            pass


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 file whole or not at all; replace what was there.

    Raises:
        OutputError: It cannot be written.
    """
    with writing(path), atomic_file(path) as file:
        file.write(text.encode("utf-8"))
