"""Load pretrained models for guards, references and evaluations, and reject incomplete files."""

from __future__ import annotations

import contextlib
import gc
import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import (
    AutoConfig,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    modeling_utils,
)
from transformers.integrations import deepspeed as hf_deepspeed

from star_dss_plugin.errors import ConfigError, GuardError, StarDSSError
from star_dss_plugin.smollm2 import SMOLLM2, resolve_model
from star_dss_plugin.unpatched import unpatched, unpatched_class

__all__ = [
    "UNLOADABLE",
    "default_device",
    "find_device",
    "floating_dtype",
    "free_memory",
    "is_partitioned",
    "is_peft",
    "load_config",
    "load_tokenizer",
    "load_weights",
    "model_fingerprint",
    "not_loadable",
    "read_model",
    "resolve_dtype",
    "settings_of",
    "weights_digest",
    "weights_fingerprint",
]

UNLOADABLE = (OSError, ValueError, KeyError, RuntimeError, SafetensorError)
"""Exceptions of `read_model` and transformers for files that are missing, damaged or incomplete."""

_COMPUTED_IN = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


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


def default_device(device: str | torch.device | None) -> torch.device:
    """Return the requested device; None is the GPU if there is one."""
    return torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))


def floating_dtype(option: str, name: str) -> torch.dtype:
    """Return the torch dtype of a name. The caller resolves "auto".

    Raises:
        ConfigError: The name is not a floating dtype that models are computed in.
    """
    found = {str(dtype).removeprefix("torch."): dtype for dtype in _COMPUTED_IN}.get(name)
    if found is None:
        raise ConfigError(f"{option} is {name!r}; use 'auto', 'float32', 'bfloat16' or 'float16'.")
    return found


def settings_of(config: PreTrainedConfig | None) -> dict[str, Any]:
    """Return the part of a model's configuration that its outputs depend on."""
    settings: dict[str, Any] = {} if config is None else config.to_diff_dict()
    for incidental in ("_name_or_path", "transformers_version", "use_cache"):
        settings.pop(incidental, None)
    return settings


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


def is_peft(model: nn.Module) -> bool:
    """Return whether a model is wrapped by PEFT, without importing PEFT."""
    return hasattr(model, "peft_config") and hasattr(model, "disable_adapter")


def is_partitioned(model: nn.Module) -> bool:
    """Return whether DeepSpeed ZeRO-3 holds only a part of every parameter on each rank."""
    return any(hasattr(parameter, "ds_id") for parameter in model.parameters())


@contextlib.contextmanager
def _gathered(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """Gather a parameter that ZeRO-3 has partitioned, or that is a DTensor, within the block."""
    if isinstance(tensor, DTensor):
        whole: torch.Tensor = tensor.full_tensor()
        yield whole
    elif hasattr(tensor, "ds_id"):
        import deepspeed

        with deepspeed.zero.GatheredParameters([tensor]):
            yield tensor
    else:
        yield tensor


def model_fingerprint(model: nn.Module) -> str:
    """Return a hash that identifies a model's weights, computed mostly on the device.

    It covers the configuration, the active adapters and their scaling, and the name, shape, dtype,
    sum and 64 evenly spaced values of every parameter and buffer. ZeRO-3 and tensor parallelism
    do not change it: one parameter is gathered at a time, so all ranks must call it.
    """
    digest = hashlib.sha256()
    settings = settings_of(getattr(model, "config", None))
    digest.update(json.dumps(settings, sort_keys=True, default=str).encode())
    if is_peft(model):
        digest.update(repr(model.active_adapters).encode())
        for name, module in model.named_modules():
            if hasattr(module, "scaling"):
                digest.update(f"{name}:{module.scaling}".encode())
    for name, part in sorted(model.state_dict(keep_vars=True).items()):
        with _gathered(part) as tensor:
            digest.update(f"{name}:{tuple(tensor.shape)}:{tensor.dtype}:".encode())
            flat = tensor.detach().reshape(-1)
            if not flat.is_floating_point():
                flat = flat.to(torch.float64)
            step = max(1, flat.numel() // 64)
            sampled = flat[::step].double().cpu().numpy()
            digest.update(sampled.tobytes())
            digest.update(flat.double().sum().cpu().numpy().tobytes())
    return digest.hexdigest()


def find_device(name: str | None) -> torch.device:
    """Return a device by name; None is the GPU if there is one.

    Raises:
        ConfigError: The device does not exist.
    """
    try:
        device = default_device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # torch without CUDA raises AssertionError
        said = str(error).splitlines()[0]
        raise ConfigError(
            f"device is {name or 'cuda'!r}: {said}. Use cpu, or cuda on a GPU."
        ) from error
    return device


def free_memory() -> None:
    """Release the device memory of models that are no longer referenced."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def weights_digest(model: PreTrainedModel) -> str:
    """Return the SHA-256 of a model's configuration and of all its weights, which are on the CPU.

    Unlike `model_fingerprint`, which sums weights on their device, it does not depend on the number
    of threads, so that a resumed run recognizes its model on any machine.
    """
    settings = json.dumps(settings_of(model.config), sort_keys=True, default=str)
    digest = hashlib.sha256(settings.encode())
    for name, weight in sorted(model.named_parameters()):
        digest.update(f"{name}:{tuple(weight.shape)}:{weight.dtype}:".encode())
        digest.update(weight.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


_MODEL_FILES = (".json", ".safetensors", ".bin", ".gguf", ".jinja", ".model", ".txt", ".py")


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


def resolve_dtype(name: str | None, device: torch.device) -> torch.dtype:
    """Return the dtype that "auto" or a name means on a device."""
    if name in (None, "auto"):
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return floating_dtype("guard_dtype", str(name))


def weights_fingerprint(source: str, config: Any) -> str:
    """Return a hash that identifies weights without reading all of them (8B guards have 16 GB).

    For a Hub model it is the commit. For a folder it covers the configuration and each weight
    file's name, size and 512 evenly spaced blocks, because a finetuned copy may differ only in some
    layers.
    """
    commit = getattr(config, "_commit_hash", None)
    if commit:
        return str(commit)
    digest = hashlib.sha256()
    block, blocks = 1 << 12, 1 << 9
    for path in sorted(Path(source).glob("*")):
        if path.suffix not in _MODEL_FILES:
            continue
        size = path.stat().st_size
        digest.update(f"{path.name}:{size}:".encode())
        with path.open("rb") as file:
            if size <= block * blocks:
                digest.update(file.read())
                continue
            for i in range(blocks):
                file.seek(i * (size - block) // (blocks - 1))
                digest.update(file.read(block))
    return digest.hexdigest()
