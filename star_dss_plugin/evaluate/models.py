"""The models that are compared: full ones, LoRA adapters, and the demonstration's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from star_dss_plugin.errors import ConfigError, PluginError
from star_dss_plugin.guards.weights_on_disk import default_device
from star_dss_plugin.smollm2 import load_smollm2

__all__ = ["DEMO_MODEL", "load_model", "training_guard"]

DEMO_MODEL = "smollm2"
"""The name of SmolLM2-135M-Instruct as `load_smollm2` gives it, without the network."""
_ADAPTER = "adapter_config.json"


def load_model(
    name: str, *, base: str | None = None, device: str | None = None, dtype: str = "auto"
) -> tuple[Any, PreTrainedTokenizerBase]:
    """A causal language model in eval mode, and its tokenizer; safetensors only, no remote code.

    Args:
        name: Hub id or folder of a model, folder of a PEFT adapter, or "smollm2".
        base: What an adapter belongs to, where that is not what its configuration says.
        device: Torch device; None: the GPU if there is one.
        dtype: "auto" (as stored) or the name of a torch dtype.

    Raises:
        ConfigError: It cannot be loaded; why, and what to change.
        PluginError: It is an adapter, and PEFT is not installed.
    """
    if dtype != "auto" and not isinstance(getattr(torch, dtype, None), torch.dtype):
        raise ConfigError(f"dtype is {dtype!r}; give auto, float32, bfloat16 or float16.")
    model, tokenizer = _load(name, base, dtype)
    return model.to(default_device(device)).eval(), tokenizer


def training_guard(name: str) -> str | None:
    """The guard that scored a model's training data, as its folder's `star_dss.json` says."""
    record = Path(name) / "star_dss.json"
    if not record.is_file():
        return None
    try:
        guard = json.loads(record.read_text(encoding="utf-8"))["data"]["train"]["guard"]
    except (ValueError, KeyError, TypeError):
        return None
    return str(guard)


def _load(name: str, base: str | None, dtype: str) -> tuple[Any, PreTrainedTokenizerBase]:
    folder = Path(name)
    if (folder / _ADAPTER).is_file():
        return _with_adapter(folder, base, dtype)
    if name == DEMO_MODEL:
        return load_smollm2(torch.float32 if dtype == "auto" else getattr(torch, dtype))
    try:
        model = AutoModelForCausalLM.from_pretrained(
            name, dtype=dtype, trust_remote_code=False, use_safetensors=True
        )
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(
            f"The model {name!r} cannot be loaded: {error}. Give a hub id, a folder written by "
            f"save_pretrained (safetensors), a PEFT adapter's folder, or {DEMO_MODEL!r}."
        ) from error
    return model, tokenizer


def _with_adapter(
    folder: Path, base: str | None, dtype: str
) -> tuple[Any, PreTrainedTokenizerBase]:
    try:
        from peft import PeftModel
    except ImportError as error:
        raise PluginError(
            f"{folder} is a PEFT adapter, and PEFT cannot be imported ({error}). Install it with: "
            "pip install 'star-dss-plugin[trl]'"
        ) from error
    config = json.loads((folder / _ADAPTER).read_text(encoding="utf-8"))
    origin = base or str(config.get("base_model_name_or_path"))
    try:
        model, tokenizer = _load(origin, None, dtype)
    except ConfigError as error:
        raise ConfigError(
            f"{folder} is an adapter of {origin!r}. {error} If that model is elsewhere, name it "
            "as the base."
        ) from error
    if (folder / "tokenizer_config.json").is_file():
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    return PeftModel.from_pretrained(model, folder), tokenizer
