"""Declare the four hooks, and the objects that a plugin registers through them.

A plugin is a package with an entry point in the group `star_dss` that names a module (or object)
with any of these functions, each marked with `hookimpl`. The built-in guards, segmenters, weight
maps and integrations are registered with the same functions::

    from star_dss_plugin import hookimpl

    @hookimpl
    def star_dss_register_guards(register):
        register("word-list", "my_package.guard:WordListGuard", summary="P(safe) by a word list")
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol, get_args

import pluggy

__all__ = [
    "ENTRY_POINT_GROUP",
    "HOST_COMMANDS",
    "Check",
    "Findings",
    "GuardInfo",
    "Integration",
    "Register",
    "RegisterGuard",
    "RegisterIntegration",
    "RowForm",
    "Start",
    "Starter",
    "hookimpl",
    "hookspec",
    "star_dss_register_guards",
    "star_dss_register_integrations",
    "star_dss_register_segmenters",
    "star_dss_register_weight_maps",
]

ENTRY_POINT_GROUP = "star_dss"

HOST_COMMANDS = ("sft", "demo")
"""The commands of `star-dss` that an integration runs."""

hookspec = pluggy.HookspecMarker("star_dss")
hookimpl = pluggy.HookimplMarker("star_dss")

Reads = Literal["shared", "once", "again"]


@dataclass(frozen=True)
class GuardInfo:
    """Describe a guard for users before its weights are loaded.

    `star-dss guards` lists these facts, `star-dss check` estimates costs with them, and the option
    `engine` is rejected for a guard without `takes_engine`. Every field is optional.

    Attributes:
        licence: The licence of the weights; empty: not stated.
        gated: Whether the hub asks for a login and an agreement.
        billions: Parameters, in units of 10⁹; None: not stated.
        f1: Published F1 for harmful whole responses, in percent; None: none published.
        reads: How the guard reads a response. "shared": prefixes share one forward pass, and each
            adds `per_prefix` tokens; "once": one pass scores all prefixes; "again": each prefix is
            read from its beginning; None: not stated.
        per_prefix: With "shared", about how many tokens of the guard's prompt follow each prefix;
            None: not known without the guard's files.
        takes_engine: Whether the guard accepts the options `engine` and `engine_options`.

    Raises:
        ValueError: A field is out of range, or contradicts another.
    """

    licence: str = ""
    gated: bool = False
    billions: float | None = None
    f1: float | None = None
    reads: Reads | None = None
    per_prefix: int | None = None
    takes_engine: bool = False

    def __post_init__(self) -> None:
        if self.reads not in (*get_args(Reads), None):
            raise ValueError(f"reads is {self.reads!r}; give one of {get_args(Reads)}, or None")
        if self.per_prefix is not None and (self.reads != "shared" or self.per_prefix < 0):
            raise ValueError(
                f"per_prefix is {self.per_prefix!r} and reads is {self.reads!r}; give per_prefix, "
                "at least 0, with reads='shared' only"
            )
        if self.billions is not None and not self.billions > 0:
            raise ValueError(f"billions is {self.billions!r}; give a positive number, or None")
        if self.f1 is not None and not 0 <= self.f1 <= 100:
            raise ValueError(f"f1 is {self.f1!r}; give a percentage in [0, 100], or None")

    @property
    def cost(self) -> str:
        """Describe what each further prefix costs."""
        if self.reads is None:
            return "not stated"
        if self.reads == "shared":
            return "not known" if self.per_prefix is None else f"≈ {self.per_prefix} tokens"
        return "none (one pass)" if self.reads == "once" else "all again"

    @property
    def terms(self) -> str:
        """Describe the terms of the weights; empty if nothing is stated."""
        words = [self.licence, "gated" if self.gated else "ungated"]
        return ", ".join(words) if self.licence or self.gated else ""


@dataclass
class Findings:
    """Collect the results of a check.

    Attributes:
        notes: What the run would do.
        problems: What would stop the run or turn it into plain finetuning, each with its remedy.
    """

    notes: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


class Check(Protocol):
    """Check a configuration of a host framework."""

    def __call__(self, path: Path, raw: dict[str, Any], *, data: bool) -> Findings:
        """Find everything that would stop a run or turn it into plain finetuning.

        Args:
            path: The file, for messages or for the host's own parser.
            raw: The file's contents from `yaml.safe_load`; all keys are strings.
            data: Whether to load the data and estimate the cost of scoring it.

        Raises:
            StarDSSError: The check cannot continue.
        """
        ...


RowForm = Literal["messages", "conversations", "prompt-completion", "text", "scored"]
"""The form of a data set's rows; see `Start`."""


