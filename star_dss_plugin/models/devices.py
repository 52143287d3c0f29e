"""Choose the device and the dtype of a model."""

from __future__ import annotations

import gc

import torch

from star_dss_plugin.errors import ConfigError

__all__ = ["default_device", "find_device", "floating_dtype", "free_memory", "resolve_dtype"]

_COMPUTED_IN = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


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


def resolve_dtype(name: str | None, device: torch.device) -> torch.dtype:
    """Return the dtype that "auto" or a name means on a device."""
    if name in (None, "auto"):
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return floating_dtype("guard_dtype", str(name))


def free_memory() -> None:
    """Release the device memory of models that are no longer referenced."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
