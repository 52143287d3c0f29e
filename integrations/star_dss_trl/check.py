"""Check a YAML of `star-dss sft` for `star-dss check`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from datasets import IterableDataset, List, Value
from trl import is_conversational

from star_dss_plugin.data.columns import with_column
from star_dss_plugin.data.host_labels import MASKS
from star_dss_plugin.data.templates.chat import ChatTokenizer
from star_dss_plugin.errors import ConfigError, StarDSSError
from star_dss_plugin.guards.spec import missing_guard
from star_dss_plugin.hookspecs import Findings
from star_dss_plugin.models.loading import load_tokenizer
from star_dss_plugin.training.preflight import (
    check_options,
    describe_stream,
    estimate,
    estimate_of_media,
    lacks_guard,
)
from star_dss_plugin.training.rows.stream_checks import check_stream
from star_dss_trl.media import has_images, load_processor, make_media_rows
from star_dss_trl.sft import load_data, parse, used_splits
from star_dss_trl.templates import training_template
from star_dss_trl.trainer import check_settings

__all__ = ["check"]


def check(path: Path, raw: dict[str, Any], *, data: bool) -> Findings:
    """Check a configuration as `star-dss sft` parses it.

    Args:
        path: The file.
        raw: Its contents (not used: the parser reads the file).
        data: Whether to load the data.

    Returns:
        Notes on the run, and problems that would stop it or make it plain finetuning.
    """
    try:
        script_args, training_args, model_args, mixture_args = parse(["--config", str(path)])
    except StarDSSError as error:
        return Findings(problems=[str(error)])
    if not training_args.star_dss_active:
        what = f"loss_type is {training_args.loss_type!r}, TRL's own, with which nothing is shaped."
        return Findings(problems=[f"{what} Set loss_type: star_dss."])
    found = check_options(training_args)
    try:
        check_settings(training_args)
        if not data:
            return found
        splits = load_data(script_args, mixture_args)
        train, _ = used_splits(splits, script_args, training_args)
        if isinstance(train, IterableDataset):
            check_stream("train", training_args, raw=has_images(train.column_names or ()))
            if training_args.max_steps <= 0:
                found.problems.append("The data is a stream, which has no length. Set max_steps.")
            found.notes.append(f"train data: {describe_stream(train, training_args)}")
            return found
        if lacks_guard(train, training_args):
            raise missing_guard()
        only = bool(getattr(training_args, "assistant_only_loss", False))
        if has_images(train.column_names):
            processor = load_processor(model_args.model_name_or_path)
            template = training_template(processor) if only else None
            reader = make_media_rows(processor, template, only)
            said = estimate_of_media(train, "train", reader, training_args)
            found.notes.append(f"train data: {said}")
            return found
        if only and len(train) and not is_conversational(train[0]):
            raise ConfigError(
                "assistant_only_loss is set, and TRL takes it for conversations with 'role' and "
                f"'content' only. The columns here are {', '.join(train.column_names)}. Leave it "
                "out: of any data, only what the assistant says is trained."
            )
        tokenizer = load_tokenizer(model_args.model_name_or_path)
        chat = ChatTokenizer(tokenizer, training_template(tokenizer) if only else None)
        text = training_args.dataset_text_field
        if text in train.column_names and text != "text":
            train = train.rename_column(text, "text")
        if "input_ids" in train.column_names and not {"labels", *MASKS} & set(train.column_names):
            # TRL trains all tokens of such rows.
            train = with_column(train, "labels", train["input_ids"], List(Value("int64")))
        length = training_args.max_length
        mode = getattr(training_args, "truncation_mode", "keep_start")
        said = estimate(
            train,
            chat,
            training_args,
            max_length=length,
            assistant_only_loss=only,
            keep_end=mode == "keep_end",
        )
        found.notes.append(f"train data: {said}")
    except (StarDSSError, OSError) as error:
        found.problems.append(str(error))
    return found