@dataclass(frozen=True)
class Start:
    """Hold the answers to `star-dss init` and what it detected, for writing a first configuration.

    Attributes:
        model: Hugging Face Hub id or folder of the model, or "smollm2".
        data: File, folder or id of the data, as it was given, or "demo".
        file: Path of the data file; for "demo" the file in the package; None if `data` is no file.
        folder: The kind of folder: "saved" (written by `save_to_disk`), "splits" (saved with
            several splits), "shards" (written by `star-dss score --shard-rows`) or "files" (of data
            files); None if `data` is no folder.
        form: The form of the rows: a column `messages`; ShareGPT's `conversations`; texts or
            messages in `prompt` and `completion`; `text`; or tokens with `star_scores`.
        keys: The keys of a message, if the rows are conversations.
        guard: A registered guard or its mapping; None for scored data.
        gpu: Whether there is a GPU.
    """

    model: str
    data: str
    file: Path | None
    folder: Literal["saved", "splits", "shards", "files"] | None
    form: RowForm
    keys: frozenset[str]
    guard: str | Mapping[str, Any] | None
    gpu: bool


@dataclass(frozen=True)
class Starter:
    """Describe a file that `star-dss init --host NAME` writes.

    Attributes:
        file: The file's default name ("run.yaml").
        write: Given a `Start`, returns the file's text; raises a ConfigError for what the host
            cannot run.
        then: The commands to run next; "{file}" stands for the file.
        summary: A short description.
    """

    file: str
    write: str | Callable[[Start], str]
    then: tuple[str, ...]
    summary: str = ""


@dataclass(frozen=True)
class Integration:
    """Describe the integration of a host framework.

    Targets are "module:object" (or the object itself) and are imported on first use, so that an
    integration can be registered, and tell how to install its host, without the host installed.

    Attributes:
        host: The host's distribution name for pip.
        versions: The tested versions of the host, as a PEP 440 specifier (">=1.9,<2").
        install: The argument of `pip install` that installs the host with this integration.
        trainer: The trainer, or the class that the host loads as its plugin.
        options: The class with the options of `StarDSSOptions` as users of this host write them.
        configuration: A short description of the host's configuration file.
        claims: Returns whether a parsed YAML mapping is a configuration of this host. It must not
            import the host.
        check: The `Check` for these configurations.
        commands: Targets for `HOST_COMMANDS`: "sft" is called with the list of its command line
            arguments, "demo" with the report's folder, `steps` and `prompt_count`.
        starters: The files that `star-dss init --host NAME` can write, by name.
    """

    host: str
    versions: str
    install: str
    trainer: str | Callable[..., Any]
    options: str | Callable[..., Any]
    configuration: str
    claims: Callable[[Mapping[str, Any]], bool]
    check: str | Check
    commands: Mapping[str, str | Callable[..., Any]] = field(default_factory=dict)
    starters: Mapping[str, Starter] = field(default_factory=dict)


class Register(Protocol):
    """Register one named segmenter or weight map."""

    def __call__(
        self, name: str, target: str | Callable[..., object], *, summary: str = ""
    ) -> None:
        """Register a target under a name.

        Args:
            name: What the configuration calls it; lower case, unique over all plugins.
            target: The object itself, or "module:object", which is imported on first use.
            summary: One line for lists.
        """


class RegisterGuard(Protocol):
    """Register one guard."""

    def __call__(
        self,
        name: str,
        target: str | Callable[..., object],
        *,
        summary: str = "",
        info: GuardInfo = ...,
    ) -> None:
        """Register a guard under a name.

        Args:
            name: What the configuration calls it; lower case, unique over all plugins.
            target: The object itself, or "module:object", which is imported on first use.
            summary: One line for lists.
            info: The guard's licence, size and cost, and whether it accepts an engine.
        """


class RegisterIntegration(Protocol):
    """Register one host framework."""

    def __call__(self, name: str, integration: Integration) -> None:
        """Register an integration under a name.

        Args:
            name: The integration's name ("trl").
            integration: The integration's description.
        """


@hookspec
def star_dss_register_guards(register: RegisterGuard) -> None:
    """Register guards: `target(**options)` returns a `star_dss_plugin.guards.base.Guard`.

    `options` are the remaining keys of the user's `guard:` mapping, plus `device`, `dtype` and
    `batch_tokens`, and `engine` and `engine_options` if the user has set them and the guard's
    `info` has `takes_engine`.
    """


@hookspec
def star_dss_register_segmenters(register: Register) -> None:
    """Register segmenters: `target(text, token_char_ends, chunk_size)` returns chunk ends.

    See `star_dss_plugin.segmenters.Segmenter`.
    """


@hookspec
def star_dss_register_weight_maps(register: Register) -> None:
    """Register weight maps, the values of `loss_type`: scores to (CE weight, KL weight).

    See `star_dss_plugin.weights.WeightMap`.
    """


@hookspec
def star_dss_register_integrations(register: RegisterIntegration) -> None:
    """Register integrations of host frameworks, which the `star-dss` commands use."""
