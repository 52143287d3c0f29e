"""Build guards from their names and options."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from star_dss_plugin.errors import ConfigError, PluginError
from star_dss_plugin.guards.base import Guard
from star_dss_plugin.guards.combined import CalibratedGuard, EnsembleGuard
from star_dss_plugin.guards.spec import parse_guard
from star_dss_plugin.plugins import load_plugins

__all__ = ["load_guard"]


def load_guard(
    guard: str | Mapping[str, Any],
    *,
    device: str | None = None,
    dtype: str | None = None,
    batch_tokens: int = 16384,
    engine: str = "local",
    engine_options: Mapping[str, Any] | str | None = None,
) -> Guard:
    """Build a guard from a name or a description; its weights are loaded on first use.

    Args:
        guard: A registered name (`star-dss plugins` lists them), or a mapping: `{"preset": NAME,
            …}` changes options of a registered guard; a mapping without "preset" describes any
            causal guard with the options of `VerdictGuard` (`model`, `safe_labels`,
            `unsafe_labels`, `prefill`, `template_kwargs`, …); `{"guards": [...], "combine":
            "mean"}` combines several guards, each a name or a mapping ("mean" or "min" of their
            scores). The key `"calibration": {"temperature": T, "threshold": θ}` calibrates the
            scores of any mapping (`star-dss guards calibrate`). A mapping may be given as JSON.
        device: Torch device; None is the GPU if there is one.
        dtype: "auto" or the name of a torch dtype.
        batch_tokens: Upper bound on the tokens of one forward pass, padding included.
        engine: Engine of a verdict guard: "local", "vllm", or a server's `http://host:port`.
        engine_options: Options of that engine (docs/scale.md), as a mapping or JSON.

    Returns:
        A guard. `guard.score(conversations)` returns P(safe) of each last assistant turn,
        `guard.trajectories(requests)` the scores of all prefixes.

    Raises:
        ConfigError: Unknown name or option.
        GuardError: The guard cannot be loaded.
        PluginError: A plugin built something else than a guard.
    """
    name, options = parse_guard(guard)
    common: dict[str, Any] = {"device": device, "dtype": dtype, "batch_tokens": batch_tokens}
    if engine != "local" or engine_options:
        common |= {"engine": engine, "engine_options": engine_options}
    if (calibration := options.pop("calibration", None)) is not None:
        inner = load_guard({"preset": name, **options} if name else options, **common)
        return _built(CalibratedGuard, "calibration", inner, **calibration)
    if "guards" in options:
        members = [load_guard(member, **common) for member in options.pop("guards")]
        return _built(EnsembleGuard, "guards", members, **options)
    if name is None:
        from star_dss_plugin.guards.verdict import VerdictGuard

        needed = ["model", "safe_labels"]
        needed += [] if "labels_from" in options else ["unsafe_labels"]
        missing = [key for key in needed if key not in options]
        if missing:
            raise ConfigError(
                f"The guard's mapping with {', '.join(options) or 'nothing in it'} lacks "
                f"{', '.join(missing)}. Name a 'preset', or describe the guard with 'model', "
                "'safe_labels' and 'unsafe_labels'."
            )
        target: Any = VerdictGuard
    else:
        target = load_plugins().guard(name)
        if "engine" in {**common, **options} and not load_plugins().guard_info(name).takes_engine:
            raise ConfigError(
                f"Guard {name!r} computes by itself and takes no engine. "
                "Leave engine and engine_options out, or use a guard that answers with a verdict."
            )
    made = _built(target, f"guard {name or options['model']!r}", **{**common, **options})
    if not isinstance(made, Guard):
        raise PluginError(
            f"Guard {name!r} made a {type(made).__name__}, not a star_dss_plugin Guard. Derive it "
            "from Guard or StreamingGuard in star_dss_plugin.guards.base."
        )
    return made


def _built(target: Any, what: str, /, *args: Any, **options: Any) -> Guard:
    """Build a guard from a class or factory and its options.

    Raises:
        ConfigError: `target` does not take the options. The message leaves their values out,
            because one may be an API key.
    """
    try:
        made: Guard = target(*args, **options)
    except TypeError as error:
        raise ConfigError(
            f"The options {', '.join(options) or '(none)'} of {what} cannot be used: {error}. "
            "Correct it, or leave it out."
        ) from error
    return made
