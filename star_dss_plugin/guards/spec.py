"""Parse the value of the option `guard`, and list the values that it can have."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from star_dss_plugin.errors import ConfigError
from star_dss_plugin.plugins import load_plugins
from star_dss_plugin.validation import json_mapping, unknown_name

__all__ = ["missing_guard", "parse_guard"]


def parse_guard(guard: str | Mapping[str, Any]) -> tuple[str | None, dict[str, Any]]:
    """Split a `guard` value into a registered name and options.

    Args:
        guard: A name, a mapping, or a mapping as JSON.

    Returns:
        The name, or None if the options describe a causal guard or an ensemble; and the options.

    Raises:
        ConfigError: The value has another type or form, or no guard of that name is registered.
    """
    if isinstance(guard, str) and guard.lstrip().startswith("{"):
        guard = json_mapping("guard", guard)
    if not isinstance(guard, str | Mapping):
        raise ConfigError(
            f"guard is {guard!r}; give the name of a guard, or a mapping that describes one."
        )
    options: dict[str, Any] = {} if isinstance(guard, str) else dict(guard)
    name = guard if isinstance(guard, str) else options.pop("preset", None)
    if strange := [key for key in options if not isinstance(key, str)]:
        raise ConfigError(f"guard has the key {strange[0]!r}; its keys are the names of options.")
    known = load_plugins().names("guard")
    if name is not None and name not in known:
        raise unknown_name("guard", name, known)
    if "guards" in options:
        members = options["guards"]
        if name is not None or isinstance(members, str) or not isinstance(members, Sequence):
            raise ConfigError(
                f"guard is {guard!r}; with 'guards' it takes a list of guards, 'combine' and "
                "'calibration', and no 'preset'."
            )
        for member in members:
            parse_guard(member)
    calibration = options.get("calibration", {})
    if not isinstance(calibration, Mapping) or not all(isinstance(k, str) for k in calibration):
        raise ConfigError(
            f"calibration is {options['calibration']!r}; give a mapping with 'temperature' and "
            "'threshold', as `star-dss guards calibrate` prints it."
        )
    return name, options


def missing_guard() -> ConfigError:
    """Return the error for a run without a guard, with a list of the registered guards."""
    entries = load_plugins().entries("guard")
    listed = "\n".join(
        f"  {e.name}: {', '.join(filter(None, (e.summary, e.info.terms)))}" for e in entries
    )
    return ConfigError(
        "No guard was given, and the data has no 'star_scores' column. STAR-DSS needs a guard to "
        "score the responses; it never picks one for you. Set guard to one of\n"
        f"{listed}\nor to a mapping with model, safe_labels and unsafe_labels."
    )
