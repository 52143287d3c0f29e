"""Find out whether a model reads the documents of a pack together, as no row by itself is read."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from copy import deepcopy
from itertools import product
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn

from star_dss_plugin.training.head import forward_inputs
from star_dss_plugin.training.sharding import Ranks

__all__ = ["joined_batch", "packs_read_together", "reads_documents_together"]

logger = logging.getLogger(__name__)

_APART = {"16 bits": 0.1, "32 bits": 1e-3}
"""Nats between two passes of one shape, by what the model computes in; most have no noise."""
_NOISE = 4
"""By how much documents that meet must exceed the noise of a model that has some."""
_LENGTH = 24
"""Tokens of a document; the first ones are within reach of any convolution."""


def packs_read_together(model: nn.Module, collator: Any, dataset: Any, ranks: Ranks) -> str:
    """Return how messages name the packs of a run if their documents meet in the model; "" if not.

    Args:
        model: The trained model as it starts.
        collator: The trainer's data collator.
        dataset: The trainer's training data, as its collator gets them.
        ranks: The processes of the run; all of them must call this.
    """
    # As Arrow: whatever format the user has set, and without opening media.
    first = dataset.with_format("arrow")[:1].to_pylist() if isinstance(dataset, Dataset) else []
    batch = joined_batch(collator, first[0] if first else {}) if ranks.can_run else None
    if batch is None:
        return ""
    # Ranks that compute it each for itself may be at both sides of a threshold.
    if not any(ranks.gather(ranks.decide_on_first(lambda: reads_documents_together(model, batch)))):
        return ""
    logger.warning(
        "This model reads the documents of a pack together, with or without STAR-DSS: layers that "
        "are no attention pass on what they have read, or its attention does not see where a "
        "document begins. The reference therefore reads the packs, too, at each step; the guard "
        "reads each document by itself. Without packing nothing is read together."
    )
    return "packs whose documents this model reads together"


def joined_batch(collator: Any, example: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return a batch in which a data collator has joined two rows; None if it joins none.

    Args:
        collator: A trainer's. It may join all rows of a batch (`padding_free`, as TRL's packing
            does, too), or the rows of a list (Axolotl's packing).
        example: A row of the data, whose columns a collator of the user's own may need.
    """
    wanted = torch.arange(_LENGTH).repeat(2)[None]
    for row, as_list in product(_rows_for(example), (False, True)):
        # Two copies: a collator may remove from a row what it has used.
        rows = [deepcopy(row), deepcopy(row)]
        try:
            batch = dict(collator([rows] if as_list else rows))
            joined = torch.equal(batch["position_ids"][:, : 2 * _LENGTH], wanted)  # then padding
        except Exception:  # of any kind: this is not the form of rows that the collator takes
            continue
        if joined:
            return _without_padding(batch)
    return None


def _rows_for(example: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return rows of `_LENGTH` tokens in the forms that data collators take, the simplest first."""
    ones = [1] * _LENGTH
    simplest = {"input_ids": ones, "labels": ones, "position_ids": list(range(_LENGTH))}
    # A mask cannot say where a document begins, so it is left out unless the collator needs one.
    masked = simplest | {"attention_mask": ones}
    length = len(example.get("input_ids") or ())

    def fitted(value: Any) -> Any:
        per_token = isinstance(value, list) and value and len(value) == length
        return (value * _LENGTH)[:_LENGTH] if per_token else value

    return [simplest, masked, {name: fitted(value) for name, value in example.items()} | masked]


def _without_padding(batch: dict[str, Any]) -> dict[str, Any]:
    """Cut padding off a joined batch: a collator may pad to the longest row that a run can have.

    Where something says with other numbers than one for each token what is in it, it stays whole.
    """
    tokens = batch["input_ids"].shape[1]
    columns = {n: value for n, value in batch.items() if isinstance(value, Tensor)}
    if any(value.dim() < 2 for value in columns.values()):
        return batch
    for name, value in columns.items():
        for dim in range(1, value.dim()):
            if value.shape[dim] == tokens:
                batch[name] = batch[name].narrow(dim, 0, 2 * _LENGTH)
    return batch


def reads_documents_together(model: nn.Module, batch: Mapping[str, Any]) -> bool:
    """Return whether a document's log-probabilities change with the document before it in a pack.

    They do where layers that are no attention (convolutions, states) pass on what they have read,
    and where attention is not told, or does not see, where a document begins.

    Args:
        model: A causal model as it starts; four forward passes are made, on any rank.
        batch: Of `joined_batch`; its tokens are replaced.
    """
    config: Any = model.config
    parameter = next(model.parameters())
    device = parameter.device
    ids = torch.arange(1, 3 * _LENGTH + 1, device=device).remainder(
        config.get_text_config().vocab_size
    )
    first, other, second = ids.split(_LENGTH)
    given = {
        name: value.to(device, copy=True) if isinstance(value, Tensor) else value
        for name, value in forward_inputs(batch).items()
    }

    def read(one: Tensor, two: Tensor, start: int) -> Tensor:
        given["input_ids"][0, : 2 * _LENGTH] = torch.cat([one, two])
        logits: Tensor = model(**given).logits[0, start : start + _LENGTH]
        dtypes.add(logits.dtype)
        return logits.float().log_softmax(-1)

    dtypes = {parameter.dtype}
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            apart = read(first, second, _LENGTH) - read(other, second, _LENGTH)
            # What stands behind a document cannot be read with it. Yet its values may change a
            # little: experts are given other numbers of tokens, and round otherwise.
            noise = read(second, first, 0) - read(second, other, 0)
    finally:
        model.train(training)
    half = not dtypes.isdisjoint({torch.bfloat16, torch.float16})
    half = half or torch.is_autocast_enabled(device.type)
    within = _APART["16 bits" if half else "32 bits"]
    return bool(apart.abs().max() > max(within, _NOISE * float(noise.abs().max())))
