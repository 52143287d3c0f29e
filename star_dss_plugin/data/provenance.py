"""Note in a data set how its columns were made: one JSON line each in its description.

A description stays with a data set through `map`, `select` and `save_to_disk`; a column that was
made elsewhere has none.
"""

from __future__ import annotations

import json
from typing import Any

from datasets import Dataset

from star_dss_plugin.errors import DataError

__all__ = [
    "PROVENANCE_FILE",
    "damaged_note",
    "describe",
    "notes",
    "provenance_of",
    "provenances_of",
    "read_note",
    "remove_note",
    "write_note",
]

_MARK = "star_dss "
_NOTED: dict[str, type] = {  # what readers of a note on scores rely on
    "guard": str,
    "demonstration_guard": bool,
    "guard_identity": dict,
    "segmenter": str,
    "chunk_size": int,
    "responses": int,
    "raw_contexts": int,
}


def notes(dataset: Dataset, name: str) -> list[Any]:
    """Return the JSON values noted under a name: several if data sets were joined."""
    mark = f"{_MARK}{name}: "
    found = []
    description = dataset.info.description or ""
    if not isinstance(description, str):  # a file may say anything
        raise damaged_note(name)
    for line in description.splitlines():
        if line.startswith(mark):
            try:
                found.append(json.loads(line.removeprefix(mark)))
            except (ValueError, RecursionError) as error:
                raise damaged_note(name) from error
    return found


def read_note(dataset: Dataset, name: str) -> Any:
    """Return the first JSON value noted under a name; None if there is none."""
    return next(iter(notes(dataset, name)), None)


def write_note(dataset: Dataset, name: str, value: Any) -> None:
    """Note a JSON value under a name, in place of what was noted there."""
    remove_note(dataset, name)
    lines = (dataset.info.description or "").splitlines()
    dataset.info.description = "\n".join([*lines, describe(name, value)])


def remove_note(dataset: Dataset, name: str) -> None:
    """Remove what is noted under a name."""
    mark = f"{_MARK}{name}: "
    lines = (dataset.info.description or "").splitlines()
    kept = [line for line in lines if not line.startswith(mark)]
    dataset.info.description = "\n".join(kept)


def describe(name: str, value: Any) -> str:
    """Return the line of a description that notes a JSON value under a name."""
    return f"{_MARK}{name}: {json.dumps(value, sort_keys=True)}"


def provenance_of(dataset: Dataset) -> dict[str, Any] | None:
    """Return how a data set's `star_scores` were made; None if it does not say.

    Returns:
        JSON values by name, such as `guard` and `guard_identity`, `segmenter` and `chunk_size`,
        the counts `rows`, `responses`, `prefixes` and `trained_tokens`, `mean_prefix_score` in
        [0, 1], `label_mass`, `attempts` to fool the guard, and `versions`.

    Raises:
        DataError: What it says is damaged.
    """
    return next(iter(provenances_of(dataset)), None)


def provenances_of(dataset: Dataset) -> list[dict[str, Any]]:
    """Return what `provenance_of` does, one entry for each source of a concatenated data set.

    Raises:
        DataError: What one of them says is damaged.
    """
    found = notes(dataset, "scores")
    for one in found:
        if (
            not isinstance(one, dict)
            or not all(isinstance(one.get(key), kind) for key, kind in _NOTED.items())
            or one["chunk_size"] < 1
        ):
            raise damaged_note("scores")
    return found


def damaged_note(name: str) -> DataError:
    """Make the error for a note that another program wrote, or that was changed."""
    return DataError(
        f"What the data set's description notes as {_MARK + name!r} is not what this package "
        "writes there. Score the data again, or clear dataset.info.description if you trust the "
        "scores all the same."
    )


PROVENANCE_FILE = "star_dss.json"
