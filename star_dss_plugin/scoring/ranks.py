"""Work that the ranks of one run divide before training: scores, reference log-probabilities."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

__all__ = ["ALONE", "Share", "share_of"]

T = TypeVar("T")


@dataclass(frozen=True)
class Share:
    """Divide work among the processes of one machine.

    Each does its part, writes it to the cache that all share, waits for the others and reads the
    whole.

    Attributes:
        rank: This process's number on its machine, from 0.
        ranks: Processes on this machine.
        meet: Barrier over all processes of the run. Every process must call it the same number of
            times.
    """

    rank: int
    ranks: int
    meet: Callable[[], None]

    def mine(self, work: Sequence[T]) -> list[T]:
        """Return this rank's items, dealt out in turn so that long and short ones are spread."""
        return list(work[self.rank :: self.ranks])


ALONE = Share(0, 1, lambda: None)


def share_of(accelerator: Any) -> Share:
    """Return the share of this process under `torchrun` or `accelerate launch`."""
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", accelerator.num_processes))
    if accelerator.num_processes == 1 or ranks == 1:
        # Alone on its machine; still, all ranks must reach the same number of barriers.
        return Share(0, 1, accelerator.wait_for_everyone)
    return Share(accelerator.local_process_index, ranks, accelerator.wait_for_everyone)
