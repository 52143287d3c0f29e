"""Change settings for STAR-DSS: fused losses off, prompts not trained, attention for packs set."""

from __future__ import annotations

from collections.abc import MutableMapping
from typing import Any

from star_dss_axolotl.conflicts import trained_roles

__all__ = ["change_settings"]

_FUSED_LOSSES = ("cut_cross_entropy", "liger_fused_linear_cross_entropy", "liger_cross_entropy")
_FUSED = (
    "{names} switched off: a fused loss gives no per-token log-probabilities. STAR-DSS computes "
    "them from the last hidden states, a chunk of tokens at a time, so the logits of a whole batch "
    "are not held either. All other kernels stay."
)
_INPUTS = (
    "train_on_inputs switched off: a guard judges what the assistant says, so the tokens of "
    "prompts and user turns are left out of the loss."
)
_ROLES = (
    "roles_to_train: {others} left out of {where}: a guard judges what the assistant says, so the "
    "turns of other roles are not trained."
)
_ATTENTION = (
    "attn_implementation set to sdpa: sample_packing is on and no attention was chosen, with which "
    "Axolotl lets the rows of a pack read each other. Name another one to use it; eager runs with "
    "every model."
)


def change_settings(cfg: MutableMapping[str, Any]) -> list[str]:
    """Change settings that STAR-DSS replaces or requires; return a log line for each change.

    Args:
        cfg: The configuration as written, changed in place. This must happen before Axolotl
            validates it: validation rejects a fused loss whose package is not installed or that
            does not support the precision.
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
    for key in ("datasets", "test_datasets"):
        for i, dataset in enumerate(cfg.get(key) or ()):
            if not isinstance(dataset, MutableMapping):
                continue
            assistant, others = trained_roles(dataset)
            if assistant and others:
                dataset["roles_to_train"] = assistant
                lines.append(_ROLES.format(others=", ".join(others), where=f"{key}[{i}]"))
    if cfg.get("sample_packing") and not _names_attention(cfg):
        cfg["attn_implementation"] = "sdpa"
        lines.append(_ATTENTION)
    return lines


def _names_attention(cfg: MutableMapping[str, Any]) -> bool:
    """Return whether the configuration chooses an attention, also by an older switch per kind."""
    no_choice = "large_head_attention"  # a kernel in addition to the chosen attention
    switches = [name for name in cfg if str(name).endswith("_attention") and name != no_choice]
    names = ["attn_implementation", "gemma4_hybrid_attn_impl", *switches]
    return any(cfg.get(name) for name in names)


def _lists_cut_cross_entropy(cfg: MutableMapping[str, Any]) -> bool:
    names = [str(name).replace(":", ".") for name in cfg.get("plugins") or ()]
    return any(name.split(".")[-1] == "CutCrossEntropyPlugin" for name in names)
