"""Pretrained models, as guards, references and evaluations load them: whole or not at all."""

from __future__ import annotations

import contextlib
import gc
import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import (
    AutoConfig,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.integrations import deepspeed as hf_deepspeed

from star_dss_plugin.errors import ConfigError, GuardError

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
"""What `read_model` and transformers raise for files that are not there, damaged or incomplete."""

_COMPUTED_IN = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def read_model(
    auto: Any, source: str, *, dtype: torch.dtype | str, exact: bool = False, **hub: Any
) -> Any:
    """A model from safetensors files that hold all of its weights, on the CPU, in eval mode.

    Args:
        auto: The class whose `from_pretrained` reads it.
        source: Hub id or folder.
        dtype: Of its weights; "auto": as they are stored.
        exact: Whether weights that the model does not have are an error too.
        **hub: More arguments of `from_pretrained`; `trust_remote_code` among them.

    Raises:
        OSError, ValueError, KeyError, RuntimeError, SafetensorError: See `UNLOADABLE`.
    """
    # No pickle: a .bin file may run whatever its author likes.
    with _whole():
        loaded: Any = auto.from_pretrained(
            source, dtype=dtype, output_loading_info=True, use_safetensors=True, **hub
        )
    model, report = loaded
    if getattr(model, "_hf_peft_config_loaded", False) and not Path(source, "config.json").exists():
        # The report is about the adapter's weights; what its base lacks is in none.
        base = next(iter(model.peft_config.values())).base_model_name_or_path
        read_model(auto, base, dtype=dtype, trust_remote_code=hub.get("trust_remote_code", False))
    if missing := sorted(report["missing_keys"]):
        # transformers fills them with random numbers and goes on.
        raise ValueError(f"its files lack the weights {missing[:3]}")
    if exact and (unexpected := sorted(report["unexpected_keys"])):
        raise ValueError(f"its files have weights of another model: {unexpected[:3]}")
    return model.eval()


_RAM_EFFICIENT = "FSDP_CPU_RAM_EFFICIENT_LOADING"


@contextlib.contextmanager
def _whole() -> Iterator[None]:
    """Let transformers read a model whole on every rank, whatever shards the trained one.

    It would partition it for ZeRO-3, or give all ranks but the first no values for FSDP, and a
    guard or a reference is in no engine that would put it together again.
    """
    weak: Any = vars(hf_deepspeed)["_hf_deepspeed_config_weak_ref"]
    config = None if weak is None else weak()
    efficient = os.environ.pop(_RAM_EFFICIENT, None)
    hf_deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        if config is not None:
            hf_deepspeed.set_hf_deepspeed_config(config)
        if efficient is not None:
            os.environ[_RAM_EFFICIENT] = efficient


def default_device(device: str | torch.device | None) -> torch.device:
    """The device that was asked for; None: the GPU if there is one."""
    return torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))


def floating_dtype(option: str, name: str) -> torch.dtype:
    """The torch dtype of a name; "auto" is the caller's to explain.

    Raises:
        ConfigError: It is no dtype that models are computed in.
    """
    found = {str(dtype).removeprefix("torch."): dtype for dtype in _COMPUTED_IN}.get(name)
    if found is None:
        raise ConfigError(f"{option} is {name!r}; use 'auto', 'float32', 'bfloat16' or 'float16'.")
    return found


def settings_of(config: PreTrainedConfig | None) -> dict[str, Any]:
    """What of a model's configuration its outputs depend on."""
    settings: dict[str, Any] = {} if config is None else config.to_diff_dict()
    for incidental in ("_name_or_path", "transformers_version", "use_cache"):
        settings.pop(incidental, None)
    return settings


def load_tokenizer(name: str, *, only_local: bool = False) -> PreTrainedTokenizerBase:
    """A tokenizer by id or folder; code that comes with it is never run.

    Args:
        name: Id or folder.
        only_local: Whether nothing may be downloaded: for names that the data gives.

    Raises:
        ConfigError: It cannot be loaded.
    """
    try:
        found = AutoTokenizer.from_pretrained(
            name, trust_remote_code=False, local_files_only=only_local
        )
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(
            f"The tokenizer {name!r} cannot be loaded: {error}. Give the id or folder of the model "
            "that is to be trained."
        ) from error
    assert isinstance(found, PreTrainedTokenizerBase)
    return found


def is_peft(model: nn.Module) -> bool:
    """Whether a model is wrapped by PEFT (without importing PEFT)."""
    return hasattr(model, "peft_config") and hasattr(model, "disable_adapter")


