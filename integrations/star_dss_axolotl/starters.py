"""Write a first YAML for Axolotl for `star-dss init`."""

from __future__ import annotations

from typing import Any

import yaml

from star_dss_axolotl.args import PLUGIN
from star_dss_plugin._version import __version__
from star_dss_plugin.errors import ConfigError
from star_dss_plugin.hookspecs import Start

__all__ = ["configuration"]


def configuration(start: Start) -> str:
    """Return a YAML for Axolotl with the plugin and its block.

    Raises:
        ConfigError: Axolotl cannot read rows of this form.
    """
    block: dict[str, Any] = {} if start.guard is None else {"guard": start.guard, "chunk_size": 5}
    settings = {
        "base_model": start.model,
        "plugins": [PLUGIN],
        "star_dss": {**block, "loss_type": "star_dss", "kl_coef": 0.5},
        "datasets": [_dataset(start)],
        "dataset_prepared_path": "prepared",
        "output_dir": "out",
        "adapter": "lora",
        "lora_r": 16,
        "lora_alpha": 32,
        "lora_target_linear": True,
        "sequence_len": 1024,
        "micro_batch_size": 2,
        "gradient_accumulation_steps": 8,
        "num_epochs": 1,
        "learning_rate": 0.0002,
        "optimizer": "adamw_torch",
        "lr_scheduler": "cosine",
        "bf16": start.gpu,
        "logging_steps": 1,
    }
    text = yaml.safe_dump(settings, sort_keys=False, allow_unicode=True, width=10_000)
    return f"# Written by star-dss {__version__}. bf16 needs a GPU.\n{text}"


def _dataset(start: Start) -> dict[str, Any]:
    found: dict[str, Any] = {"path": str(start.file or start.data)}
    if start.file is not None:
        found["ds_type"] = "parquet" if start.file.suffix == ".parquet" else "json"
    if start.form == "scored":
        return found | {"type": None}
    if start.form == "text":
        return found | {"type": "completion"}
    if start.form == "prompt-completion":
        if start.keys:
            raise ConfigError(
                "The columns prompt and completion hold messages, which Axolotl reads from one "
                "column only. Put them together in a column messages, or write the run for TRL: "
                "--host trl"
            )
        plain = {"format": "{instruction}", "no_input_format": "{instruction}"}
        fields = {"field_instruction": "prompt", "field_output": "completion"}
        return found | {"type": {"system_prompt": "", **fields, **plain}}
    found["type"] = "chat_template"
    if start.form == "conversations":
        found["field_messages"] = "conversations"
    if "from" in start.keys:
        found["message_property_mappings"] = {"role": "from", "content": "value"}
    return found
