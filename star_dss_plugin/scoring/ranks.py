"""Work that the processes of one run share out before training: scores, reference log-probs."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

__all__ = ["ALONE", "Share", "share_of"]

T = TypeVar("T")


@dataclass(frozen=True)
class Share:
    """What one process does of the work that the processes of its machine do together.

    All of them do their part, write it to the cache that they share, meet, and read the whole.

    Attributes:
        index: Which process this is, on its machine.
        of: How many there are.
        meet: Waits until every process of the run is here; every one must call it as often.
    """

    index: int
    of: int
    meet: Callable[[], None]

    def mine(self, work: Sequence[T]) -> list[T]:
        """Every `of`-th item: long ones and short ones for all."""
        return list(work[self.index :: self.of])


ALONE = Share(0, 1, lambda: None)


def share_of(accelerator: Any) -> Share:
    """The part of this process, under `torchrun` or `accelerate launch`."""
    of = int(os.environ.get("LOCAL_WORLD_SIZE", accelerator.num_processes))
    if accelerator.num_processes == 1 or of == 1:
        # Alone on its machine; still, all must meet as often.
        return Share(0, 1, accelerator.wait_for_everyone)
    return Share(accelerator.local_process_index, of, accelerator.wait_for_everyone)
