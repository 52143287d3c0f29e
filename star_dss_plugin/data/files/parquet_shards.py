"""Write and read scored data as a folder of parquet shards, each with its own provenance.

    FOLDER/data/train-00000-of-00200.parquet …   the hub's layout: `load_dataset(FOLDER)` works
    FOLDER/README.md                             a data set card with the provenance
    FOLDER/star_dss.json                         the provenance of all shards together

Only parquet, JSON and text are written, and nothing is unpickled.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, overload

import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from datasets import Dataset, Features, IterableDataset

from star_dss_plugin.data.files.conversion import parquet_dataset, parquet_tables
from star_dss_plugin.data.files.folders import read_settings, regular_file
from star_dss_plugin.data.media import check_features
from star_dss_plugin.data.provenance import PROVENANCE_FILE, note_line, provenance_of, write_note
from star_dss_plugin.data.row_digests import packed_row_digests, write_merged_digests
from star_dss_plugin.data.writing import atomic_file, write_text, writing
from star_dss_plugin.errors import DataError
from star_dss_plugin.visible import as_code

__all__ = [
    "DATA",
    "is_sharded",
    "load_scored",
    "shard_name",
    "shard_note",
    "write_card",
    "write_shard",
]

DATA = "data"
_NOTE, _ROWS = b"star_dss", b"star_dss_rows"
_NAME = re.compile(r"train-(\d{5,})-of-(\d{5,})\.parquet")


def shard_name(index: int, shards: int) -> str:
    """Return a shard's file name in the hub's numbering."""
    return f"train-{index:05d}-of-{shards:05d}.parquet"


def write_shard(dataset: Dataset, path: Path) -> None:
    """Write scored rows with their provenance as one parquet file, atomically.

    With the same version of pyarrow, equal rows give equal bytes.

    Raises:
        OutputError: The file cannot be written.
    """
    table: pa.Table = dataset.with_format("arrow")[:]
    schema = dataset.features.arrow_schema
    note = json.dumps(provenance_of(dataset), sort_keys=True).encode()
    metadata = {**(schema.metadata or {}), _NOTE: note}
    if (rows := packed_row_digests(dataset)) is not None:
        metadata[_ROWS] = rows.encode()
    table = table.cast(schema).replace_schema_metadata(metadata)
    with writing(path), atomic_file(path) as file:
        pq.write_table(table, file)


def shard_note(path: Path) -> dict[str, Any]:
    """Return the provenance of one shard, reading only the file's footer.

    Raises:
        DataError: The shard is damaged, or has another number of rows than its provenance says.
    """
    try:
        metadata = pq.read_metadata(path)
        note = json.loads(metadata.metadata[_NOTE])
        if isinstance(note, dict) and note["rows"] == metadata.num_rows:
            return note
        problem = f"it says that it has {note['rows']} rows, and has {metadata.num_rows}"
    except (OSError, ValueError, KeyError, TypeError) as error:  # ArrowInvalid is a ValueError
        problem = f"{type(error).__name__}: {error}"
    raise DataError(
        f"{path} is not a whole shard of scored data ({problem}). Remove it and start the same "
        "run again, which makes that shard."
    )


def write_card(folder: Path, provenance: Mapping[str, Any]) -> None:
    """Write `star_dss.json`, and a data set card from which `load_dataset` gets the provenance."""
    text = json.dumps(provenance, indent=2, sort_keys=True)
    write_text(folder / PROVENANCE_FILE, text + "\n")
    header = yaml.safe_dump(
        {
            "configs": [
                {
                    "config_name": "default",
                    "data_files": [{"split": "train", "path": f"{DATA}/train-*.parquet"}],
                }
            ],
            "dataset_info": {
                "config_name": "default",
                "description": note_line("scores", provenance),
            },
        },
        allow_unicode=True,
        width=10**9,
    )
    write_text(
        folder / "README.md",
        f"---\n{header}---\n\nScored with STAR-DSS by the guard {as_code(provenance['guard'])}: "
        "`star_scores` has one score per token of `input_ids`.\n",
    )


def is_sharded(folder: str | Path) -> bool:
    """Return whether a folder contains all shards of a finished run."""
    path = Path(folder)
    return (path / PROVENANCE_FILE).is_file() and (path / DATA).is_dir()


@overload
def load_scored(folder: str | Path) -> Dataset: ...
@overload
def load_scored(folder: str | Path, *, streaming: Literal[False]) -> Dataset: ...
@overload
def load_scored(folder: str | Path, *, streaming: Literal[True]) -> IterableDataset: ...
def load_scored(folder: str | Path, *, streaming: bool = False) -> Dataset | IterableDataset:
    """Return the rows of a folder of shards, in order, with their provenance.

    Args:
        folder: Output of `star-dss score --shard-rows` or `--ray`.
        streaming: False: convert the shards to Arrow on disk and map that into memory. True: read
            the shards on demand.

    Raises:
        DataError: The folder has no shards, or some are missing.
    """
    path = Path(folder)
    if not is_sharded(path):
        raise DataError(
            f"{folder} is not a folder of scored shards: it lacks {PROVENANCE_FILE} or {DATA}/. "
            "Give the output of star-dss score --shard-rows; a folder NAME.incomplete is finished "
            "by starting the same command again."
        )
    names = sorted(name for name in os.listdir(path / DATA) if name.startswith("train-"))
    found = [match for name in names if (match := _NAME.fullmatch(name))]
    indices, totals = [int(m[1]) for m in found], {int(m[2]) for m in found}
    if len(totals) != 1 or indices != list(range(*totals)):
        raise DataError(
            f"{folder} has {len(indices)} shards of {'/'.join(map(str, sorted(totals))) or '?'}: "
            "some are missing, or of another run. Copy the whole folder again."
        )
    files = [regular_file(path / DATA, match[0]) for match in found]
    provenance = read_settings(path, PROVENANCE_FILE)
    dataset: Dataset | IterableDataset
    if streaming:
        features = Features.from_arrow_schema(pq.read_schema(files[0]))
        check_features(features, str(folder))
        dataset = IterableDataset.from_generator(
            _rows, features=features, gen_kwargs={"files": files}
        )
    else:
        dataset = parquet_dataset(files)
        write_merged_digests(dataset, map(_row_note, files))
    write_note(dataset, "scores", provenance)
    return dataset


def _row_note(path: Path) -> str | None:
    """Return a shard's note about its rows (see `data.row_digests`); None if it has none."""
    found = (pq.read_metadata(path).metadata or {}).get(_ROWS)
    return None if found is None else found.decode("ascii", "replace")


def _rows(files: list[Path]) -> Iterator[dict[str, Any]]:
    for table in parquet_tables(files):
        yield from table.to_pylist()
