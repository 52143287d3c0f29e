"""Identify models: by hashes of their weights, and by what wraps or partitions them."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedConfig, PreTrainedModel

__all__ = [
    "is_partitioned",
    "is_peft",
    "model_fingerprint",
    "settings_of",
    "weights_digest",
    "weights_fingerprint",
]


def settings_of(config: PreTrainedConfig | None) -> dict[str, Any]:
    """Return the part of a model's configuration that its outputs depend on."""
    settings: dict[str, Any] = {} if config is None else config.to_diff_dict()
    for incidental in ("_name_or_path", "transformers_version", "use_cache"):
        settings.pop(incidental, None)
    return settings


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


_TEXT_FILES = (".json", ".jinja", ".model", ".txt", ".py")
_WEIGHT_FILES = (".safetensors", ".bin", ".gguf")
_BLOCK_BYTES, _BLOCKS = 1 << 12, 1 << 9


def weights_fingerprint(source: str, config: Any) -> str:
    """Return a hash that identifies weights without reading all of them (8B guards have 16 GB).

    For a Hub model it is the commit. For a folder it covers the configuration, the tokenizer and
    the templates, and of each weight file the name, the size and 512 evenly spaced blocks, because
    a finetuned copy may differ only in some layers.
    """
    commit = getattr(config, "_commit_hash", None)
    if commit:
        return str(commit)
    digest = hashlib.sha256()
    for path in sorted(Path(source).glob("*")):
        if path.suffix not in _TEXT_FILES + _WEIGHT_FILES:
            continue
        size = path.stat().st_size
        digest.update(f"{path.name}:{size}:".encode())
        with path.open("rb") as file:
            if path.suffix in _TEXT_FILES or size <= _BLOCK_BYTES * _BLOCKS:
                digest.update(file.read())
                continue
            for i in range(_BLOCKS):
                file.seek(i * (size - _BLOCK_BYTES) // (_BLOCKS - 1))
                digest.update(file.read(_BLOCK_BYTES))
    return digest.hexdigest()
