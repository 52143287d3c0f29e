"""Find settings of an Axolotl configuration that STAR-DSS does not support."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from star_dss_plugin.validation import shortened

__all__ = ["conflicts", "packing_leaks", "trained_roles"]

_OWN_LOSS = "it trains with a loss of its own, which STAR-DSS would replace"
_SPLIT = "it splits a response over several devices or sequences"

# Setting: (reason, remedy). To support a setting, remove its line.
_REFUSED: dict[str, tuple[str, str]] = {
    "rl": (_OWN_LOSS, "Remove it: STAR-DSS is for supervised finetuning"),
    "reward_model": (_OWN_LOSS, "Remove it: STAR-DSS is for supervised finetuning"),
    "process_reward_model": (_OWN_LOSS, "Remove it: STAR-DSS is for supervised finetuning"),
    "use_eaft": (_OWN_LOSS, "Set use_eaft: false"),
    "use_dft": (_OWN_LOSS, "Set use_dft: false"),
    "diffusion_lm": (_OWN_LOSS, "Remove it"),
    "orpo_alpha": (_OWN_LOSS, "Remove it"),
    "liger_use_token_scaling": (_OWN_LOSS, "Set liger_use_token_scaling: false"),
    "label_smoothing_factor": (
        "smoothing spreads weight over tokens that no guard has scored",
        "Remove it",
    ),
    "trainer_cls": ("Axolotl takes one trainer class, and STAR-DSS brings it", "Remove it"),
    "pretraining_dataset": (
        "its texts are joined and cut when they are tokenized, so no response is left whole",
        "Use datasets, with streaming: true for a stream",
    ),
    "use_pose": ("it moves positions, for which no reference is computed", "Set use_pose: false"),
}
_PARALLEL = ("context_parallel_size", "sequence_parallel_degree")
# Reasons by the plugin's package in axolotl.integrations. Any other plugin that provides a trainer
# is found in `StarDSSPlugin.get_trainer_cls`.
_PLUGINS = {
    "kd": _OWN_LOSS,
    "diffusion": _OWN_LOSS,
    "diffusion_decision": _OWN_LOSS,
    "mixlora": _OWN_LOSS,
    "hatchery": "it trains in another process, without this trainer",
    "nemo_gym": _OWN_LOSS,
}


def conflicts(cfg: Mapping[str, Any]) -> list[str]:
    """Return a message for each unsupported setting: what was given, why, and what to change.

    Args:
        cfg: The configuration as written, before Axolotl validates it.
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
    parallel = cfg.get("context_parallel")  # a block of Axolotl 0.21's plugin of this name
    if isinstance(parallel, Mapping) and (parallel.get("size") or 1) > 1:
        yield f"context_parallel.size: {parallel['size']}", _SPLIT, "Set context_parallel.size: 1"
    if cfg.get("relora") and _reference_is_adapter(cfg):
        yield (
            f"relora: {shortened(cfg['relora'])}",
            "it merges the adapter into the base model while it trains, and the base model is "
            "the reference that was chosen",
            "Set star_dss.reference: copy, or relora: false",
        )
    if cfg.get("fix_untrained_tokens") and not _reference_is_adapter(cfg):
        yield (
            f"fix_untrained_tokens: {shortened(cfg['fix_untrained_tokens'])}",
            "it changes embeddings after the reference was computed, so the model would not start "
            "as its reference",
            "Set star_dss.reference: adapter where an adapter is trained, or remove it and fix the "
            "tokens in base_model beforehand",
        )
    if cfg.get("balance_labels") and not cfg.get("sample_packing"):
        yield (
            f"balance_labels: {shortened(cfg['balance_labels'])}",
            "without packing it accepts only Axolotl's own collator, which would not carry scores",
            "Set sample_packing: true, or balance_labels: false",
        )
    yield from _media_conflicts(cfg)
    accelerator = cfg.get("accelerator_config")
    dispatches = isinstance(accelerator, Mapping) and accelerator.get("dispatch_batches")
    if cfg.get("streaming") and dispatches:
        yield (
            "streaming and accelerator_config.dispatch_batches",
            "each process reads and scores its rows itself",
            "Remove dispatch_batches",
        )
    for plugin in cfg.get("plugins") or ():
        package = str(plugin).removeprefix("axolotl.integrations.").split(".")[0]
        if package in _PLUGINS:
            yield f"the plugin {plugin}", _PLUGINS[package], "Remove it from plugins"
    for key in ("datasets", "test_datasets"):
        for i, dataset in enumerate(cfg.get(key) or ()):
            if isinstance(dataset, Mapping):
                yield from _dataset_conflicts(f"{key}[{i}]", dataset)


