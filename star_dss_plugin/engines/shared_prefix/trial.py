"""Test whether the shared-prefix path reproduces a model's own results.

The model's structure is checked first, then both paths run on random prompts.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from star_dss_plugin.engines.shared_prefix.attention import NAME

__all__ = ["fixed_rope_length", "unsupported_reason"]

_LAYER_TYPES = {"full_attention", "sliding_attention"}

_Compute = Callable[[Sequence[Sequence[Sequence[int]]], Sequence[int], bool], list[Tensor]]
"""Takes (groups, label ids, whether prompts run whole); returns label log-probabilities."""


def unsupported_reason(
    model: PreTrainedModel, parameters: Sequence[str], compute: _Compute
) -> str | None:
    """Return the reason why the shared-prefix path cannot serve a model; None if it can.

    Args:
        model: A causal LM.
        parameters: Names of its forward method's parameters.
        compute: Runs prompts along either path, on a separate engine.
    """
    config = model.config.get_text_config(decoder=True)
    types = set(getattr(config, "layer_types", None) or _LAYER_TYPES)
    if model._is_stateful or not types <= _LAYER_TYPES:
        return "it has layers other than full and sliding attention"
    if "position_ids" not in parameters:
        return "its forward takes no position_ids"
    if getattr(model, "_supports_attention_backend", False) is False:
        return f"its attention cannot be replaced by {NAME!r}"
    try:
        difference = _difference(config, compute)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # other faults recur on the plain path
        return f"a trial on a shared prefix failed with {error!r}"
    # On random tokens, 16-bit rounding alone moves 3 to 6 % of the probability, as much as it moves
    # either path away from float32. A wrong computation moves most of it.
    if not difference <= (1e-3 if model.dtype.itemsize >= 4 else 0.15):
        return f"a trial on a shared prefix gave probabilities {difference:.2g} apart"
    return None


def _difference(config: PreTrainedConfig, compute: _Compute) -> float:
    """Return the largest total variation between the two paths over a few random prompts.

    It bounds the difference of every token's probability. The prompts are longer than all but very
    wide windows.
    """
    window = getattr(config, "sliding_window", None) or 0
    most: int = getattr(config, "max_position_embeddings", None) or sys.maxsize
    size = min((window if window <= 4096 else 0) + 16, most, fixed_rope_length(config))
    vocabulary: int = config.vocab_size
    random = torch.Generator("cpu").manual_seed(0)
    one, two, other = torch.randint(vocabulary, (3, size), generator=random, device="cpu").tolist()
    half = size // 2
    two = one[: half // 2] + two[half // 2 :]
    groups = [
        [one, one[:half] + other[:4], one[:-4] + other[:3], one[: half + 1]],
        [two, two[:-3] + other[:5], two[: half + 2] + other[:6]],
        [one[: half // 2] + other[:7], other[:3]],
    ]
    shared, whole = (compute(groups, range(vocabulary), plain) for plain in (False, True))
    distance = [(a.exp() - b.exp()).abs().sum(1).max() for a, b in zip(shared, whole, strict=True)]
    return float(max(distance)) / 2


def fixed_rope_length(config: PreTrainedConfig) -> int:
    """Return the longest prompt length whose rotary frequencies do not depend on the batch."""
    rope: dict[str, Any] = getattr(config, "rope_parameters", None) or {}
    settings = [rope] if "rope_type" in rope else rope.values()
    moving = [setting for setting in settings if setting["rope_type"] in {"dynamic", "longrope"}]
    most = config.max_position_embeddings if moving else sys.maxsize
    return min(
        [most, *(setting.get("original_max_position_embeddings") or most for setting in moving)]
    )
