"""Find out whether a model reads the documents of a pack together, as no row by itself is read."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from star_dss_plugin.training.head import forward_inputs
from star_dss_plugin.training.sharding import Ranks

__all__ = ["documents_meet", "joined_batch", "packs_read_together"]

logger = logging.getLogger(__name__)

_APART = {"16 bits": 0.1, "32 bits": 1e-3}
"""Nats between two passes of one shape, by what the model computes in; its own noise is less."""
_LENGTH = 24
"""Tokens of a document; the first ones are within reach of any convolution."""


def packs_read_together(model: nn.Module, collator: Any, ranks: Ranks) -> str:
    """Return how messages name the packs of a run if their documents meet in the model; "" if not.

    Args:
        model: The trained model as it starts.
        collator: The trainer's.
        ranks: The processes of the run; all of them must call this.
    """
    batch = joined_batch(collator) if ranks.can_run else None
    if batch is None or not ranks.first_decides(lambda: documents_meet(model, batch)):
        return ""
    logger.warning(
        "This model reads the documents of a pack together, with or without STAR-DSS: layers that "
        "are no attention pass on what they have read, or its attention does not see where a "
        "document begins. The reference therefore reads the packs, too, at each step; the guard "
        "reads each document by itself. Without packing nothing is read together."
    )
    return "packs whose documents this model reads together"


def joined_batch(collator: Any) -> dict[str, Any] | None:
    """Return a batch of two rows that a collator has joined into one; None: it joins none.

    Args:
        collator: A trainer's. It may join all rows of a batch (`padding_free`, as TRL's packing
            does, too), or the rows of a list (Axolotl's packing).
    """
    # Without a mask, which could not say where a document begins.
    row = {name: [1] * _LENGTH for name in ("input_ids", "labels")}
    row["position_ids"] = list(range(_LENGTH))
    wanted = torch.arange(_LENGTH).repeat(2)[None]
    for features in ([row, row], [[row, row]]):
        try:
            batch = collator(features)
            joined = torch.equal(batch["position_ids"][:, : 2 * _LENGTH], wanted)  # then padding
        except Exception:  # of whatever kind: features of another form than the collator takes
            continue
        if joined:
            return dict(batch)
    return None


def documents_meet(model: nn.Module, batch: Mapping[str, Any]) -> bool:
    """Return whether a document's log-probabilities change with the document before it in a pack.

    They do where layers that are no attention (convolutions, states) pass on what they have read,
    and where attention is not told, or does not see, where a document begins.

    Args:
        model: A causal model as it starts; two forward passes are made.
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

    def second_behind(document: Tensor) -> Tensor:
        given["input_ids"][0, : 2 * _LENGTH] = torch.cat([document, second])
        logits: Tensor = model(**given).logits
        return logits[0, _LENGTH : 2 * _LENGTH]

    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            one, two = second_behind(first), second_behind(other)
    finally:
        model.train(training)
    half = any(part.dtype in (torch.bfloat16, torch.float16) for part in (one, parameter))
    half = half or torch.is_autocast_enabled(device.type)
    apart = (one.float().log_softmax(-1) - two.float().log_softmax(-1)).abs().max()
    return bool(apart > _APART["16 bits" if half else "32 bits"])
