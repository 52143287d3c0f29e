"""TRL runs that read their rows in order, for the tests of streams."""

import torch

from support.run_differences import history
from support.trl_runs import tiny_trainer

IN_ORDER = {"train_sampling_strategy": "sequential", "stream_buffer": 3}
"""Options with which a data set is read in the order of a stream; buffers do not fit batches."""


def train_in_order(tmp_path, tokenizer, data, **changes):
    """Return a trainer that was trained on a stream, or on a data set in the stream's order."""
    trainer = tiny_trainer(tmp_path, tokenizer, data, **{**IN_ORDER, **changes})
    trainer.train()
    return trainer


def assert_same_history(one, other):
    """Check that two trainers logged the same losses and gradient norms."""
    torch.testing.assert_close(
        torch.tensor(history(one)), torch.tensor(history(other)), rtol=1e-6, atol=1e-6
    )
