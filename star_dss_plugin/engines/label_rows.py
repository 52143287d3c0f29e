"""Order prompts for prefix caches and read label log-probabilities from engine outputs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from star_dss_plugin.engines.shared_prompts import SharedPrompts
from star_dss_plugin.errors import GuardError

__all__ = ["label_row", "longest_first", "rows_of_group"]


def longest_first(prompts: SharedPrompts) -> list[int]:
    """Return the indices of the distinct prompts of one response, the longest first.

    The longest prompt fills the engine's prefix cache, so each other prompt computes only the
    tokens after their common prefix. With the shortest first, every prompt would also compute a
    piece of the response.
    """
    lengths = prompts.lengths()
    return sorted(prompts.distinct(), key=lambda i: (-lengths[i], prompts.sort_key(i)))


def label_row(logprobs: Mapping[int, float], label_ids: Sequence[int]) -> list[float]:
    """Return the log-probabilities of the labels from one output of an engine.

    Args:
        logprobs: Maps a token id to its log-probability over the whole vocabulary.
        label_ids: Distinct token ids.

    Raises:
        GuardError: A label is missing, or the numbers are not log-probabilities.
    """
    if missing := [i for i in label_ids if i not in logprobs]:
        raise GuardError(
            f"The engine returned no log-probability of the label tokens {missing}. It does not "
            "know logprob_token_ids: use vLLM 0.32 or newer."
        )
    row = [float(logprobs[i]) for i in label_ids]
    # Rounding in 16-bit weights can carry the sum slightly above 1.
    if not (max(row) <= 0.05 and sum(map(math.exp, row)) <= 1.05):
        raise GuardError(
            f"The engine returned {row} for the labels, which are not log-probabilities. Start "
            "vLLM with --logprobs-mode raw_logprobs, its default."
        )
    return row


def rows_of_group(
    prompts: SharedPrompts, distinct_rows: Mapping[int, list[float]], labels: int
) -> Tensor:
    """Return the rows of a group's prompts in order, float32, shape (prompts, labels).

    Args:
        prompts: The prompts of a group; equal ones get the same row.
        distinct_rows: The row of each distinct prompt, by index.
        labels: Number of labels.
    """
    by_piece = {prompts.pieces[i]: row for i, row in distinct_rows.items()}
    rows = [by_piece[piece] for piece in prompts.pieces]
    return torch.tensor(rows, dtype=torch.float32).view(len(prompts), labels)