def is_partitioned(model: nn.Module) -> bool:
    """Whether DeepSpeed ZeRO-3 has left each rank a part of every parameter."""
    return any(hasattr(parameter, "ds_id") for parameter in model.parameters())


def _gathered(tensor: torch.Tensor) -> contextlib.AbstractContextManager[Any]:
    """A context in which a parameter that ZeRO-3 has partitioned is whole, on every rank."""
    if not hasattr(tensor, "ds_id"):
        return contextlib.nullcontext()
    import deepspeed

    gathered: contextlib.AbstractContextManager[Any] = deepspeed.zero.GatheredParameters([tensor])
    return gathered


def model_fingerprint(model: nn.Module) -> str:
    """What identifies a model's weights, without moving all of them off the device.

    The configuration, the active adapters and their scaling; name, shape, dtype, sum and 64 evenly
    spaced values of every parameter and buffer. It is the same if ZeRO-3 has partitioned them, one
    of which is gathered at a time; all ranks must call it then.
    """
    digest = hashlib.sha256()
    settings = settings_of(getattr(model, "config", None))
    digest.update(json.dumps(settings, sort_keys=True, default=str).encode())
    if is_peft(model):
        digest.update(repr(model.active_adapters).encode())
        for name, module in model.named_modules():
            if hasattr(module, "scaling"):
                digest.update(f"{name}:{module.scaling}".encode())
    for name, tensor in sorted(model.state_dict(keep_vars=True).items()):
        with _gathered(tensor):
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
    """A device by name; None: the GPU if there is one.

    Raises:
        ConfigError: There is no such device.
    """
    try:
        device = default_device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # torch without CUDA asserts that it has it
        said = str(error).splitlines()[0]
        raise ConfigError(
            f"device is {name or 'cuda'!r}: {said}. Use cpu, or cuda on a GPU."
        ) from error
    return device


def free_memory() -> None:
    """Gives the memory of models that nobody holds any more back to the device."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def weights_digest(model: PreTrainedModel) -> str:
    """The SHA-256 of a model's configuration and of every bit of its weights, which are on the CPU.

    Unlike `reference.model_fingerprint`, which sums weights where they are, it does not depend on
    the number of threads: a resumed run must recognise its model anywhere.
    """
    settings = json.dumps(settings_of(model.config), sort_keys=True, default=str)
    digest = hashlib.sha256(settings.encode())
    for name, weight in sorted(model.named_parameters()):
        digest.update(f"{name}:{tuple(weight.shape)}:{weight.dtype}:".encode())
        digest.update(weight.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


_MODEL_FILES = (".json", ".safetensors", ".bin", ".gguf", ".jinja", ".model", ".txt", ".py")


def load_config(name: str, source: str, **hub: Any) -> tuple[Any, Any]:
    """The configuration and the tokenizer of a model.

    Raises:
        GuardError: They are not there, or damaged.
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
    """A guard's frozen model.

    Args:
        auto: As for `read_model`; so are `source`, `dtype`, `exact` and `hub`.
        name: The guard's name, for errors.
        source: Hub id or folder.
        device: Where it will be.
        dtype: Of its weights.
        exact: Whether weights that the model does not have are an error too.
        **hub: More arguments of `from_pretrained`.

    Raises:
        GuardError: They are not there, damaged or incomplete.
    """
    try:
        model = read_model(auto, source, dtype=dtype, exact=exact, **hub)
    except UNLOADABLE as error:
        raise not_loadable(name, source, error) from error
    return torch.nn.Module.to(model.requires_grad_(False), device)


def not_loadable(name: str, source: str, error: Exception) -> GuardError:
    """The error for a model that is not where it should be, or not whole."""
    return GuardError(
        f"Guard {name!r} cannot be loaded from {source!r}: {error}. Check the id or folder, that "
        "you are logged in if the model is gated, and that it is downloaded if you are offline."
    )


def resolve_dtype(name: str | None, device: torch.device) -> torch.dtype:
    """The dtype that "auto" or a name stands for on a device."""
    if name in (None, "auto"):
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return floating_dtype("guard_dtype", str(name))


def weights_fingerprint(source: str, config: Any) -> str:
    """What identifies the weights without reading all of them (8B guards have 16 GB).

    The hub's commit; for a folder the configuration, and of each weight file its name, its size and
    blocks from all over it: a finetuned copy may differ in its inner layers only.
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
