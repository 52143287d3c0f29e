"""Which weights a guard is loaded with, and in which dtype, known before they are loaded."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch

from star_dss_plugin.errors import ConfigError

__all__ = ["resolve_dtype", "weights_fingerprint"]

_MODEL_FILES = (".json", ".safetensors", ".bin", ".gguf", ".jinja", ".model", ".txt")


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
