"""Reject columns of media, whose values name files, or read them without opening the files."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from copy import copy
from typing import Any

from datasets import Dataset, DatasetInfo, Features, Json, LargeList, List

from star_dss_plugin.errors import DataError

__all__ = ["check_features", "without_decoding"]


def check_features(
    features: Mapping[str, Any], source: str = "", columns: Iterable[str] | None = None
) -> None:
    """Check that no column contains images, audio or video.

    Args:
        features: The data set's features.
        source: The file or folder, for the message.
        columns: The columns to check; None: all.

    Raises:
        DataError: A column does. Reading it would open the files that its values name, and writing
            the data would copy them.
    """
    for name in features if columns is None else columns:
        if _names_files(features[name]):
            raise DataError(
                f"the column is {features[name]}, whose values name files to be opened. Only text "
                "can be scored: remove the column."
            ).at(file=source, field=name)


def _names_files(feature: Any) -> bool:
    """Return whether a feature contains media, at any depth."""
    if isinstance(feature, List | LargeList):
        return _names_files(feature.feature)
    if isinstance(feature, dict):
        return any(map(_names_files, feature.values()))
    return hasattr(feature, "decode_example") and not isinstance(feature, Json)


def without_decoding(dataset: Dataset) -> Dataset:
    """Return the same rows as plain Python values, without opening files that they name."""
    features = Features(
        {name: _feature_without_decoding(feature) for name, feature in dataset.features.items()}
    )
    # The table is reused with other features, because casting a column would copy all images.
    return Dataset(dataset.data, DatasetInfo(features=features), indices_table=dataset._indices)


def _feature_without_decoding(feature: Any) -> Any:
    """Return a feature with decoding of media switched off, at any depth."""
    if isinstance(feature, List | LargeList):
        feature = copy(feature)
        feature.feature = _feature_without_decoding(feature.feature)
        return feature
    if isinstance(feature, dict):
        return {name: _feature_without_decoding(value) for name, value in feature.items()}
    if getattr(feature, "decode", False) and not isinstance(feature, Json):
        feature = copy(feature)
        feature.decode = False
    return feature
