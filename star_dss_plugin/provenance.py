"""What a data set says of its own columns: one JSON line each in its description.

A description stays with a data set through `map`, `select` and `save_to_disk`; a column that was
made elsewhere has none.
"""

from __future__ import annotations

import json
from typing import Any

from datasets import Dataset

__all__ = ["provenance_of", "read_note", "write_note"]

_MARK = "star_dss "


def read_note(dataset: Dataset, name: str) -> Any:
    """The JSON value noted under a name; None if there is none."""
    mark = f"{_MARK}{name}: "
    for line in (dataset.info.description or "").splitlines():
        if line.startswith(mark):
            return json.loads(line.removeprefix(mark))
    return None


def write_note(dataset: Dataset, name: str, value: Any) -> None:
    """Notes a JSON value under a name, in place of what was noted there."""
    mark = f"{_MARK}{name}: "
    lines = (dataset.info.description or "").splitlines()
    kept = [line for line in lines if not line.startswith(mark)]
    dataset.info.description = "\n".join([*kept, mark + json.dumps(value, sort_keys=True)])


def provenance_of(dataset: Dataset) -> dict[str, Any] | None:
    """How a data set's `star_scores` were made; None if it does not say."""
    found = read_note(dataset, "scores")
    assert found is None or isinstance(found, dict)
    return found
