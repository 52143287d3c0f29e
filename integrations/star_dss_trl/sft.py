"""Run `star-dss sft`: TRL's `trl sft`, with its flags and YAML, and the options of STAR-DSS.

Run it as `star-dss sft --config run.yaml`, or on several devices as
`accelerate launch -m star_dss_trl.sft --config run.yaml`.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset, IterableDataset
from trl import (
    DatasetMixtureConfig,
    ModelConfig,
    ScriptArguments,
    TrlParser,
    get_dataset,
    get_peft_config,
    get_quantization_config,
)

from star_dss_plugin.data.files.folders import check_folder
from star_dss_plugin.data.media import check_features
from star_dss_plugin.data.reading import read_splits, read_streams
from star_dss_plugin.errors import ConfigError, StarDSSError
from star_dss_plugin.validation import nearest
from star_dss_trl.config import StarDSSConfig
from star_dss_trl.trainer import StarDSSTrainer

__all__ = ["load_data", "main", "parse", "used_splits"]


def main(argv: Sequence[str] | None = None) -> None:
    """Train as the command line says.

    Args:
        argv: The arguments; None: those of the process.

    Raises:
        StarDSSError: The configuration or the data cannot be used.
    """
    script_args, training_args, model_args, mixture_args = parse(argv)
    training_args.model_init_kwargs = {
        "revision": model_args.model_revision,
        "trust_remote_code": getattr(training_args, "trust_remote_code", False),
        "attn_implementation": model_args.attn_implementation,
        "dtype": model_args.dtype,
        **(training_args.model_init_kwargs or {}),
    }
    dataset = load_data(script_args, mixture_args)
    train, test = used_splits(dataset, script_args, training_args)
    trainer = StarDSSTrainer(
        model_args.model_name_or_path,
        args=training_args,
        train_dataset=train,
        eval_dataset=test,
        quantization_config=get_quantization_config(model_args),
        peft_config=get_peft_config(model_args),
    )
    trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
    trainer.save_model(training_args.output_dir)
    trainer.accelerator.print(f"Model saved to {training_args.output_dir}.")
    if training_args.push_to_hub:
        trainer.push_to_hub(dataset_name=script_args.dataset_name)


def parse(argv: Sequence[str] | None = None) -> tuple[Any, StarDSSConfig, Any, Any]:
    """Parse the arguments of the script, of training, of the model and of the data mixture.

    Raises:
        ConfigError: The command line or the YAML is not valid.
    """
    parser = TrlParser(
        (ScriptArguments, StarDSSConfig, ModelConfig, DatasetMixtureConfig), prog="star-dss sft"
    )
    try:
        *parsed, unknown = parser.parse_args_and_config(argv, return_remaining_strings=True)
    except StarDSSError:
        raise
    except Exception as error:  # YAML, argparse and the dataclasses raise various errors
        # transformers' message on bfloat16, TRL's default also without a GPU, names no option.
        how = " (use_cpu: true, or --use_cpu true)" if "assign use_cpu" in str(error) else ""
        raise ConfigError(
            f"The command line or the configuration is not valid: {str(error) or type(error)}{how}"
        ) from error
    # `trl sft` ignores unknown arguments; here a misspelt `chunk_sise` is an error.
    if unknown:
        raise _unknown_options(unknown, [action.dest for action in parser._actions])
    script_args, training_args, model_args, mixture_args = parsed
    return script_args, training_args, model_args, mixture_args


def _unknown_options(given: Sequence[str], known: Sequence[str]) -> ConfigError:
    """Return the error for unknown arguments, with the nearest option of each."""
    names = [text[2:].split("=")[0] for text in given if text.startswith("--")] or given
    near = {name: nearest(name, known, limit=1) for name in names}
    said = [f"{n!r} (did you mean {m[0]!r}?)" if m else repr(n) for n, m in near.items()]
    return ConfigError(
        f"Unknown options: {', '.join(said)}. Correct or remove them; `star-dss sft --help` lists "
        "all that there are."
    )


def load_data(script_args: Any, mixture_args: Any) -> Mapping[str, Dataset | IterableDataset]:
    """Return the data as `trl sft` loads it; `dataset_name` may also be a file or a scored folder.

    Returns:
        The data by split; streams if `dataset_streaming` (of a mixture, `streaming`) is set.

    Raises:
        StarDSSError: No data is named, it cannot be read, or a column holds media.
    """
    if mixture_args.datasets:
        for one in mixture_args.datasets:
            check_folder(Path(one.path))
        mixed: Mapping[str, Dataset | IterableDataset] = get_dataset(mixture_args)
        for dataset in mixed.values():
            check_features(dataset.features or {}, "datasets")
        return mixed
    name = script_args.dataset_name
    if not name:
        raise ConfigError(
            "No data was given. Set dataset_name (an id, a .jsonl or .parquet file, or a folder "
            "written by `star-dss score`) or datasets."
        )
    read = read_streams if script_args.dataset_streaming else read_splits
    return read(name, script_args.dataset_train_split, config=script_args.dataset_config)


def used_splits(
    dataset: Mapping[str, Dataset | IterableDataset], script_args: Any, training_args: StarDSSConfig
) -> tuple[Dataset | IterableDataset, Dataset | IterableDataset | None]:
    """Return the training split, and the evaluation split if there is one.

    Raises:
        ConfigError: The data has no such split.
    """
    names = [script_args.dataset_train_split]
    if training_args.eval_strategy != "no":
        names.append(script_args.dataset_test_split)
    for name in names:
        if name not in dataset:
            raise ConfigError(
                f"The data has no split {name!r} (it has {', '.join(dataset)}). Name its splits "
                "with dataset_train_split and dataset_test_split, or set eval_strategy to 'no'."
            )
    return dataset[names[0]], dataset[names[1]] if len(names) > 1 else None


if __name__ == "__main__":
    try:
        main()
    except StarDSSError as error:
        sys.exit(f"Error: {error}")
