"""What an Axolotl configuration must not ask for beside STAR-DSS, and what to change."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from star_dss_plugin.validation import shortened

__all__ = ["conflicts", "packing_leaks"]

_STREAMS = "rows are scored before training, and these are not there yet"
_OWN_LOSS = "it trains with a loss of its own, which STAR-DSS would replace"
_SHARDED = "the reference policy does not support sharded models yet"
_SPLIT = "it splits a response over several devices or sequences"

_REFUSED: dict[str, tuple[str, str]] = {
    "rl": (_OWN_LOSS, "Remove it: STAR-DSS is for supervised finetuning"),
    "reward_model": (_OWN_LOSS, "Remove it: STAR-DSS is for supervised finetuning"),
    "process_reward_model": (_OWN_LOSS, "Remove it: STAR-DSS is for supervised finetuning"),
    "use_eaft": (_OWN_LOSS, "Set use_eaft: false"),
    "orpo_alpha": (_OWN_LOSS, "Remove it"),
    "label_smoothing_factor": (
        "smoothing spreads weight over tokens that no guard has scored",
        "Remove it",
    ),
    "trainer_cls": ("Axolotl takes one trainer class, and STAR-DSS brings it", "Remove it"),
    "relora": (
        "it merges the adapter into the base model, which is the reference, while it trains",
        "Set relora: false",
    ),
    "batch_flattening": (
        "it joins rows in a collator that leaves their scores behind",
        "Set batch_flattening: false; sample_packing: true is supported",
    ),
    "streaming": (_STREAMS, "Set streaming: false"),
    "pretraining_dataset": (_STREAMS, "Use datasets"),
    "skip_prepare_dataset": ("there are no tokens to score then", "Remove it"),
    "train_on_inputs": (
        "prompts would be trained, and a guard judges what the assistant says",
        "Set train_on_inputs: false",
    ),
    "use_pose": ("it moves positions, for which no reference is computed", "Set use_pose: false"),
    "processor_type": ("vision data is not supported", "Train on text"),
    "fsdp": (_SHARDED, "Remove it: use DDP, or one process"),
    "fsdp_config": (_SHARDED, "Remove it: use DDP, or one process"),
    "deepspeed": (_SHARDED, "Remove it: use DDP, or one process"),
    "liger_fused_linear_cross_entropy": (
        "it fuses the loss into the model and gives no logits to weigh",
        "Set it to false; the other Liger kernels keep the logits",
    ),
    "cut_cross_entropy": (
        "it fuses the loss into the model and gives no logits to weigh",
        "Set cut_cross_entropy: false and remove its plugin",
    ),
}
_PARALLEL = ("context_parallel_size", "sequence_parallel_degree", "tensor_parallel_size")
# By the package of the plugin below axolotl.integrations.
_PLUGINS = {
    "kd": _OWN_LOSS,
    "diffusion": _OWN_LOSS,
    "hatchery": "it trains in another process, without this trainer",
    "nemo_gym": _OWN_LOSS,
    "cut_cross_entropy": _REFUSED["cut_cross_entropy"][0],
}


def conflicts(cfg: Mapping[str, Any]) -> list[str]:
    """Every setting that STAR-DSS cannot work beside: what was given, why, what to change.

    Args:
        cfg: The configuration as it is written, before Axolotl has validated it.
    """
    return [
        f"STAR-DSS cannot be used with {what}: {why}. {change}."
        for what, why, change in _conflicts(cfg)
    ]


def _conflicts(cfg: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    for name, (why, change) in _REFUSED.items():
        if cfg.get(name):
            yield f"{name}: {shortened(cfg[name])}", why, change
    for name in _PARALLEL:
        if (cfg.get(name) or 1) > 1:
            yield f"{name}: {cfg[name]}", _SPLIT, f"Set {name}: 1"
    for plugin in cfg.get("plugins") or ():
        package = str(plugin).removeprefix("axolotl.integrations.").split(".")[0]
        if package in _PLUGINS:
            yield f"the plugin {plugin}", _PLUGINS[package], "Remove it from plugins"
    for key in ("datasets", "test_datasets"):
        for i, dataset in enumerate(cfg.get(key) or ()):
            if isinstance(dataset, Mapping):
                yield from _dataset_conflicts(f"{key}[{i}]", dataset)


def _dataset_conflicts(where: str, dataset: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    """Turns of others among the trained ones: their tokens would be judged as the assistant's."""
    ours = {"assistant", "gpt"}
    roles = dataset.get("roles")
    if isinstance(roles, Mapping):
        ours = {"assistant", *(roles.get("assistant") or ())}
    trained = dataset.get("roles_to_train") or ()
    trained = [trained] if isinstance(trained, str) else list(trained)
    others = [role for role in trained if role not in ours]
    if others:
        yield (
            f"{where}.roles_to_train: {trained}",
            f"{', '.join(map(str, others))} would be trained, and a guard judges what the "
            "assistant says",
            "Set roles_to_train: [assistant]",
        )


def packing_leaks(cfg: Any) -> str | None:
    """Why sample packing cannot be used with the chosen attention; None if it can.

    Args:
        cfg: The configuration as Axolotl has validated it.
    """
    if not getattr(cfg, "sample_packing", None) or cfg.attn_decontaminates_packing:
        return None
    return (
        f"STAR-DSS cannot be used with sample_packing and attn_implementation: "
        f"{cfg.attn_implementation}: rows of one pack would read each other, and neither the guard "
        "nor the reference read them together. Set attn_implementation to flash_attention_2, "
        "flex_attention, sdpa or eager, or sample_packing: false."
    )
