"""Choose and run π_ref: the aligned model before finetuning, frozen (paper, Eq. 3).

k1, k2 and k3 need one number per token from it, so those are computed once, before the first step,
and carried as a column: a step then costs what a step of plain finetuning costs. `full` needs the
whole distribution at every step: a LoRA run switches its adapter off, others keep a frozen copy.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from star_dss_plugin.errors import ConfigError, StarDSSError
from star_dss_plugin.models import UNLOADABLE, is_peft, model_fingerprint, read_model
from star_dss_plugin.options import REFERENCES
from star_dss_plugin.smollm2 import resolve_model
from star_dss_plugin.training.head import Projection, can_project, causal_lm, from_logits
from star_dss_plugin.training.sharding import Ranks

__all__ = ["Reference", "choose_reference"]

logger = logging.getLogger(__name__)

T = TypeVar("T")


@dataclass
class Reference:
    """Hold how a run gets π_ref.

    Attributes:
        kind: "none", "precomputed", "adapter" (the policy without it), "copy" (the policy with the
            values that its trained parameters had at the start) or "model" (a frozen one beside
            it).
        description: For the start-up line.
        model: The frozen model of kind "model", or the one to precompute from if it is not the
            trained model itself.
        fingerprint: Of kind "precomputed": identifies the weights of the model as it starts.
        starting: Of kind "copy": values of the trained parameters, by name.
        projects: Whether its logits are made a few positions at a time.
        is_start: Whether it is the trained model as it starts.
    """

    kind: str
    description: str
    model: nn.Module | None = None
    fingerprint: str | None = None
    starting: dict[str, Tensor] | None = None
    projects: bool = False
    is_start: bool = False

    @contextlib.contextmanager
    def active(self, policy: nn.Module) -> Iterator[nn.Module]:
        """Lend the reference as a module to call, in eval mode and without gradients.

        Args:
            policy: The trained model, unwrapped.
        """
        with torch.no_grad():
            if self.kind == "model":
                assert self.model is not None
                yield self.model
                return
            training = policy.training
            policy.eval()  # dropout and NEFTune noise are not part of the reference
            try:
                with self._as_it_was(policy):
                    yield policy
            finally:
                policy.train(training)

    def _as_it_was(self, policy: nn.Module) -> contextlib.AbstractContextManager[Any]:
        if self.kind == "adapter":
            return _adapter_off(policy)
        assert self.starting is not None
        return _with_values(policy, self.starting)

    def run(
        self,
        policy: nn.Module,
        batch: Mapping[str, Any],
        function: Callable[[Tensor, Projection | None], T],
        *,
        call: nn.Module | None = None,
    ) -> T:
        """Run the reference on a batch, without gradients; return what a function makes of it.

        Args:
            policy: The trained model, unwrapped.
            batch: `input_ids` and what else the forward pass takes.
            function: Takes hidden states and their projection or, without one, logits and None.
            call: The trained model as it is wrapped, if it is sharded.
        """
        with self.active(policy) as model:
            wrapped = call if model is policy else None
            return from_logits(model, batch, function, project=self.projects, call=wrapped)


@contextlib.contextmanager
def _adapter_off(policy: nn.Module) -> Iterator[None]:
    """Switch a PEFT model's adapter off for a while; what was frozen before is so afterwards.

    PEFT makes all of an active adapter trainable when it switches it on again.
    """
    trained = [(parameter, parameter.requires_grad) for parameter in policy.parameters()]
    try:
        with policy.disable_adapter():  # type: ignore[operator]
            yield
    finally:
        for parameter, was in trained:
            if parameter.requires_grad != was:
                parameter.requires_grad_(was)


@contextlib.contextmanager
def _with_values(policy: nn.Module, values: Mapping[str, Tensor]) -> Iterator[None]:
    """Let parameters hold other values for a while; nothing is copied."""
    parameters = dict(policy.named_parameters())
    moving = [n for n, p in parameters.items() if p.requires_grad and n not in values]
    if moving:
        raise StarDSSError(
            f"{moving[0]} and {len(moving) - 1} other parameters became trainable after STAR-DSS "
            "was set up, so their values at the start, which the reference needs, are gone. Make "
            "all of them trainable before, or set reference='precomputed'."
        )
    if gone := [name for name in values if name not in parameters]:
        raise StarDSSError(
            f"The model is another one than STAR-DSS was set up with: it lacks {gone[0]} and "
            f"{len(gone) - 1} other trained parameters, whose values at the start are the "
            "reference. Give the trainer's constructor the model that is to be trained."
        )
    held = {name: parameters[name].data for name in values}
    try:
        for name, value in values.items():
            parameter = parameters[name]
            parameter.data = value.to(parameter.device, parameter.dtype)
        torch.clear_autocast_cache()  # it knows parameters by identity, not by value
        yield
    finally:
        for name, data in held.items():
            parameters[name].data = data
        torch.clear_autocast_cache()


def choose_reference(
    name: str,
    policy: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    *,
    estimator: str,
    needed: bool,
    projects: bool,
    ranks: Ranks,
    live: str = "",
) -> Reference:
    """Decide what `reference=name` means for this run.

    Args:
        name: An option of `options.REFERENCES`, or a model id or folder.
        policy: The model as it starts.
        tokenizer: The policy's.
        estimator: The KL estimator.
        needed: Whether any token can get a KL weight.
        projects: Whether `can_project` holds for the policy.
        ranks: The processes of the run; all of them must call this.
        live: What kind of data has rows that are not there, or have no tokens, before they are
            trained on, so that nothing can be computed for them before; "" if there is none.

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
        return ranks.first_decides(lambda: decide(policy))

    if name == "auto":
        early = not live and estimator != "full" and ranks.can_run
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
            f"reference is {name!r}, for which the model is run, or its values are kept, before "
            "training shards it. But its experts are spread over the ranks, and the first rank "
            "alone has its other weights until then. Set cpu_ram_efficient_loading to false, or "
            "train a new adapter with reference='adapter', or name the model as it starts."
        )
    if name == "precomputed":
        if estimator == "full":
            raise ConfigError(
                "reference is 'precomputed', but kl_estimator='full' needs the reference's whole "
                "distribution at every step. Set reference='adapter' or 'copy', or "
                "kl_estimator='k2'."
            )
        if live:
            raise ConfigError(
                "reference is 'precomputed', but these rows get their tokens in the data collator, "
                "while the model trains. Set reference='auto' (the base model under an adapter, or "
                "a frozen copy of what is trained), or name the model as it starts."
            )
        what = "the model as it starts (precomputed log-probabilities)"
        fingerprint = ranks.fingerprint(policy)
        return Reference(
            "precomputed", what, fingerprint=fingerprint, projects=projects, is_start=True
        )
    if name == "copy":
        split = "tensor parallelism" if ranks.alike > 1 else ranks.sharding
        if split is not None:
            why = f"kl_estimator={estimator!r}"
            other = "Set kl_estimator='k2', whose reference is computed before training; or name"
            if live:
                why, other = live, "Name"
            raise ConfigError(
                f"reference='copy', which {why} gets here, keeps the trained "
                f"parameters' values as they start and puts them in place at each step, and "
                f"{split} leaves no rank whole parameters to put them in. {other} the "
                "model as it starts (reference='org/model' or its folder), of which every rank "
                "then holds a whole copy; or train an adapter with reference='adapter'."
            )
        trained = {n: p.detach().clone() for n, p in policy.named_parameters() if p.requires_grad}
        what = "the model as it starts (a frozen copy of what is trained)"
        return Reference("copy", what, starting=trained, projects=projects)
    assert name not in REFERENCES
    named = _load_named(name, policy, tokenizer).to(ranks.device)
    projects = can_project(named)
    if live or estimator == "full":
        return Reference("model", name, named, projects=projects)
    return Reference("precomputed", name, named, model_fingerprint(named), projects=projects)


