"""Choose the kind of reference from the option `reference`, the model, the data and the ranks."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from star_dss_plugin.errors import ConfigError
from star_dss_plugin.models.fingerprints import is_peft, model_fingerprint
from star_dss_plugin.models.loading import UNLOADABLE, read_model
from star_dss_plugin.options import REFERENCES
from star_dss_plugin.smollm2 import resolve_model
from star_dss_plugin.training.head import can_project, causal_lm
from star_dss_plugin.training.reference.model import Reference, adapter_off
from star_dss_plugin.training.sharding import Ranks

__all__ = ["choose_reference"]


def choose_reference(
    name: str,
    policy: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    *,
    estimator: str,
    needed: bool,
    projects: bool,
    ranks: Ranks,
    obstacle: str = "",
) -> Reference:
    """Return the reference that `reference=name` means for this run; every rank must call this.

    Args:
        name: One of `options.REFERENCES`, or a model's Hub id or folder.
        policy: The trained model as it starts.
        tokenizer: The policy's tokenizer.
        estimator: The KL estimator.
        needed: Whether any token can get a KL weight.
        projects: Whether `can_project` holds for the policy.
        ranks: The ranks of the run.
        obstacle: Name, for messages, of data whose reference cannot be precomputed: a stream, rows
            that the data collator tokenizes, or packs whose documents the model reads together. ""
            if there is none.

    Raises:
        ConfigError: The choice contradicts the mode, the estimator, the model or its sharding.
    """
    if not needed:
        return Reference("none", "none (no KL term)")
    if name == "none":
        raise ConfigError(
            "reference is 'none', but this loss_type gives tokens a KL weight, which needs a "
            "reference. Set reference='auto', or kl_coef=0, or loss_type='rejection' or 'sft'."
        )

    def fresh() -> bool:
        decide = _adapter_is_fresh if ranks.can_run else _adapter_begins_at_zero
        return ranks.decide_on_first(lambda: decide(policy))

    if name == "auto":
        early = not obstacle and estimator != "full" and ranks.can_run
        name = "precomputed" if early else "copy"
        if name == "copy" and is_peft(policy) and fresh():
            name = "copy" if _trained_outside(policy) else "adapter"
    if name == "adapter":
        if not is_peft(policy):
            raise ConfigError(
                f"reference is 'adapter', but the model ({type(policy).__name__}) has no PEFT "
                "adapter to switch off. Pass a peft_config, or set reference='precomputed' or "
                "'copy'."
            )
        if not fresh():
            raise ConfigError(
                "reference is 'adapter', but the adapter already changes the model: training "
                "continues from it, so switching it off would not give the model as it starts. "
                "Set reference='precomputed' or 'copy'."
            )
        if outside := _trained_outside(policy):
            raise ConfigError(
                f"reference is 'adapter', but {outside[0]} and {len(outside) - 1} other parameters "
                "outside the adapter are trained too, so the base model would move. Set "
                "reference='precomputed' or 'copy', or train the adapter alone."
            )
        what = "the base model (adapter switched off)"
        return Reference("adapter", what, projects=projects)
    if name in ("precomputed", "copy") and not ranks.can_run:
        raise ConfigError(
            f"reference is {name!r}, which needs the model's weights before training shards it. "
            "But its experts are spread over the ranks, and only the first rank has its other "
            "weights until then. Set cpu_ram_efficient_loading to false, or train a new adapter "
            "with reference='adapter', or name the model as it starts."
        )
    if name == "precomputed":
        if estimator == "full":
            raise ConfigError(
                "reference is 'precomputed', but kl_estimator='full' needs the reference's whole "
                "distribution at every step. Set reference='adapter' or 'copy', or "
                "kl_estimator='k2'."
            )
        if obstacle:
            raise ConfigError(
                "reference is 'precomputed', which is computed for each row by itself before "
                f"training, and that is not possible for {obstacle}. Set reference='auto' (the "
                "base model under an adapter, or a frozen copy of the trained parameters), or name "
                "the model as it starts."
            )
        what = "the model as it starts (precomputed log-probabilities)"
        fingerprint = ranks.fingerprint(policy)
        return Reference(
            "precomputed", what, fingerprint=fingerprint, projects=projects, is_start=True
        )
    if name == "copy":
        split = "tensor parallelism" if ranks.tp_size > 1 else ranks.sharding
        if split is not None:
            why, other = f"kl_estimator={estimator!r}", "Set reference='precomputed', or name"
            if obstacle:
                why, other = obstacle, "Name"
            elif estimator == "full":
                other = "Set kl_estimator='k2' and reference='precomputed', or name"
            raise ConfigError(
                f"reference is 'copy' (with {why}), which swaps the trained parameters for their "
                f"values at the start at each step, and {split} leaves no rank whole parameters "
                f"that could be swapped. {other} the "
                "model as it starts (reference='org/model' or its folder), of which every rank "
                "then holds a whole copy; or train an adapter with reference='adapter'."
            )
        trained = {n: p.detach().clone() for n, p in policy.named_parameters() if p.requires_grad}
        what = "the model as it starts (a frozen copy of the trained parameters)"
        return Reference("copy", what, starting=trained, projects=projects)
    assert name not in REFERENCES
    named = _load_named(name, policy, tokenizer).to(ranks.device)
    projects = can_project(named)
    if obstacle or estimator == "full":
        return Reference("model", name, named, projects=projects)
    return Reference("precomputed", name, named, model_fingerprint(named), projects=projects)


def _adapter_is_fresh(policy: nn.Module) -> bool:
    """Return whether switching the adapter off changes no logits, tried on a few tokens.

    In a model that reads images these tokens do not run every adapted layer, so there every
    `lora_B` must be zero, too.
    """
    config: Any = policy.config
    if config.get_text_config() is not config and any(
        "lora_B" in name and bool(parameter.any()) for name, parameter in policy.named_parameters()
    ):
        return False
    vocab = policy.config.get_text_config().vocab_size  # type: ignore[union-attr, operator]
    device = next(policy.parameters()).device
    ids = torch.arange(1, 33, device=device).remainder(vocab)[None]
    without = Reference("adapter", "")
    training = policy.training
    policy.eval()
    try:
        with torch.no_grad():
            on = policy(input_ids=ids, use_cache=False).logits.float()
        off = without.run(policy, {"input_ids": ids}, lambda logits, _: logits).float()
    finally:
        policy.train(training)
    return bool(torch.allclose(on, off, rtol=1e-3, atol=1e-3))


def _adapter_begins_at_zero(policy: nn.Module) -> bool:
    """Return whether every second LoRA factor is zero, so that the adapter changes nothing."""
    second = ("lora_B", "lora_embedding_B")  # the first factor of the two starts at random
    outer = [p for name, p in policy.named_parameters() if any(part in name for part in second)]
    return bool(outer) and not any(bool(parameter.any()) for parameter in outer)


def _trained_outside(policy: nn.Module) -> list[str]:
    """Return the trained parameters that switching the adapter off leaves in effect."""
    configs = policy.peft_config.values()  # type: ignore[operator]
    if any(getattr(config, "bias", "none") != "none" for config in configs):
        return [name for name, p in policy.named_parameters() if p.requires_grad and "bias" in name]
    with adapter_off(policy):
        return [name for name, p in policy.named_parameters() if p.requires_grad]


def _load_named(name: str, policy: nn.Module, tokenizer: PreTrainedTokenizerBase) -> nn.Module:
    parameter = next(policy.parameters())
    config: Any = policy.config
    # A model that reads images is no AutoModelForCausalLM; the policy's own class loads it.
    alone = config.get_text_config() is config
    auto = AutoModelForCausalLM if alone else type(causal_lm(policy))
    try:
        # Without trust_remote_code=False transformers would ask on the terminal.
        theirs = AutoTokenizer.from_pretrained(resolve_model(name), trust_remote_code=False)
        model = read_model(auto, name, dtype=parameter.dtype, trust_remote_code=False)
    except UNLOADABLE as error:
        raise ConfigError(
            f"The reference {name!r} cannot be loaded: {error}. Give the id or folder of a model "
            "that is available here, or reference='auto'."
        ) from error
    if theirs.get_vocab() != tokenizer.get_vocab():
        raise ConfigError(
            f"The reference {name!r} has another tokenizer than the trained model, so its "
            "log-probabilities belong to other tokens. Use a reference with the same tokenizer: "
            "the model before finetuning."
        )
    frozen: nn.Module = model.requires_grad_(False)
    return frozen
