"""Check a configuration file: what it asks for, and everything that would stop it."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import yaml

from star_dss_plugin.errors import ConfigError, PluginError
from star_dss_plugin.training.preflight import Findings

__all__ = ["check_config"]


def check_config(path: Path, *, data: bool) -> Findings:
    """Checks a YAML for Axolotl (it names a `base_model`) or for TRL.

    Args:
        path: The file.
        data: Whether to load and tokenize the data, to say what scoring it would ask of the guard.

    Raises:
        StarDSSError: The file cannot be read, or its host framework is not installed.
    """
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    # Bytes that are no UTF-8 and dates that are no dates are ValueErrors; brackets can be too deep.
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise ConfigError(f"{path} cannot be read: {error}. Give a YAML file.") from error
    if not isinstance(raw, dict):
        raise ConfigError(f"{path} holds a {type(raw).__name__}. Give a YAML file with options.")
    if strange := [key for key in raw if not isinstance(key, str)]:
        raise ConfigError(f"{path} has the key {strange[0]!r}; keys are the names of options.")
    host = "axolotl" if {"base_model", "plugins", "star_dss"} & set(raw) else "trl"
    try:
        integration: Any = importlib.import_module(f"star_dss_{host}.check")
    except (ImportError, RuntimeError) as error:
        raise PluginError(
            f"{path} is a configuration for {host}, which cannot be imported here ({error}). "
            f"Install it with: pip install 'star-dss-plugin[{host}]'"
        ) from error
    found: Findings = integration.check(path, raw, data=data)
    return found
