"""Declare the four hooks, and what a plugin hands over in each of them.

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
    """State what users want to know of a guard before its weights are loaded.

    `star-dss guards` lists it, `star-dss check` estimates with it, and `engine` is refused for a
    guard that takes none. Every field may be left out.

    Attributes:
        licence: The licence of the weights; empty: not stated.
        gated: Whether the hub asks for a login and an agreement.
        billions: Parameters, in units of 10⁹; None: not stated.
        f1: Published F1 of harmful whole responses, in percent; None: none published.
        reads: How a response is read: "shared": prefixes share one computation, and each costs
            `per_prefix` more; "once": one pass scores every prefix; "again": each prefix is read
            from its beginning; None: not stated.
        per_prefix: With "shared": how many tokens of the guard's own words follow each prefix,
            about; None: not known without its files.
        takes_engine: Whether it takes the options `engine` and `engine_options`.

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
        """Say in words what one more prefix costs."""
        if self.reads is None:
            return "not stated"
        if self.reads == "shared":
            return "not known" if self.per_prefix is None else f"≈ {self.per_prefix} tokens"
        return "none (one pass)" if self.reads == "once" else "all again"

    @property
    def terms(self) -> str:
        """Say in words under which terms the weights can be had; empty if nothing is stated."""
        words = [self.licence, "gated" if self.gated else "ungated"]
        return ", ".join(words) if self.licence or self.gated else ""


@dataclass
class Findings:
    """Collect what a check has found.

    Attributes:
        notes: What the run would do.
        problems: What would stop it, or would make it plain finetuning; each with what to change.
    """

    notes: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


class Check(Protocol):
    """Check a configuration of a host framework."""

    def __call__(self, path: Path, raw: dict[str, Any], *, data: bool) -> Findings:
        """Find everything that would stop a run, or would make it plain finetuning.

        Args:
            path: The file, for messages or for the host's own parser.
            raw: Its contents, as `yaml.safe_load` reads them; all keys are strings.
            data: Whether to load the data, to say what scoring it would cost.

        Raises:
            StarDSSError: The check itself cannot go on.
        """
        ...


RowForm = Literal["messages", "conversations", "prompt-completion", "text", "scored"]
"""What rows of data are; see `Start`."""


@dataclass(frozen=True)
class Start:
    """Hold what `star-dss init` was told and what it found: a first run is written from it.

    Attributes:
        model: Hugging Face Hub id or folder of the model, or "smollm2".
        data: File, folder or id of the data, as it was given, or "demo".
        file: Path of the data's file if it is a file; of "demo" that in the package; else None.
        folder: "saved" if it is a folder that `save_to_disk` wrote, "splits" if there are several
            in it, "shards" for one of `star-dss score --shard-rows`, "files" for one of files; else
            None.
        form: What its rows are: a column `messages`; ShareGPT's `conversations`; texts in `prompt`
            and `completion`, or messages there; `text`; or tokens with `star_scores`.
        keys: The keys of a message, of rows that are conversations.
        guard: A registered guard or its mapping; None for data that is scored.
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
        file: Its name, unless the user gives another ("run.yaml").
        write: Given a `Start`, returns the text. It raises a ConfigError for what the host cannot
            run.
        then: The commands that come next; "{file}" stands for the file.
        summary: What it is, in a few words.
    """

    file: str
    write: str | Callable[[Start], str]
    then: tuple[str, ...]
    summary: str = ""


@dataclass(frozen=True)
class Integration:
    """Describe a host framework and what STAR-DSS brings to it.

    Targets are "module:object" (or the object itself) and are imported when they are used, so that
    an integration can be registered, and can say how to install its host, where the host is not
    installed.

    Attributes:
        host: The host's distribution name, as pip knows it.
        versions: The versions of it that were tested, as a PEP 440 specifier (">=1.9,<2").
        install: What `pip install` is given to get the host with this integration.
        trainer: The trainer, or the class that the host loads as its plugin.
        options: The class whose arguments are the options of `StarDSSOptions`, as users of this
            host write them.
        configuration: What a configuration file of it looks like, in a few words.
        claims: Given a parsed YAML mapping, whether it is such a configuration. It must not import
            the host.
        check: A `Check` of such a file.
        commands: Which of `HOST_COMMANDS` it runs, and what is called for them: "sft" with the list
            of words behind it, "demo" with the report's folder, `steps` and `prompt_count`.
        starters: What `star-dss init --host NAME` writes, by name.
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
            target: The object itself, or "module:object" to import it only when it is used.
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
            target: The object itself, or "module:object" to import it only when it is used.
            summary: One line for lists.
            info: Its licence, size and cost, and whether it takes an engine.
        """


class RegisterIntegration(Protocol):
    """Register one host framework."""

    def __call__(self, name: str, integration: Integration) -> None:
        """Register an integration under a name.

        Args:
            name: The integration's name ("trl").
            integration: What it brings.
        """


@hookspec
def star_dss_register_guards(register: RegisterGuard) -> None:
    """Register guards: `target(**options)` returns a `star_dss_plugin.guards.base.Guard`.

    `options` are the remaining keys of the user's `guard:` mapping, plus `device` and `dtype`
    and `batch_tokens`; `engine` and `engine_options` too where the user has set them and the
    guard's `info` says that it takes them.
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
    """Register host frameworks: `star-dss check` and `star-dss plugins` ask them."""
