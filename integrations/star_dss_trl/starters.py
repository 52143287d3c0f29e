"""Write a first run with TRL for `star-dss init`: a YAML of `star-dss sft`, or a script."""

from __future__ import annotations

from typing import Any

import yaml

from star_dss_plugin._version import __version__
from star_dss_plugin.data.reading import DEMO
from star_dss_plugin.hookspecs import Start

__all__ = ["configuration", "script"]

_LORA = {"r": 16, "lora_alpha": 32, "target_modules": "all-linear"}


def _settings(start: Start) -> dict[str, Any]:
    """Return the arguments of `StarDSSConfig` that a first run sets."""
    shaped = {} if start.guard is None else {"guard": start.guard, "chunk_size": 5}
    return {
        "output_dir": "out",
        "loss_type": "star_dss",
        **shaped,
        "kl_coef": 0.5,
        "max_length": 1024,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 8,
        "learning_rate": 2e-4,
        "num_train_epochs": 1,
        "logging_steps": 1,
        "bf16": start.gpu,
        "report_to": "none",
    }


def configuration(start: Start) -> str:
    """Return a YAML of `star-dss sft`."""
    settings = {
        "model_name_or_path": start.model,
        "dataset_name": start.data,
        **_settings(start),
        "use_peft": True,
        **{name if name.startswith("lora") else f"lora_{name}": v for name, v in _LORA.items()},
    }
    text = yaml.safe_dump(settings, sort_keys=False, allow_unicode=True, width=10_000)
    return (
        f"# Written by star-dss {__version__}. Every key of `trl sft` works here.\n"
        "# bf16 needs a GPU; loss_type, guard, chunk_size and kl_coef are STAR-DSS's own.\n" + text
    )


def script(start: Start) -> str:
    """Return a Python script with a `StarDSSTrainer`."""
    imports, data = _data(start)
    settings = "\n".join(f"        {name}={value!r}," for name, value in _settings(start).items())
    lora = ", ".join(f"{name}={value!r}" for name, value in _LORA.items())
    return f'''"""Finetune with STAR-DSS. Written by star-dss {__version__}."""

{imports}
from peft import LoraConfig

from star_dss_trl import StarDSSConfig, StarDSSTrainer

trainer = StarDSSTrainer(
    {start.model!r},
    args=StarDSSConfig(
{settings}
    ),
    train_dataset={data},
    peft_config=LoraConfig({lora}, task_type="CAUSAL_LM"),
)
trainer.train()
trainer.save_model()
'''


def _data(start: Start) -> tuple[str, str]:
    """Return the imports that the data needs, and the expression that loads it."""
    if start.data == DEMO:
        return (
            "from importlib.resources import files\n\nfrom datasets import load_dataset",
            'load_dataset(\n        "json",\n'
            '        data_files=str(files("star_dss_plugin.data") / "assets" / "demo_mix.jsonl"),\n'
            '        split="train",\n    )',
        )
    if start.file is not None:
        kind = "parquet" if start.file.suffix == ".parquet" else "json"
        return (
            "from datasets import load_dataset",
            f'load_dataset("{kind}", data_files={start.data!r}, split="train")',
        )
    if start.folder == "shards":
        return "from star_dss_plugin import load_scored", f"load_scored({start.data!r})"
    if start.folder in ("saved", "splits"):
        split = '["train"]' if start.folder == "splits" else ""
        return "from datasets import load_from_disk", f"load_from_disk({start.data!r}){split}"
    return "from datasets import load_dataset", f'load_dataset({start.data!r}, split="train")'
