"""Divide the scoring before training, by guards and the reference model, among a run's ranks."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from star_dss_plugin.errors import StarDSSError

__all__ = ["SINGLE_PROCESS", "Share", "explain_barrier_errors", "share_of"]

T = TypeVar("T")


@dataclass(frozen=True)
class Share:
    """Divide work among the processes of one machine.

    Each process does its part and writes it to the shared cache, waits at a barrier, and then reads
    all results from the cache.

    Attributes:
        rank: This process's local rank on its machine, from 0.
        ranks: The number of processes on this machine.
        barrier: Barrier over all processes of the run. Every process must call it equally often.
    """

    rank: int
    ranks: int
    barrier: Callable[[], None]

    def own_part(self, items: Sequence[T]) -> list[T]:
        """Return this rank's items: every `ranks`-th, so that long and short ones are spread."""
        return list(items[self.rank :: self.ranks])


SINGLE_PROCESS = Share(0, 1, lambda: None)


@contextlib.contextmanager
def explain_barrier_errors() -> Iterator[None]:
    """Turn torch's error at a barrier into one that says what may have happened.

    Raises:
        StarDSSError: The connection broke or timed out.
    """
    try:
        yield
    except RuntimeError as error:
        raise StarDSSError(
            "This process waited for the other processes of the run, and one of them has ended, "
            "or needed longer than ddp_timeout allows. Its own output, further up or on another "
            "machine, says why; without any it was killed (out of memory?). What was scored until "
            f"then is kept, and the next run goes on from there. (torch: {error})"
        ) from error


def share_of(accelerator: Any) -> Share:
    """Return the share of this process under `torchrun` or `accelerate launch`."""

    def barrier() -> None:
        with explain_barrier_errors():
            accelerator.wait_for_everyone()

    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", accelerator.num_processes))
    if accelerator.num_processes == 1 or ranks == 1:
        # Even a process that is alone on its machine must reach the same barriers as the others.
        return Share(0, 1, barrier)
    return Share(accelerator.local_process_index, ranks, barrier)
