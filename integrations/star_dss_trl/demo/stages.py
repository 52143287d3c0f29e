"""Show one line for each stage of the demonstration, and redirect other output to a log."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

__all__ = ["Stages", "redirect_output"]

Advance = Callable[[], None]


@contextlib.contextmanager
def redirect_output(log: Path) -> Iterator[TextIO]:
    """Redirect all output of this process to a file: Python's, warnings, and that of C libraries.

    Args:
        log: The file, which is replaced.

    Yields:
        A stream that still reaches the user.
    """
    with contextlib.ExitStack() as undo:
        file = undo.enter_context(
            log.open("w", encoding="utf-8", errors="backslashreplace", buffering=1)
        )
        shown = sys.stdout
        shown.flush()
        sys.stderr.flush()
        if _descriptor(shown) == 1:
            copy = os.fdopen(os.dup(1), "w", encoding=shown.encoding, errors="replace")
            shown = undo.enter_context(copy)
        # At the file descriptors, for C code and for log handlers that hold the old streams.
        for number in (1, 2):
            kept = os.dup(number)
            undo.callback(os.close, kept)
            undo.callback(os.dup2, kept, number)
            os.dup2(file.fileno(), number)
        undo.enter_context(contextlib.redirect_stdout(file))
        undo.enter_context(contextlib.redirect_stderr(file))
        yield shown


def _descriptor(stream: Any) -> int | None:
    try:
        number: int = stream.fileno()
    except (OSError, ValueError, AttributeError):  # not a file: a notebook, a test
        return None
    return number


class Stages:
    """Show stages one after the other: live with the time left, or in a file one line each.

    Args:
        console: The console to show them on.
        count: The number of stages.
    """

    def __init__(self, console: Console, count: int) -> None:
        self._console = console
        self._count = count
        self._begun = 0
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=16),
            TaskProgressColumn(),
            TimeRemainingColumn(compact=True, elapsed_when_finished=True),
            TextColumn("{task.fields[word]}"),
            console=console,
            redirect_stdout=False,
            redirect_stderr=False,
            disable=not console.is_terminal,
        )

    def __enter__(self) -> Stages:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    @contextlib.contextmanager
    def stage(self, what: str, steps: int) -> Iterator[Advance]:
        """Show a stage while a block runs.

        Args:
            what: Description of the stage, in a few words.
            steps: Number of its steps.

        Yields:
            A function to call after each step; at the end all steps count as done.
        """
        self._begun += 1
        text = f"{self._begun}/{self._count} {what}"
        started = time.monotonic()
        task = self._bar.add_task(f"{text:<38}", total=steps, word="left")
        yield lambda: self._bar.advance(task)
        self._bar.update(task, completed=steps, word="")
        if not self._console.is_terminal:
            self._console.print(f"{text}: {time.monotonic() - started:.0f} s")
