"""Columns of media, whose values name files: refuse them, or leave the files closed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from copy import copy
from typing import Any

from datasets import Dataset, DatasetInfo, Features, Json, LargeList, List

from star_dss_plugin.errors import DataError

__all__ = ["check_features", "undecoded"]


def check_features(
    features: Mapping[str, Any], source: str = "", columns: Iterable[str] | None = None
) -> None:
    """Check that no column holds images, sounds or the like.

    Args:
        features: Of the data set.
        source: The file or folder, for the message.
        columns: Which of them are read; None: all.

    Raises:
        DataError: One does: its files would be opened, and copied into whatever is written.
    """
    for name in features if columns is None else columns:
        if _names_files(features[name]):
            raise DataError(
                f"the column is {features[name]}, whose values name files to be opened. Only text "
                "can be scored: remove the column."
            ).at(file=source, field=name)


def _names_files(feature: Any) -> bool:
    """Tell whether a column holds media, at any depth."""
    if isinstance(feature, List | LargeList):
        return _names_files(feature.feature)
    if isinstance(feature, dict):
        return any(map(_names_files, feature.values()))
    return hasattr(feature, "decode_example") and not isinstance(feature, Json)


def undecoded(dataset: Dataset) -> Dataset:
    """Return the same rows as plain Python values; no file that they name is opened when read."""
    closed = Features({name: _closed(feature) for name, feature in dataset.features.items()})
    # The same table under other features: to cast a column would be to copy all images.
    return Dataset(dataset.data, DatasetInfo(features=closed), indices_table=dataset._indices)


def _closed(feature: Any) -> Any:
    """Return a feature whose images, sounds and videos stay as they are stored, at any depth."""
    if isinstance(feature, List | LargeList):
        feature = copy(feature)
        feature.feature = _closed(feature.feature)
        return feature
    if isinstance(feature, dict):
        return {name: _closed(value) for name, value in feature.items()}
    if getattr(feature, "decode", False) and not isinstance(feature, Json):
        feature = copy(feature)
        feature.decode = False
    return feature
