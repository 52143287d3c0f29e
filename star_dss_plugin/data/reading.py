"""Reading data sets from files, and writing scored ones whole or not at all."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import datasets
from datasets import Dataset, DatasetDict, load_dataset, load_from_disk
from datasets.exceptions import DatasetGenerationError
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from star_dss_plugin.data.cache import content_key
from star_dss_plugin.data.columns import with_attention_mask
from star_dss_plugin.data.json_lines import check_json, json_fault
from star_dss_plugin.data.parquet_shards import PROVENANCE_FILE, is_sharded, load_scored
from star_dss_plugin.data.provenance import provenance_of
from star_dss_plugin.data.readable import check_readable
from star_dss_plugin.errors import ConfigError, DataError, GuardError, writing

__all__ = [
    "check_writable",
    "in_file",
    "is_saved_dataset",
    "load_tokenizer",
    "read_dataset",
    "sample_of",
    "words_of",
    "write_dataset",
    "write_text",
]

_READERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet"}
_SAMPLE = 64


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
    """An error of ours that names a row says also in which file or folder that is."""
    try:
        yield
    except (DataError, GuardError) as error:
        if not str(error).startswith("Row"):
            raise
        raise type(error)(f"{source}: {error}") from error


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


def load_tokenizer(name: str, *, only_local: bool = False) -> PreTrainedTokenizerBase:
    """A tokenizer by id or folder; code that comes with it is never run.

    Args:
        name: Id or folder.
        only_local: Whether nothing may be downloaded: for names that the data gives.

    Raises:
        ConfigError: It cannot be loaded.
    """
    try:
        found = AutoTokenizer.from_pretrained(
            name, trust_remote_code=False, local_files_only=only_local
        )
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(
            f"The tokenizer {name!r} cannot be loaded: {error}. Give the id or folder of the model "
            "that is to be trained."
        ) from error
    assert isinstance(found, PreTrainedTokenizerBase)
    return found


def sample_of(dataset: Dataset) -> str:
    """A hash over column names and some rows from all over a data set."""
    rows = dataset.with_format(None)
    some = range(0, len(rows), max(1, len(rows) // _SAMPLE))
    return content_key(list(rows.column_names), [repr(rows[i]) for i in some])


def words_of(tokenizer: PreTrainedTokenizerBase) -> str:
    """A hash over a tokenizer's vocabulary and chat template."""
    return content_key(tokenizer.get_vocab(), tokenizer.chat_template)


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
