"""Axolotl's streams: rows as they come, and their packs."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from axolotl.utils.samplers import MultipackBatchSampler
from datasets import IterableDataset
from torch.utils.data import RandomSampler, SequentialSampler

__all__ = ["PackedStream", "fitting", "load_stream"]

Row = dict[str, Any]


def load_stream(cfg: Any) -> Any:
    """Return Axolotl's own data, the rows of its stream not packed yet.

    Axolotl packs a stream where it tokenizes it, in one step. Packed rows cannot be scored: nobody
    can tell which context a response had.

    Args:
        cfg: Axolotl's configuration, as it was; it is the same afterwards.
    """
    from axolotl.common.datasets import load_datasets

    if not cfg.sample_packing:
        return load_datasets(cfg=cfg)
    # Only with its own packing does Axolotl load evaluation data beside a stream.
    kept = {"micro_batch_size": cfg.micro_batch_size, "sample_packing": cfg.sample_packing}
    evaluated = load_datasets(cfg=cfg).eval_dataset if cfg.test_datasets else None
    try:
        cfg.sample_packing = False
        loaded = load_datasets(cfg=cfg)
    finally:
        for name, value in kept.items():
            cfg[name] = value
    loaded.eval_dataset = evaluated
    return loaded


def fitting(stream: IterableDataset, args: Any) -> IterableDataset:
    """Leave out the rows that Axolotl packs nowhere: too long, or a token or less.

    Args:
        stream: Tokenized rows.
        args: Axolotl's training arguments.
    """
    return stream.filter(lambda row: 1 < len(row["input_ids"]) <= args.max_seq_length)


class PackedStream(torch.utils.data.IterableDataset[list[Row]]):
    """Join the scored rows of a stream in packs, as Axolotl joins those of a data set.

    Each element is a list of rows, which Axolotl's collator makes one sequence of.

    Args:
        rows: The scored rows.
        args: Axolotl's training arguments.
        buffer: How many rows are packed together.
    """

    column_names = None  # Axolotl looks for lengths among those of a data set

    def __init__(self, rows: IterableDataset, args: Any, buffer: int) -> None:
        self.rows = rows
        self.args = args
        self.buffer = buffer
        self.epoch = 0
        # As Axolotl has it: packs that are rows of a batch, or one long one in place of a batch.
        self.batch_size = args.per_device_train_batch_size if args.multipack_real_batches else 1
        self.capacity = args.max_seq_length * args.per_device_train_batch_size // self.batch_size

    def set_epoch(self, epoch: int) -> None:
        """Draw packs anew, and let the stream shuffle anew."""
        self.epoch = epoch
        self.rows.set_epoch(epoch)

    def __iter__(self) -> Iterator[list[Row]]:
        rows = iter(self.rows)
        for number in itertools.count():
            buffer = [self._placed(row) for row in itertools.islice(rows, self.buffer)]
            if not buffer:
                return
            for (pack,) in self._sampler(buffer, number).generate_batches():
                yield [buffer[i] for i in pack]

    def _sampler(self, buffer: list[Row], number: int) -> Any:
        args = self.args
        # All processes pack alike, whatever random numbers they have used.
        seed = np.random.SeedSequence((args.seed, self.epoch, number)).generate_state(1)
        generator = torch.Generator().manual_seed(int(seed[0]))
        order = (
            SequentialSampler(buffer)
            if args.curriculum_sampling
            else RandomSampler(buffer, generator=generator)
        )
        return MultipackBatchSampler(
            order,
            batch_size=1,
            batch_max_len=self.capacity,
            lengths=[len(row["input_ids"]) for row in buffer],
            bin_size=args.sample_packing_bin_size,
            group_size=args.sample_packing_group_size,
            sequential=args.sample_packing_sequentially,
            drop_last=False,
            num_processes=1,
        )

    def _placed(self, row: Mapping[str, Any]) -> Row:
        """Return a row with the positions that tell it from the others of its pack."""
        placed = {**row, "position_ids": list(range(len(row["input_ids"])))}
        if self.args.sample_packing_drop_attention_mask:
            # Beside a mask, attention that is not flash would not look at the positions.
            placed.pop("attention_mask", None)
        return placed
