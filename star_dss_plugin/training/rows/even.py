"""Read equally many batches in every process when each reads its own files of a stream.

Files differ in length, also by what a filter leaves of them. Each step of training and evaluation
waits for all processes, so a process whose files ended early would leave the others waiting.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
from collections.abc import Callable, Iterator
from typing import Any

from star_dss_plugin.errors import DataError

__all__ = ["EvenLoader", "no_rows_error"]

logger = logging.getLogger(__name__)


def no_rows_error(rank: int, name: str) -> DataError:
    """Return the error for a rank whose files of a stream have no rows to train on."""
    return DataError(
        f"Process {rank} got no row of the {name} stream that has trained tokens, while others "
        "got some: each reads files of its own. Put such rows into every file, or give fewer files "
        "than there are processes: rows are then dealt out singly."
    )


class EvenLoader:
    """Read a process's files of a stream until the longest process has read its own.

    A process whose files end earlier reads them again from the beginning, as accelerate fills up a
    last batch with the rows of the first one.

    Args:
        loader: Loader of this process's files.
        name: Name of the stream ("train", "eval", …) for messages.
        gather: Returns a value of every rank, in the order of ranks; every rank must call it.

    Attributes:
        skipped: Number of batches that a resumed run skips at the beginning of the next pass.
    """

    def __init__(self, loader: Any, name: str, gather: Callable[[Any], list[Any]]) -> None:
        self.loader = loader
        self.skipped = 0
        self._name, self._gather = name, gather
        self._left_out = 0
        self._pass: Iterator[Any] | None = None
        self._over = False
        self._again: Iterator[Any] | None = None
        self._given = 0
        self._said = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self.loader, name)

    def __iter__(self) -> Iterator[Any]:
        batches = iter(self.loader)
        while found := self.next_batches(batches, 1):
            yield from found

    def next_batches(self, batches: Iterator[Any], limit: int) -> list[Any]:
        """Return the next batches of a pass, equally many in every process; each must call this.

        Args:
            batches: The iterator over this process's files, the same object throughout a pass.
            limit: How many batches to return at most.

        Returns:
            The batches; empty if the pass is over in every process.

        Raises:
            DataError: In every process, if the files of one give no batch at all.
        """
        if batches is not self._pass:
            self._pass, self._over, self._given = batches, False, 0
            self._left_out, self.skipped = self.skipped, 0
            self._close()
        if self._over:
            return []
        found = list(itertools.islice(batches, limit))
        counts = self._gather((len(found), self._given))
        largest = max(count for count, _ in counts)
        if not largest:
            self._over = True
            self._close()
            return []
        if (0, 0) in counts:
            # The files of a process have no rows, or no more than a resumed run skips.
            if not found and not self._given:
                with contextlib.suppress(StopIteration):
                    found.append(self._repeated())
            there = self._gather(bool(found) or self._given > 0)
            if not all(there):
                raise no_rows_error(there.index(False), self._name)
        while len(found) < largest:
            found.append(self._repeated())
        self._given += len(found)
        return found

    def _repeated(self) -> Any:
        """Return the next batch of another pass over this process's files.

        Raises:
            StopIteration: They give no batch.
        """
        batch = None if self._again is None else next(self._again, None)
        if batch is None:
            self._again = iter(self.loader)
            if not self._given and self._left_out:
                # Before it was stopped, the resumed run was already reading its files again.
                length = sum(1 for _ in self._again)
                self._again = iter(self.loader)
                for _ in range(self._left_out % length if length else 0):
                    next(self._again)
                self._left_out = 0
            batch = next(self._again)
            if not self._said:
                logger.warning(
                    "This process's part of the %s stream has ended before the others' have, and "
                    "is read again until they end: give each process equally many rows to avoid "
                    "that.",
                    self._name,
                )
            self._said = True
        return batch

    def _close(self) -> None:
        """End a repeated pass: else accelerate would take its loader for the active one."""
        if self._again is not None:
            self.loader.end()
        self._again = None