def _adapter_is_fresh(policy: nn.Module) -> bool:
    """Return whether switching the adapter off changes nothing, tried on a few tokens.

    In a model that reads images they do not pass through every adapter.
    """
    config: Any = policy.config
    if config.get_text_config() is not config and any(
        "lora_B" in name and bool(parameter.any()) for name, parameter in policy.named_parameters()
    ):
        return False
    vocab = policy.config.get_text_config().vocab_size  # type: ignore[union-attr, operator]
    device = next(policy.parameters()).device
    ids = torch.arange(1, 33, device=device).remainder(vocab)[None]
    live = Reference("adapter", "")
    training = policy.training
    policy.eval()
    try:
        with torch.no_grad():
            on = policy(input_ids=ids, use_cache=False).logits.float()
        off = live.run(policy, {"input_ids": ids}, lambda logits, _: logits).float()
    finally:
        policy.train(training)
    return bool(torch.allclose(on, off, rtol=1e-3, atol=1e-3))


def _adapter_begins_at_zero(policy: nn.Module) -> bool:
    """Return whether switching the adapter off changes nothing, by its values alone."""
    second = ("lora_B", "lora_embedding_B")  # of the two factors; the first one is random
    outer = [p for name, p in policy.named_parameters() if any(part in name for part in second)]
    return bool(outer) and not any(bool(parameter.any()) for parameter in outer)


def _trained_outside(policy: nn.Module) -> list[str]:
    """Return the trained parameters that stay in place when the adapter is switched off."""
    configs = policy.peft_config.values()  # type: ignore[operator]
    if any(getattr(config, "bias", "none") != "none" for config in configs):
        return [name for name, p in policy.named_parameters() if p.requires_grad and "bias" in name]
    with _adapter_off(policy):
        return [name for name, p in policy.named_parameters() if p.requires_grad]


def _load_named(name: str, policy: nn.Module, tokenizer: PreTrainedTokenizerBase) -> nn.Module:
    parameter = next(policy.parameters())
    config: Any = policy.config
    # A model that reads images is no AutoModelForCausalLM; its own class loads one like it.
    alone = config.get_text_config() is config
    auto = AutoModelForCausalLM if alone else type(causal_lm(policy))
    try:
        # Without a word here transformers would ask on the terminal whether to run a model's code.
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
