"""Record in a data set's description how its columns were made, as one JSON line per note.

`map`, `select` and `save_to_disk` keep the description. A column that was made elsewhere has no
note.
"""

from __future__ import annotations

import json
from typing import Any

from datasets import Dataset

from star_dss_plugin.errors import DataError

__all__ = [
    "PROVENANCE_FILE",
    "damaged_note",
    "note_line",
    "provenance_of",
    "provenances_of",
    "read_note",
    "read_notes",
    "remove_note",
    "write_note",
]

_MARK = "star_dss "
_NOTED: dict[str, type] = {  # fields that every reader of the "scores" note needs
    "guard": str,
    "demonstration_guard": bool,
    "guard_identity": dict,
    "segmenter": str,
    "chunk_size": int,
    "responses": int,
    "raw_contexts": int,
}


def read_notes(dataset: Dataset, name: str) -> list[Any]:
    """Return the JSON values noted under a name: several if data sets were concatenated.

    Raises:
        DataError: A note is damaged.
    """
    mark = f"{_MARK}{name}: "
    found = []
    description = dataset.info.description or ""
    if not isinstance(description, str):  # it comes from a file, and may be anything
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
    return next(iter(read_notes(dataset, name)), None)


def write_note(dataset: Dataset, name: str, value: Any) -> None:
    """Note a JSON value under a name, replacing earlier notes."""
    remove_note(dataset, name)
    lines = (dataset.info.description or "").splitlines()
    dataset.info.description = "\n".join([*lines, note_line(name, value)])


def remove_note(dataset: Dataset, name: str) -> None:
    """Remove the notes under a name."""
    mark = f"{_MARK}{name}: "
    lines = (dataset.info.description or "").splitlines()
    kept = [line for line in lines if not line.startswith(mark)]
    dataset.info.description = "\n".join(kept)


def note_line(name: str, value: Any) -> str:
    """Return a note as a line of a description."""
    return f"{_MARK}{name}: {json.dumps(value, sort_keys=True)}"


def provenance_of(dataset: Dataset) -> dict[str, Any] | None:
    """Return how a data set's `star_scores` were made; None if it has no note on them.

    Returns:
        JSON values by name, such as `guard` and `guard_identity`, `segmenter` and `chunk_size`,
        the counts `rows`, `responses`, `prefixes` and `trained_tokens`, `mean_prefix_score` in
        [0, 1], `label_mass`, `attempts` to fool the guard, and `versions`.

    Raises:
        DataError: The note is damaged.
    """
    return next(iter(provenances_of(dataset)), None)


def provenances_of(dataset: Dataset) -> list[dict[str, Any]]:
    """Return the result of `provenance_of` for each source of a concatenated data set.

    Raises:
        DataError: A note is damaged.
    """
    found = read_notes(dataset, "scores")
    for one in found:
        if (
            not isinstance(one, dict)
            or not all(isinstance(one.get(key), kind) for key, kind in _NOTED.items())
            or one["chunk_size"] < 1
        ):
            raise damaged_note("scores")
    return found


def damaged_note(name: str) -> DataError:
    """Return the error for a note that another program wrote or changed."""
    return DataError(
        f"What the data set's description notes as {_MARK + name!r} is not what this package "
        "writes there. Score the data again, or clear dataset.info.description if you trust the "
        "scores anyway."
    )


PROVENANCE_FILE = "star_dss.json"
