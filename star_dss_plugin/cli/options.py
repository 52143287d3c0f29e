"""Options that several commands share: one name, one type and one help text each.

Defaults stay with the commands, where they can be read together.
"""

from __future__ import annotations

from typing import Annotated

import typer

__all__ = [
    "AnswerBatch",
    "Base",
    "Device",
    "Dtype",
    "GuardDevice",
    "GuardDtype",
    "MaxNewTokens",
    "Quiet",
    "Split",
]

Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress bar.")]
Split = Annotated[str, typer.Option(help="The split of a data set folder.")]

GuardDevice = Annotated[
    str | None, typer.Option(help="cuda, cpu, …; default: the GPU if there is one.")
]
GuardDtype = Annotated[str, typer.Option(help="auto, float32, bfloat16, float16.")]

# Of models that are evaluated.
Base = Annotated[
    str | None, typer.Option(help="What adapters belong to, if their config is wrong here.")
]
Device = GuardDevice
Dtype = Annotated[str, typer.Option(help="auto: as stored; float32, bfloat16, float16.")]
MaxNewTokens = Annotated[int, typer.Option(min=1, help="Length of an answer.")]
AnswerBatch = Annotated[int, typer.Option(min=1, help="Prompts answered at a time.")]
