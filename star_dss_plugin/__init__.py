"""STAR-DSS: finetuning that keeps a model's safety (Peng et al., NeurIPS 2025, arXiv 2505.17196).

A guard scores every prefix of every response. Safe tokens are trained with cross-entropy, and
unsafe tokens are kept close to a frozen reference. Names are imported on first use, so that
importing this package loads no framework.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from star_dss_plugin._version import __version__
from star_dss_plugin.errors import (
    CacheError,
    CheckpointError,
    ConfigError,
    DataError,
    GuardError,
    OutputError,
    PluginError,
    StarDSSError,
)
from star_dss_plugin.hookspecs import hookimpl

if TYPE_CHECKING:
    from star_dss_plugin.data.files.parquet_shards import load_scored
    from star_dss_plugin.data.provenance import provenance_of
    from star_dss_plugin.data.requests import PrefixRequest, Trajectory
    from star_dss_plugin.evaluate.probe import SafetyProbe
    from star_dss_plugin.guards.base import Guard, StreamingGuard
    from star_dss_plugin.guards.loading import load_guard
    from star_dss_plugin.loss import ShapedLoss, star_dss_loss
    from star_dss_plugin.options import StarDSSOptions
    from star_dss_plugin.report.inspection import inspect_row
    from star_dss_plugin.scoring.scorer import score_dataset
    from star_dss_plugin.segmenters import Segmenter
    from star_dss_plugin.smollm2 import resolve_model
    from star_dss_plugin.training.attach import attach
    from star_dss_plugin.training.callback import StarDSSCallback
    from star_dss_plugin.training.mixin import StarDSSMixin
    from star_dss_plugin.weights import WeightMap

__all__ = [
    "CacheError",
    "CheckpointError",
    "ConfigError",
    "DataError",
    "Guard",
    "GuardError",
    "OutputError",
    "PluginError",
    "PrefixRequest",
    "SafetyProbe",
    "Segmenter",
    "ShapedLoss",
    "StarDSSCallback",
    "StarDSSError",
    "StarDSSMixin",
    "StarDSSOptions",
    "StreamingGuard",
    "Trajectory",
    "WeightMap",
    "__version__",
    "attach",
    "hookimpl",
    "inspect_row",
    "load_guard",
    "load_scored",
    "provenance_of",
    "resolve_model",
    "score_dataset",
    "star_dss_loss",
]

_HOMES = {
    "Guard": "guards.base",
    "PrefixRequest": "data.requests",
    "SafetyProbe": "evaluate.probe",
    "Segmenter": "segmenters",
    "ShapedLoss": "loss",
    "StarDSSCallback": "training.callback",
    "StarDSSMixin": "training.mixin",
    "StarDSSOptions": "options",
    "StreamingGuard": "guards.base",
    "Trajectory": "data.requests",
    "WeightMap": "weights",
    "attach": "training.attach",
    "inspect_row": "report.inspection",
    "load_guard": "guards.loading",
    "load_scored": "data.files.parquet_shards",
    "provenance_of": "data.provenance",
    "resolve_model": "smollm2",
    "score_dataset": "scoring.scorer",
    "star_dss_loss": "loss",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(f"star_dss_plugin.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