def _media_conflicts(cfg: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    """Find settings that do not work with Axolotl's multimodal collator, which tokenizes rows."""
    processor = cfg.get("processor_type")
    if cfg.get("skip_prepare_dataset") and not processor:
        why = "the data then has no tokens to score, and no processor makes them later"
        yield f"skip_prepare_dataset: {shortened(cfg['skip_prepare_dataset'])}", why, "Remove it"
    if not processor:
        return
    what = f"processor_type: {shortened(processor)}"
    if not cfg.get("skip_prepare_dataset"):
        why = "the collator that makes tokens of images reads messages, which are gone by then"
        yield f"{what} on prepared data", why, "Set skip_prepare_dataset: true"
    if cfg.get("remove_unused_columns") is not False:
        why = "messages and images are columns that the model does not use, and would be removed"
        yield f"{what} without these columns", why, "Set remove_unused_columns: false"
    if cfg.get("streaming"):
        why = "rows that the collator tokenizes are scored before training"
        yield f"{what} and streaming", why, "Set streaming: false"
    if cfg.get("sample_packing"):
        why = "rows that the collator tokenizes have no lengths to pack them by"
        yield f"{what} and sample_packing", why, "Set sample_packing: false"


def _reference_is_adapter(cfg: Mapping[str, Any]) -> bool:
    """Return whether the reference is the model with its adapter switched off at each step."""
    block = cfg.get("star_dss")
    if not isinstance(block, Mapping):
        return False
    reference = block.get("reference") or "auto"
    at_each_step = (
        cfg.get("streaming") or cfg.get("processor_type") or block.get("kl_estimator") == "full"
    )
    trained = cfg.get("adapter") or cfg.get("relora")
    return reference == "adapter" or bool(reference == "auto" and at_each_step and trained)


def trained_roles(dataset: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """Return the roles whose turns a data set trains: (names of the assistant, other roles).

    Args:
        dataset: An entry of `datasets` as written.
    """
    assistant = {"assistant", "gpt"}
    roles = dataset.get("roles")
    if isinstance(roles, Mapping):
        assistant = {"assistant", *(roles.get("assistant") or ())}
    trained = dataset.get("roles_to_train") or ()
    trained = [trained] if isinstance(trained, str) else list(trained)
    return [r for r in trained if r in assistant], [r for r in trained if r not in assistant]


def _dataset_conflicts(where: str, dataset: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    """Find data sets that train only roles other than the assistant.

    If the assistant is trained, too, `change_settings` removes the other roles.
    """
    assistant, others = trained_roles(dataset)
    if others and not assistant:
        yield (
            f"{where}.roles_to_train: {others}",
            f"{', '.join(map(str, others))} would be trained, and a guard judges what the "
            "assistant says",
            "Set roles_to_train: [assistant]",
        )


def packing_leaks(cfg: Any) -> str | None:
    """Return the message that the chosen attention mixes packed rows; None if it does not.

    Args:
        cfg: The configuration as validated by Axolotl.
    """
    packs = getattr(cfg, "sample_packing", None) and not cfg.attn_decontaminates_packing
    if not packs or _is_flash_kernel(cfg.attn_implementation):
        return None
    return (
        f"STAR-DSS cannot be used with sample_packing and attn_implementation: "
        f"{cfg.attn_implementation}: rows of one pack would read each other, and neither the guard "
        "nor the reference read them together. Set attn_implementation to flash_attention_2, "
        "flex_attention, sdpa or eager, or sample_packing: false."
    )


def _is_flash_kernel(attention: Any) -> bool:
    """Return whether an attention is a FlashAttention kernel from the Hub (`org/…flash-attn…`).

    Axolotl lists only some of them as keeping packed rows apart. transformers calls all of them in
    the same way, and they separate rows by `position_ids` if there is no attention mask. Axolotl
    makes a mask for those that it does not list; the trainer leaves it out.
    """
    organisation, _, kernel = str(attention).partition("/")
    return bool(organisation) and "flash-attn" in kernel
