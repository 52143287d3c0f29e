"""Show one line for each stage of the demonstration, and put what others print into a log."""

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

__all__ = ["Stages", "only_in"]

Advance = Callable[[], None]


@contextlib.contextmanager
def only_in(log: Path) -> Iterator[TextIO]:
    """Send what this process prints to a file: Python's output, warnings, and that of libraries.

    Args:
        log: The file; replaced.

    Yields:
        What still reaches the user.
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
        # Below Python: C code, and handlers that keep the streams they have found.
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
    """Show stages one after the other: live with the time left, or a line each in a file.

    Args:
        console: Where to.
        count: How many there will be.
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
            what: What it does, in a few words.
            steps: How many steps it has.

        Yields:
            A function to call after each step; what was not needed counts as done at the end.
        """
        self._begun += 1
        text = f"{self._begun}/{self._count} {what}"
        started = time.monotonic()
        task = self._bar.add_task(f"{text:<38}", total=steps, word="left")
        yield lambda: self._bar.advance(task)
        self._bar.update(task, completed=steps, word="")
        if not self._console.is_terminal:
            self._console.print(f"{text}: {time.monotonic() - started:.0f} s")
