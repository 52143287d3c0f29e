"""A guard's files: which weights it has, in which dtype, and its own words for what is wrong."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoTokenizer

from star_dss_plugin.errors import GuardError
from star_dss_plugin.models import UNLOADABLE, floating_dtype, read_model

__all__ = ["load_config", "load_weights", "not_loadable", "resolve_dtype", "weights_fingerprint"]

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
