"""Scored data as a folder of parquet shards, each of which says how its scores were made.

    FOLDER/data/train-00000-of-00200.parquet …   the layout of the hub: `load_dataset(FOLDER)` works
    FOLDER/README.md                             a data set card that carries the provenance
    FOLDER/star_dss.json                         the provenance of all shards together

Nothing but parquet, JSON and text is written, and nothing is unpickled.
"""

from __future__ import annotations

import json
import os
import re
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, overload

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from datasets import Dataset, IterableDataset, load_dataset

from star_dss_plugin.data.provenance import describe, provenance_of, write_note
from star_dss_plugin.errors import DataError, writing
from star_dss_plugin.scoring.notes import ROWS_NAMED

__all__ = [
    "DATA",
    "PROVENANCE_FILE",
    "is_sharded",
    "load_scored",
    "merged",
    "shard_name",
    "shard_note",
    "write_card",
    "write_shard",
]

DATA = "data"
PROVENANCE_FILE = "star_dss.json"
_NOTE = b"star_dss"
_NAME = re.compile(r"train-(\d{5,})-of-(\d{5,})\.parquet")
_SUMS = (
    "rows",
    "responses",
    "prefixes",
    "trained_tokens",
    "raw_contexts",
    "truncated_contexts",
    "guard_errors",
)
_MERGED = ("mean_prefix_score", "label_mass", "attempts", "members", "disagreement")


def shard_name(index: int, shards: int) -> str:
    """The file name of a shard, as the hub numbers them."""
    return f"train-{index:05d}-of-{shards:05d}.parquet"


def write_shard(dataset: Dataset, path: Path) -> None:
    """Writes scored rows with their provenance as one parquet file, whole or not at all.

    Equal rows give equal bytes with equal versions of pyarrow.

    Raises:
        OutputError: It cannot be written.
    """
    table: pa.Table = dataset.with_format("arrow")[:]
    schema = dataset.features.arrow_schema
    note = json.dumps(provenance_of(dataset), sort_keys=True).encode()
    table = table.cast(schema).replace_schema_metadata({**(schema.metadata or {}), _NOTE: note})
    scratch = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with scratch.open("xb") as file:
                pq.write_table(table, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(scratch, path)
        except BaseException:
            scratch.unlink(missing_ok=True)
            raise


def shard_note(path: Path) -> dict[str, Any]:
    """The provenance of one shard, from the end of its file.

    Raises:
        DataError: It cannot be read.
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
        "run again: it makes that shard anew."
    )


def merged(notes: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The provenance of all shards together.

    Raises:
        DataError: They were not made in one way.
    """
    counted = {*_SUMS, *_MERGED}
    first = {name: value for name, value in notes[0].items() if name not in counted}
    for number, note in enumerate(notes):
        for name in {*first, *note} - counted:
            if note.get(name) != first.get(name):
                raise DataError(
                    f"Shard {number} was scored with {name} {note.get(name)!r}, shard 0 with "
                    f"{first.get(name)!r}. Remove the folder and score all of it in one way."
                )
    full = [note for note in notes if note["prefixes"]]
    if not full:
        raise DataError(
            f"None of the {sum(note['rows'] for note in notes)} rows has a response, so there is "
            "nothing to train. Check the columns, the chat template and max_length (a prompt that "
            "fills it leaves no response)."
        )
    prefixes = [note["prefixes"] for note in full]
    total = {name: sum(note[name] for note in notes) for name in _SUMS}
    found = {**first, **total, **_mean_of(full, prefixes), "attempts": _attempts(notes)}
    if "members" in full[0]:
        found["members"] = {
            name: _mean_of([note["members"][name] for note in full], prefixes)
            for name in full[0]["members"]
        }
        found["disagreement"] = {
            name: _weighted([note["disagreement"][name] for note in full], prefixes)
            for name in ("mean", "opposite")
        }
    return found


def _weighted(values: Sequence[float], prefixes: Sequence[int]) -> float:
    """A mean over the prefixes of each shard, over those of all."""
    return float(np.average(values, weights=prefixes))


def _mean_of(parts: Sequence[Mapping[str, Any]], prefixes: Sequence[int]) -> dict[str, Any]:
    """Scores and label mass of one guard, over all shards."""
    # A shard of which nothing could be scored has no label mass.
    known = [
        (part["label_mass"], n)
        for part, n in zip(parts, prefixes, strict=True)
        if part["label_mass"]
    ]
    return {
        "mean_prefix_score": _weighted([part["mean_prefix_score"] for part in parts], prefixes),
        "label_mass": {
            "mean": _weighted([mass["mean"] for mass, _ in known], [n for _, n in known]),
            "min": min(mass["min"] for mass, _ in known),
        }
        if known
        else None,
    }


def _attempts(notes: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Attempts to fool the guard, by kind; rows are counted from the first shard's first."""
    found: dict[str, Any] = {}
    start = 0
    for note in notes:
        for kind, what in note["attempts"].items():
            known = found.setdefault(kind, {"responses": 0, "rows": []})
            known["responses"] += what["responses"]
            known["rows"] = (known["rows"] + [start + row for row in what["rows"]])[:ROWS_NAMED]
        start += note["rows"]
    return found


def write_card(folder: Path, provenance: Mapping[str, Any]) -> None:
    """Writes `star_dss.json`, and a card from which `load_dataset` reads the same."""
    text = json.dumps(provenance, indent=2, sort_keys=True)
    (folder / PROVENANCE_FILE).write_text(text + "\n", encoding="utf-8")
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
                "description": describe("scores", provenance),
            },
        },
        allow_unicode=True,
        width=10**9,
    )
    (folder / "README.md").write_text(
        f"---\n{header}---\n\nScored with STAR-DSS by the guard `{provenance['guard']}`: "
        "`star_scores` has one score per token of `input_ids`.\n",
        encoding="utf-8",
    )


