"""Load models by id or folder for evaluation, with adapters merged and without remote code."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils.hub import cached_file
from transformers.utils.peft_utils import find_adapter_config_file

from star_dss_plugin.errors import ConfigError, StarDSSError
from star_dss_plugin.models.devices import floating_dtype
from star_dss_plugin.models.loading import UNLOADABLE, load_tokenizer, read_model
from star_dss_plugin.smollm2 import SMOLLM2, SMOLLM2_MEANING, load_smollm2
from star_dss_plugin.validation import check_reserved_name, require

__all__ = ["load_whole_model"]


def load_whole_model(
    name: str, *, dtype: str = "auto", base: str | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a causal language model on the CPU, in eval mode, and its tokenizer.

    Args:
        name: Id or folder of a model, or of a PEFT adapter, which is merged into its base; or
            "smollm2".
        dtype: "auto" (as stored) or the name of a torch dtype.
        base: Base model of an adapter, if it differs from the one in the adapter's configuration.

    Raises:
        ConfigError: The model cannot be loaded; the message gives the reason.
    """
    wanted: Any = dtype if dtype == "auto" else floating_dtype("dtype", dtype)
    try:
        if name == SMOLLM2:
            check_reserved_name(name, SMOLLM2_MEANING)
            return load_smollm2(torch.float32 if dtype == "auto" else wanted)
        if (adapter := find_adapter_config_file(name)) is not None:
            return _merged(name, Path(adapter), wanted, base)
        model = read_model(AutoModelForCausalLM, name, dtype=wanted, trust_remote_code=False)
        return model, load_tokenizer(name)
    except StarDSSError:
        raise
    except UNLOADABLE as error:
        raise ConfigError(
            f"The model {name!r} cannot be loaded: {error}. Give the id or folder of a causal "
            "language model, or of a PEFT adapter whose base model is available here."
        ) from error


def _merged(
    name: str, adapter: Path, dtype: Any, base: str | None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    require("peft", "trl", f"The adapter {name!r}", load=True)
    from peft import PeftModel

    if _file(name, "adapter_model.safetensors") is None:  # PEFT would take a .bin file
        raise ValueError("it has no adapter_model.safetensors; save it with safe serialization")
    config = json.loads(adapter.read_text(encoding="utf-8"))
    origin = base or config.get("base_model_name_or_path")
    if not origin:
        raise ValueError("its adapter_config.json names no base model; name one as the base")
    try:
        model, tokenizer = load_whole_model(
            origin, dtype=dtype if isinstance(dtype, str) else str(dtype).removeprefix("torch.")
        )
    except ConfigError as error:
        raise ConfigError(
            f"{name!r} is an adapter of {origin!r}. {error} If that model is elsewhere, name it as "
            "the base."
        ) from error
    merged = PeftModel.from_pretrained(model, name).merge_and_unload(safe_merge=True)
    assert isinstance(merged, PreTrainedModel)
    # Some adapters have their own tokenizer, with added tokens; most have none.
    own = _file(name, "tokenizer_config.json")
    return merged.eval(), tokenizer if own is None else load_tokenizer(name)


def _file(name: str, file: str) -> str | None:
    """Return the path of a file in a folder or a Hub repository; None if it does not exist."""
    found: str | None = cached_file(name, file, _raise_exceptions_for_missing_entries=False)
    return found
