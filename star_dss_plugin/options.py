"""Define and validate the options, with the same names in Python, YAML and the command line.

`StarDSSOptions` combines the options of scoring and of the loss. Integrations derive from it, add
no options, and leave validation to it.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from star_dss_plugin.errors import ConfigError
from star_dss_plugin.validation import at_least, probability, unknown_name

if TYPE_CHECKING:
    from star_dss_plugin.loss import Shaping

__all__ = ["REFERENCES", "LossOptions", "ScoringOptions", "StarDSSOptions"]

_GUARD_ERRORS = ("raise", "unsafe")
_TRAJECTORIES = ("exact", "adaptive", "probed")
REFERENCES = ("auto", "adapter", "precomputed", "copy", "none")


def _option(default: Any, help_text: str) -> Any:
    return field(default=default, metadata={"help": help_text})


@dataclass
class ScoringOptions:
    """Define how responses are scored: the guard, its engine, chunks and prefixes.

    `score_dataset`, `star-dss score`, shards and both hosts use this class, and the flags of
    `star-dss score` are generated from it.

    Raises:
        ConfigError: From `validate`, for an invalid value or combination.
    """

    # `str` comes last before None so that HfArgumentParser reads a string from the command line.
    guard: dict[str, Any] | str | None = _option(
        None,
        "The guard model: a preset ('qwen3guard-gen-0.6b'), a plugin's guard, or a mapping that "
        "describes any causal guard or several of them (JSON on the command line). Required unless "
        "the data set already has a 'star_scores' column.",
    )
    engine: str = _option(
        "local",
        "What computes a verdict guard: 'local' (transformers, here), 'vllm' (in this process), or "
        "the address of a server that runs vLLM ('http://host:port').",
    )
    engine_options: dict[str, Any] | str | None = _option(
        None,
        "Options of 'vllm' (arguments of vllm.LLM) or of a server (concurrency, retries, "
        "max_requests, …), as a mapping (JSON on the command line).",
    )
    segmenter: str = _option(
        "tokens", "What a chunk is made of: 'tokens', 'words', 'sentences' or 'whole'."
    )
    chunk_size: int = _option(5, "M: how many units make a chunk; one score per chunk.")
    trajectory: str = _option(
        "exact",
        "'exact' scores every prefix; 'adaptive' only where the score moves or is not safe, and "
        "interpolates the others; 'probed' trains a probe on a sample, which scores a response in "
        "one pass, and asks the guard where the probe is not sure enough.",
    )
    trajectory_epsilon: float = _option(
        0.02, "ε in [0, 1] of trajectory='adaptive': what counts as moving, and as not safe."
    )
    probe_sample: int = _option(
        256, "For trajectory='probed': how many responses the probe learns from, at least 20."
    )
    probe_tolerance: float = _option(
        0.05,
        "For trajectory='probed', in (0, 1]: how far a score may be from the guard's. 95 of 100 "
        "scores of the probe are nearer, else the guard scores all prefixes.",
    )
    guard_device: str | None = _option(
        None, "Where the guard runs ('cuda', 'cpu'); by default the GPU if there is one."
    )
    guard_dtype: str = _option(
        "auto", "The guard's dtype: 'auto' (bfloat16 on a GPU, float32 on a CPU) or a torch name."
    )
    score_batch_tokens: int = _option(
        16384, "Token budget of one guard batch: bounds memory, does not change scores."
    )
    score_cache_dir: str | None = _option(
        None, "Folder of the score cache; default $STAR_DSS_CACHE or ~/.cache/star_dss."
    )
    on_guard_error: str = _option(
        "raise",
        "What happens to a response that the guard cannot score: 'raise' stops, 'unsafe' gives it "
        "the score 0. It never counts as safe.",
    )

    def validate(self) -> None:
        """Check every option against the registered names and its range.

        Raises:
            ConfigError: An option is invalid; the message says what to change.
        """
        # Imported here because they import torch, which would slow down `--help`.
        from star_dss_plugin.engines.selection import choose_engine
        from star_dss_plugin.guards.spec import parse_guard
        from star_dss_plugin.plugins import load_plugins

        _check_kinds(self, ScoringOptions)
        load_plugins().segmenter(self.segmenter)
        if self.guard is not None:
            parse_guard(self.guard)
        choose_engine(
            self.engine, self.engine_options, device=self.guard_device, dtype=self.guard_dtype
        )
        at_least("chunk_size", self.chunk_size, 1, integer=True)
        at_least("score_batch_tokens", self.score_batch_tokens, 1, integer=True)
        probability("trajectory_epsilon", self.trajectory_epsilon)
        if self.trajectory not in _TRAJECTORIES:
            raise unknown_name("trajectory", self.trajectory, _TRAJECTORIES)
        at_least("probe_sample", self.probe_sample, 20, integer=True)
        probability("probe_tolerance", self.probe_tolerance)
        if self.trajectory == "probed" and self.probe_tolerance == 0:
            raise ConfigError(
                "probe_tolerance is 0, and no probe is exact. Give a tolerance such as 0.05, or "
                "use trajectory='exact'."
            )
        if self.trajectory == "probed" and self.engine != "local":
            raise ConfigError(
                f"trajectory is 'probed' and engine is {self.engine!r}: a probe reads the guard's "
                "hidden states, which vLLM and servers do not give. Use engine='local', or "
                "trajectory='exact' or 'adaptive'."
            )
        if self.on_guard_error not in _GUARD_ERRORS:
            raise unknown_name("on_guard_error", self.on_guard_error, _GUARD_ERRORS)

    def scoring(self, **changes: Any) -> ScoringOptions:
        """Return a copy as plain `ScoringOptions`, without a subclass's options.

        Args:
            **changes: Options to change, by name.

        Raises:
            ConfigError: There is no scoring option of that name.
        """
        known = {f.name: getattr(self, f.name) for f in fields(ScoringOptions)}
        for name in changes:
            if name not in known:
                raise unknown_name("scoring option", name, known)
        return ScoringOptions(**{**known, **changes})


@dataclass
class LossOptions:
    """Define how scores shape the loss; docs/method.md explains the symbols (paper, Eq. 3).

    Raises:
        ConfigError: From `validate`, for an invalid value or combination.
    """

    loss_type: str = _option(
        "star_dss",
        "How scores shape the loss: 'star_dss' (the paper's method), 'hard', 'static', "
        "'rejection', 'kl_only', 'sft', or a weight map of a plugin. A trainer's own loss types "
        "keep their meaning and switch STAR-DSS off.",
    )
    kl_coef: float = _option(0.5, "λ >= 0: weight of the KL term to the reference.")
    kl_estimator: str = _option(
        "k2", "Estimator of the KL term: 'k1', 'k2', 'k3' (one number per token) or 'full'."
    )
    threshold: float = _option(
        0.5,
        "τ in [0, 1]: scores below it count as unsafe in 'hard', 'rejection' and in the metrics.",
    )
    score_eval: bool = _option(
        True,
        "Whether evaluation data is scored too; if not, every token of it counts as safe (unless "
        "it came with scores).",
    )
    stream_buffer: int = _option(
        512,
        "n >= 1: of a streamed data set, n rows are read and scored together whenever training "
        "needs more rows.",
    )
    kl_warmup_steps: int = _option(
        0, "n >= 0: λ grows linearly to kl_coef over the first n optimizer steps."
    )
    unsafe_lookahead: int = _option(
        0,
        "n >= 0: the n chunks before a response's first unsafe one get at most its score, because "
        "a guard notices harm late.",
    )
    monotone: bool = _option(
        False, "Whether scores never rise again after a response's first unsafe chunk."
    )
    reference: str = _option(
        "auto",
        "The frozen reference: 'auto', 'precomputed' (log-probabilities of the model as it starts, "
        "computed once), 'adapter' (the base model, by switching the adapter off), 'copy' (a "
        "frozen copy), 'none', or the id or folder of a model with the same tokenizer.",
    )

    def validate(self) -> None:
        """Check every option against the registered names and its range.

        Raises:
            ConfigError: An option is invalid; the message says what to change.
        """
        from star_dss_plugin.logprobs import KL_ESTIMATORS
        from star_dss_plugin.smollm2 import SMOLLM2

        _check_kinds(self, LossOptions)
        self.shaping()
        if self.kl_estimator not in KL_ESTIMATORS:
            raise unknown_name("kl_estimator", self.kl_estimator, KL_ESTIMATORS)
        at_least("kl_coef", self.kl_coef, 0)
        at_least("stream_buffer", self.stream_buffer, 1, integer=True)
        at_least("kl_warmup_steps", self.kl_warmup_steps, 0, integer=True)
        at_least("unsafe_lookahead", self.unsafe_lookahead, 0, integer=True)
        probability("threshold", self.threshold)
        known = (*REFERENCES, SMOLLM2)
        if self.reference not in known and not _looks_like_a_model(self.reference):
            raise unknown_name("reference", self.reference, [*known, "<a model id or folder>"])

    def shaping(self) -> Shaping:
        """Return how scores become weights: the weight map of `loss_type`, with λ and τ.

        Raises:
            ConfigError: No weight map is called `loss_type`.
        """
        from star_dss_plugin.loss import Shaping

        return Shaping.named(self.loss_type, kl_coef=self.kl_coef, threshold=self.threshold)


@dataclass
class StarDSSOptions(ScoringOptions, LossOptions):
    """Define a STAR-DSS run: how its data is scored, and how scores shape the loss.

    Raises:
        ConfigError: From `validate`, for an invalid value or combination.
    """

    def validate(self) -> None:
        """Check every option against the registered names and its range.

        Raises:
            ConfigError: An option is invalid; the message says what to change.
        """
        ScoringOptions.validate(self)
        LossOptions.validate(self)

    def star_dss_dict(self) -> dict[str, Any]:
        """Return the options of `StarDSSOptions` by name, without a subclass's fields."""
        return {f.name: getattr(self, f.name) for f in fields(StarDSSOptions)}


def _check_kinds(options: Any, cls: type) -> None:
    """Check the types of the string and boolean options that a class declares."""
    # `fields` is not used because HfArgumentParser replaces their annotations by evaluated types.
    for name, kind in cls.__annotations__.items():
        _check_kind(name, getattr(options, name), kind)


def _check_kind(name: str, value: Any, annotation: str) -> None:
    """Check the type of a string or boolean, for which YAML may give a number, list or "no"."""
    if annotation == "bool" and not isinstance(value, bool):
        raise ConfigError(f"{name} is {value!r}; it must be true or false, without quotes.")
    if annotation == "str" and not isinstance(value, str):
        raise ConfigError(f"{name} is {value!r}; it must be a text.")
    if annotation == "str | None" and not isinstance(value, str | PathLike | None):
        raise ConfigError(f"{name} is {value!r}; it must be a text, or nothing.")


def _looks_like_a_model(name: str) -> bool:
    """Return whether a name is a hub id (has a slash) or a folder, not a misspelt keyword."""
    try:
        return "/" in name or Path(name).is_dir()
    except OSError:  # the name is too long for a path
        return False
