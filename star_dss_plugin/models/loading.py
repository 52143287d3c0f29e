"""Load pretrained models for guards, references and evaluations, and reject incomplete files."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerBase, modeling_utils
from transformers.integrations import deepspeed as hf_deepspeed

from star_dss_plugin.errors import ConfigError, GuardError, StarDSSError
from star_dss_plugin.smollm2 import SMOLLM2, resolve_model
from star_dss_plugin.unpatched import unpatched, unpatched_class

__all__ = [
    "UNLOADABLE",
    "load_config",
    "load_tokenizer",
    "load_weights",
    "not_loadable",
    "read_model",
]

UNLOADABLE = (OSError, ValueError, KeyError, RuntimeError, SafetensorError)
"""Exceptions of `read_model` and transformers for files that are missing, damaged or incomplete."""


def read_model(
    auto: Any, source: str, *, dtype: torch.dtype | str, exact: bool = False, **hub: Any
) -> Any:
    """Load a model from safetensors files that hold all of its weights, on the CPU, in eval mode.

    Args:
        auto: The class whose `from_pretrained` loads the model.
        source: Hugging Face Hub id or folder, or "smollm2".
        dtype: Torch dtype of the weights; "auto" keeps the dtype in which they are stored.
        exact: Whether weights in the files that the model does not have are an error too.
        **hub: Further arguments of `from_pretrained`, such as `trust_remote_code`.

    Raises:
        OSError, ValueError, KeyError, RuntimeError, SafetensorError: See `UNLOADABLE`.
    """
    source = resolve_model(source)
    # No pickle: a .bin file can execute any code when it is loaded.
    with _whole():
        loaded: Any = auto.from_pretrained(
            source, dtype=dtype, output_loading_info=True, use_safetensors=True, **hub
        )
    model, report = loaded
    if getattr(model, "_hf_peft_config_loaded", False) and not Path(source, "config.json").exists():
        # The report covers the adapter's weights only, not those that its base model lacks.
        base = next(iter(model.peft_config.values())).base_model_name_or_path
        read_model(auto, base, dtype=dtype, trust_remote_code=hub.get("trust_remote_code", False))
    if missing := sorted(report["missing_keys"]):
        # transformers initializes them at random and continues.
        raise ValueError(f"its files lack the weights {missing[:3]}")
    unexpected = sorted(report["unexpected_keys"])
    if exact and unexpected:
        raise ValueError(f"its files have weights of another model: {unexpected[:3]}")
    if lost := _lost_to_a_patch(model, unexpected):
        raise ValueError(
            f"{type(model).__name__} has no place for {lost[0]}, which transformers' own class "
            "has: something has replaced layers of that class in this process (Liger's have no "
            "biases)"
        )
    return model.eval()


def _lost_to_a_patch(model: nn.Module, unexpected: Sequence[str]) -> list[str]:
    """Return the weights of a file that a model lacks because its class was patched."""
    own = unpatched_class(type(model))
    if not unexpected or own is type(model):
        return []
    with torch.device("meta"):
        known = own(model.config).state_dict().keys()
    return [name for name in unexpected if name in known]


_RAM_EFFICIENT = "FSDP_CPU_RAM_EFFICIENT_LOADING"


@contextlib.contextmanager
def _whole() -> Iterator[None]:
    """Let transformers load a complete model on every rank, even if the trained one is sharded.

    Otherwise it would partition the model for ZeRO-3, or load weights only on rank 0 for FSDP.
    Guards and references are not part of an engine that would gather their parameters.
    """
    weak: Any = vars(hf_deepspeed)["_hf_deepspeed_config_weak_ref"]
    config = None if weak is None else weak()
    efficient = os.environ.pop(_RAM_EFFICIENT, None)
    hf_deepspeed.unset_hf_deepspeed_config()
    # Axolotl replaces both functions by one that always returns True.
    asked: list[Any] = [hf_deepspeed, modeling_utils]
    answers = [module.is_deepspeed_zero3_enabled for module in asked]
    for module in asked:
        module.is_deepspeed_zero3_enabled = lambda: False
    try:
        yield
    finally:
        for module, answer in zip(asked, answers, strict=True):
            module.is_deepspeed_zero3_enabled = answer
        if config is not None:
            hf_deepspeed.set_hf_deepspeed_config(config)
        if efficient is not None:
            os.environ[_RAM_EFFICIENT] = efficient


def load_tokenizer(name: str, *, only_local: bool = False) -> PreTrainedTokenizerBase:
    """Load a tokenizer by id or folder, without running code that comes with it.

    Args:
        name: Hugging Face Hub id or folder, or "smollm2", which is then its `name_or_path`.
        only_local: Whether downloads are forbidden, as for names that come from the data.

    Raises:
        ConfigError: The tokenizer cannot be loaded.
    """
    try:
        found = AutoTokenizer.from_pretrained(
            resolve_model(name), trust_remote_code=False, local_files_only=only_local
        )
    except StarDSSError:
        raise
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(
            f"The tokenizer {name!r} cannot be loaded: {error}. Give the id or folder of the model "
            "that is to be trained."
        ) from error
    assert isinstance(found, PreTrainedTokenizerBase)
    if name == SMOLLM2:
        found.name_or_path = name  # provenance must not name this machine's cache folder
    return found


def load_config(name: str, source: str, **hub: Any) -> tuple[Any, Any]:
    """Load the configuration and the tokenizer of a model.

    Raises:
        GuardError: They are missing or damaged.
    """
    try:
        config = AutoConfig.from_pretrained(source, **hub)
        return config, AutoTokenizer.from_pretrained(source, **hub)
    except UNLOADABLE as error:
        raise not_loadable(name, source, error) from error


def load_weights(
    auto: Any,
    name: str,
    source: str,
    *,
    device: torch.device,
    dtype: torch.dtype,
    exact: bool = False,
    **hub: Any,
) -> Any:
    """Load a guard's frozen model, by classes of transformers that no host has patched.

    Args:
        auto: The class whose `from_pretrained` loads the model.
        name: The guard's name, for errors.
        source: Hugging Face Hub id or folder.
        device: Torch device.
        dtype: Torch dtype of the weights.
        exact: Whether weights in the files that the model does not have are an error too.
        **hub: Further arguments of `from_pretrained`.

    Raises:
        GuardError: The files are missing, damaged or incomplete.
    """
    try:
        with unpatched():
            model = read_model(auto, source, dtype=dtype, exact=exact, **hub)
    except UNLOADABLE as error:
        raise not_loadable(name, source, error) from error
    return torch.nn.Module.to(model.requires_grad_(False), device)


def not_loadable(name: str, source: str, error: Exception) -> GuardError:
    """Return the error for a guard whose files are missing, damaged or incomplete."""
    return GuardError(
        f"Guard {name!r} cannot be loaded from {source!r}: {error}. Check the id or folder, that "
        "you are logged in if the model is gated, and that it is downloaded if you are offline."
    )
