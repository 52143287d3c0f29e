"""A guard's files: which weights it has, in which dtype, and loading them, all or nothing."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoTokenizer

from star_dss_plugin.errors import ConfigError, GuardError

__all__ = [
    "default_device",
    "load_config",
    "load_weights",
    "not_loadable",
    "resolve_dtype",
    "weights_fingerprint",
]

_MODEL_FILES = (".json", ".safetensors", ".bin", ".gguf", ".jinja", ".model", ".txt", ".py")


def default_device(device: str | None) -> torch.device:
    """The device that was asked for; None: the GPU if there is one."""
    return torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))


def load_config(name: str, source: str, **hub: Any) -> tuple[Any, Any]:
    """The configuration and the tokenizer of a model.

    Raises:
        GuardError: They are not there, or damaged.
    """
    try:
        config = AutoConfig.from_pretrained(source, **hub)
        return config, AutoTokenizer.from_pretrained(source, **hub)
    except (OSError, ValueError, KeyError) as error:
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
    """A frozen model from safetensors files that hold all of its weights.

    Args:
        auto: The class whose `from_pretrained` loads it.
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
        # No pickle: a .bin file may run whatever its author likes.
        loaded: Any = auto.from_pretrained(
            source, dtype=dtype, output_loading_info=True, use_safetensors=True, **hub
        )
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise not_loadable(name, source, error) from error
    model, report = loaded
    if missing := sorted(report["missing_keys"]):
        # transformers fills them with random numbers and goes on.
        raise not_loadable(name, source, ValueError(f"its files lack the weights {missing[:3]}"))
    if exact and (unexpected := sorted(report["unexpected_keys"])):
        raise not_loadable(
            name, source, ValueError(f"its files have weights of another model: {unexpected[:3]}")
        )
    model.eval().requires_grad_(False)
    return torch.nn.Module.to(model, device)


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
    found = getattr(torch, str(name), None)
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise ConfigError(
            f"guard_dtype is {name!r}; use 'auto', 'float32', 'bfloat16' or 'float16'."
        )
    return found


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