def is_sharded(folder: str | Path) -> bool:
    """Whether a folder was written as parquet shards, to its end."""
    path = Path(folder)
    return (path / PROVENANCE_FILE).is_file() and (path / DATA).is_dir()


@overload
def load_scored(folder: str | Path) -> Dataset: ...
@overload
def load_scored(folder: str | Path, *, streaming: Literal[False]) -> Dataset: ...
@overload
def load_scored(folder: str | Path, *, streaming: Literal[True]) -> IterableDataset: ...
def load_scored(folder: str | Path, *, streaming: bool = False) -> Dataset | IterableDataset:
    """The rows of a folder of shards, in their order, with their provenance.

    Args:
        folder: What `star-dss score --shard-rows` or `--ray` wrote.
        streaming: False: memory-mapped, after a conversion on disk. True: read from the shards as
            they are needed, in a training loop of your own (trainers need the former).

    Raises:
        DataError: It is no such folder, or a shard is missing.
    """
    path = Path(folder)
    if not is_sharded(path):
        raise DataError(
            f"{folder} is not a folder of scored shards: it lacks {PROVENANCE_FILE} or {DATA}/. "
            "Give the output of star-dss score --shard-rows; a folder NAME.incomplete is finished "
            "by starting the same command again."
        )
    files = sorted((path / DATA).glob("train-*.parquet"))
    found = [match for file in files if (match := _NAME.fullmatch(file.name))]
    indices, totals = [int(m[1]) for m in found], {int(m[2]) for m in found}
    if len(totals) != 1 or indices != list(range(*totals)):
        raise DataError(
            f"{folder} has {len(indices)} shards of {'/'.join(map(str, sorted(totals))) or '?'}: "
            "some are missing, or of another run. Copy the whole folder again."
        )
    dataset = load_dataset(
        "parquet", data_files=[str(file) for file in files], split="train", streaming=streaming
    )
    try:
        provenance = json.loads((path / PROVENANCE_FILE).read_text("utf-8"))
    except ValueError as error:
        raise DataError(f"{path / PROVENANCE_FILE} is damaged: {error}. Copy it again.") from error
    write_note(dataset, "scores", provenance)
    return dataset
