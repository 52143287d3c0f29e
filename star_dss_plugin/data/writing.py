"""Write results whole or not at all."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from datasets import Dataset

from star_dss_plugin.data.columns import with_attention_mask
from star_dss_plugin.data.provenance import PROVENANCE_FILE, provenance_of
from star_dss_plugin.errors import OutputError

__all__ = ["check_writable", "write_dataset", "write_text", "writing"]


@contextlib.contextmanager
def writing(path: str | os.PathLike[str]) -> Iterator[None]:
    """Turns an error of the file system into one that says what to do.

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


def write_dataset(dataset: Dataset, folder: Path) -> None:
    """Writes a scored data set and its provenance (`star_dss.json`) to a new folder.

    The folder appears when it is complete: a killed run leaves nothing that looks like a result.

    Raises:
        OutputError: It cannot be written.
    """
    dataset = with_attention_mask(dataset)
    with writing(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        building = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
        try:
            dataset.save_to_disk(str(building), num_proc=None)
            text = json.dumps(provenance_of(dataset), indent=2, sort_keys=True)
            (building / PROVENANCE_FILE).write_text(text + "\n", encoding="utf-8")
            building.chmod(0o777 & ~_umask())
            building.rename(folder)
        except BaseException:
            shutil.rmtree(building, ignore_errors=True)
            raise


def check_writable(output: Path) -> None:
    """Finds out before hours of work whether something can be made where a result will go.

    Raises:
        OutputError: Nothing can.
    """
    with writing(output):
        output.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{output.name}-", dir=output.parent):
            pass


def write_text(path: Path, text: str) -> None:
    """Writes a UTF-8 file whole or not at all; replaces what was there.

    Raises:
        OutputError: It cannot be written.
    """
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, scratch = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
        try:
            with os.fdopen(handle, "w", encoding="utf-8", newline="\n") as file:
                file.write(text)
            os.chmod(scratch, 0o666 & ~_umask())
            os.replace(scratch, path)
        except BaseException:
            Path(scratch).unlink(missing_ok=True)
            raise


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current
