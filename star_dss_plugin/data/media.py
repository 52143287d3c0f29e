"""Refuse columns of media: their values name files, which would be opened."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from datasets import Json, LargeList, List

from star_dss_plugin.errors import DataError

__all__ = ["check_features"]


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
