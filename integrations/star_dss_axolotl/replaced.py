"""Settings that STAR-DSS switches off because it does their work itself, and how it says so."""

from __future__ import annotations

from collections.abc import MutableMapping
from typing import Any

__all__ = ["switch_off_replaced"]

_FUSED_LOSSES = ("cut_cross_entropy", "liger_fused_linear_cross_entropy", "liger_cross_entropy")
_FUSED = (
    "{names} switched off: a fused loss gives no log-probability per token to weigh. STAR-DSS "
    "computes them from the last hidden states, a chunk of tokens at a time, so the logits of a "
    "whole batch are not held either. All other kernels stay."
)
_INPUTS = (
    "train_on_inputs switched off: a guard judges what the assistant says, so the tokens of "
    "prompts and user turns are left out of the loss."
)


def switch_off_replaced(cfg: MutableMapping[str, Any]) -> list[str]:
    """Switch off what STAR-DSS replaces, in place, and return a line for the log about each kind.

    Args:
        cfg: The configuration as it is written, before Axolotl has validated it: afterwards it
            would have refused a fused loss whose package or precision is missing.
    """
    lines = []
    fused = [name for name in _FUSED_LOSSES if cfg.get(name)]
    # Listing the plugin of cut cross-entropy is enough: its setting is on by default.
    if cfg.get("cut_cross_entropy") is None and _lists_cut_cross_entropy(cfg):
        fused.insert(0, "cut_cross_entropy")
    for name in fused:
        cfg[name] = False
    if fused:
        lines.append(_FUSED.format(names=" and ".join(fused)))
    if cfg.get("train_on_inputs"):
        cfg["train_on_inputs"] = False
        lines.append(_INPUTS)
    return lines


def _lists_cut_cross_entropy(cfg: MutableMapping[str, Any]) -> bool:
    names = [str(name).replace(":", ".") for name in cfg.get("plugins") or ()]
    return any(name.split(".")[-1] == "CutCrossEntropyPlugin" for name in names)
