"""Define options that several commands share: one name, one type and one help text each.

Each command sets its own defaults. Flags of an options dataclass take its defaults (`flags_of`).
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import fields
from typing import Annotated, Any, get_args, get_type_hints

import typer

__all__ = [
    "AnswerBatch",
    "Base",
    "Device",
    "Dtype",
    "GuardDevice",
    "GuardDtype",
    "Json",
    "MaxNewTokens",
    "Quiet",
    "Split",
    "flags_of",
]

Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress bar.")]
Split = Annotated[str, typer.Option(help="The split of a data set folder.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON for programs in place of tables.")]

GuardDevice = Annotated[
    str | None, typer.Option(help="cuda, cpu, …; default: the GPU if there is one.")
]
GuardDtype = Annotated[str, typer.Option(help="auto, float32, bfloat16, float16.")]

# For models that are evaluated.
Base = Annotated[
    str | None, typer.Option(help="Base model of adapters, in place of the one in their config.")
]
Device = GuardDevice
Dtype = Annotated[str, typer.Option(help="auto: as stored; float32, bfloat16, float16.")]
MaxNewTokens = Annotated[int, typer.Option(min=1, help="Length of an answer.")]
AnswerBatch = Annotated[int, typer.Option(min=1, help="Prompts answered at a time.")]


def flags_of(cls: type) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Return a decorator that gives a command one flag for each field of an options dataclass.

    The command gets an object of the class as its argument `options`; names, types, defaults and
    help texts of the flags are those of the fields.

    Args:
        cls: A dataclass whose fields have a `help` in their metadata.
    """
    hints = get_type_hints(cls)
    flags = [
        inspect.Parameter(
            f.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=f.default,
            annotation=Annotated[_flag_type(hints[f.name]), typer.Option(help=f.metadata["help"])],
        )
        for f in fields(cls)
    ]

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(command)
        def run(**given: Any) -> None:
            options = cls(**{flag.name: given.pop(flag.name) for flag in flags})
            command(options=options, **given)

        types = get_type_hints(command, include_extras=True)
        own = [
            p.replace(annotation=types[p.name], kind=inspect.Parameter.KEYWORD_ONLY)
            for p in inspect.signature(command).parameters.values()
            if p.name != "options"
        ]
        signature = inspect.Signature([*own, *flags])
        run.__signature__ = signature  # type: ignore[attr-defined]  # typer reads it
        run.__annotations__ = {p.name: p.annotation for p in [*own, *flags]}
        return run

    return decorate


def _flag_type(hint: Any) -> Any:
    """Return the command-line type of a field: str for a mapping, which is given as JSON."""
    kinds = get_args(hint)
    return str | None if str in kinds and type(None) in kinds else hint
