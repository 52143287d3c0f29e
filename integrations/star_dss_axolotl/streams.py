"""Load Axolotl's streams without its packing, and pack their rows after they are scored."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from axolotl.utils.samplers import MultipackBatchSampler
from datasets import IterableDataset
from torch.utils.data import RandomSampler, SequentialSampler

__all__ = ["PackedStream", "drop_unpackable_rows", "load_stream"]

Row = dict[str, Any]


def load_stream(cfg: Any) -> Any:
    """Load Axolotl's data with the rows of its stream unpacked.

    Axolotl tokenizes and packs a stream in one step, and packed rows cannot be scored: the prompt
    of each response cannot be recovered.

    Args:
        cfg: Axolotl's configuration. It is changed while the data is loaded, and then restored.
    """
    from axolotl.common.datasets import load_datasets

    if not cfg.sample_packing:
        return load_datasets(cfg=cfg)
    # Axolotl loads evaluation data for a stream only with sample_packing on.
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


def drop_unpackable_rows(stream: IterableDataset, args: Any) -> IterableDataset:
    """Drop rows that cannot be packed: of more than `max_seq_length` tokens, or of less than two.

    Args:
        stream: The stream of tokenized rows.
        args: Axolotl's training arguments.
    """
    return stream.filter(lambda row: 1 < len(row["input_ids"]) <= args.max_seq_length)


class PackedStream(torch.utils.data.IterableDataset[list[Row]]):
    """Pack the scored rows of a stream as Axolotl packs those of a data set.

    Each item is a list of rows, of which Axolotl's collator makes one sequence.

    Args:
        rows: The stream of scored rows.
        args: Axolotl's training arguments.
        buffer: Number of rows among which packs are formed.
    """

    column_names = None  # Axolotl looks for a column of lengths in it

    def __init__(self, rows: IterableDataset, args: Any, buffer: int) -> None:
        self.rows = rows
        self.args = args
        self.buffer = buffer
        self.epoch = 0
        # As in Axolotl: several packs per batch, or one long pack instead of a batch.
        self.batch_size = args.per_device_train_batch_size if args.multipack_real_batches else 1
        self.capacity = args.max_seq_length * args.per_device_train_batch_size // self.batch_size

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch, with which packs are drawn and the stream is shuffled."""
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
        # The same packs in all processes, independent of their random states.
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
        """Return a row with `position_ids`, which separate it from the other rows of its pack."""
        placed = {**row, "position_ids": list(range(len(row["input_ids"])))}
        if self.args.sample_packing_drop_attention_mask:
            # With a mask, attention other than FlashAttention would ignore the positions.
            placed.pop("attention_mask", None)
        return placed
