"""Pretrained models, as guards, references and evaluations load them: whole or not at all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import PreTrainedConfig

from star_dss_plugin.errors import ConfigError

__all__ = ["UNLOADABLE", "default_device", "floating_dtype", "read_model", "settings_of"]

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
