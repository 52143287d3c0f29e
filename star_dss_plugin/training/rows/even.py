"""Let processes that each read a part of a stream read equally many batches of it.

Parts are files, or what a filter leaves of them, and differ in length. Each step of training and of
evaluation waits for all processes: one whose part had ended earlier would leave the others waiting.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
from collections.abc import Callable, Iterator
from typing import Any

from star_dss_plugin.errors import DataError

__all__ = ["EvenLoader", "no_rows"]

logger = logging.getLogger(__name__)


def no_rows(rank: int, name: str) -> DataError:
    """Return the error for a process whose part of a stream has no rows to train on."""
    return DataError(
        f"Process {rank} got no row of the {name} stream that has trained tokens, while others "
        "got some: each reads files of its own. Put such rows into every file, or give fewer files "
        "than there are processes: rows are then dealt out singly."
    )


class EvenLoader:
    """Read a process's part of a stream until the longest part has ended.

    A process whose part ends earlier begins with it again, as accelerate fills a last batch up with
    the rows of the first one.

    Args:
        loader: Of this process's part.
        name: "train", "eval", …: for messages.
        gather: Returns a value of every process, in the order of ranks; each must call it.

    Attributes:
        skipped: How many batches of the next pass a resumed run leaves out.
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
        while found := self.take(batches, 1):
            yield from found

    def take(self, batches: Iterator[Any], most: int) -> list[Any]:
        """Return the next batches of a pass, equally many in every process; each must call this.

        Args:
            batches: The pass that this process makes over its part, the same object each time.
            most: How many are wanted.

        Returns:
            At most so many; none if the pass is over in every process.

        Raises:
            DataError: The part of one of them gives no batch at all; in every process.
        """
        if batches is not self._pass:
            self._pass, self._over, self._given = batches, False, 0
            self._left_out, self.skipped = self.skipped, 0
            self._close()
        if self._over:
            return []
        found = list(itertools.islice(batches, most))
        counts = self._gather((len(found), self._given))
        most = max(count for count, _ in counts)
        if not most:
            self._over = True
            self._close()
            return []
        if (0, 0) in counts:
            # A part has no rows, or no more of them than a resumed run skips.
            if not found and not self._given:
                with contextlib.suppress(StopIteration):
                    found.append(self._repeated())
            there = self._gather(bool(found) or self._given > 0)
            if not all(there):
                raise no_rows(there.index(False), self._name)
        while len(found) < most:
            found.append(self._repeated())
        self._given += len(found)
        return found

    def _repeated(self) -> Any:
        """Return a batch of another pass over this process's part.

        Raises:
            StopIteration: The part gives none.
        """
        batch = None if self._again is None else next(self._again, None)
        if batch is None:
            self._again = iter(self.loader)
            if not self._given and self._left_out:
                # The run had begun with the part again before it was stopped.
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
        """End a pass that was begun again; accelerate would take its loader for the current one."""
        if self._again is not None:
            self.loader.end()
        self._again = None
