"""Axolotl's tokenized data sets, scored: with their messages where those can be recovered."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from datasets import Dataset, List, Value
from transformers import PreTrainedTokenizerBase

from star_dss_axolotl.messages import TemplateInverse
from star_dss_plugin.data.columns import SCORES_COLUMN
from star_dss_plugin.data.decoding import decode
from star_dss_plugin.data.provenance import provenance_of
from star_dss_plugin.errors import DataError
from star_dss_plugin.logprobs import IGNORE_INDEX
from star_dss_plugin.options import StarDSSOptions
from star_dss_plugin.scoring.scorer import score_dataset
from star_dss_plugin.training.prepare import asks_guard

__all__ = ["chat_templates", "score", "with_messages"]

_MESSAGES = "messages"
_FEATURE = List({"role": Value("string"), "content": Value("string")})


def score(
    dataset: Any, cfg: Any, tokenizer: PreTrainedTokenizerBase, options: StarDSSOptions, name: str
) -> Any:
    """Return a data set of Axolotl's with `star_scores`; as it is where nothing is to be scored.

    Args:
        dataset: As Axolotl's loader returns it (`input_ids` and `labels`), or None.
        cfg: Axolotl's configuration.
        tokenizer: The one that made the tokens.
        options: The run's options.
        name: "train" or "eval": for messages.

    Raises:
        StarDSSError: The data cannot be scored.
    """
    if dataset is None or not asks_guard(options, name):
        return dataset
    if not isinstance(dataset, Dataset):
        raise DataError(
            f"Axolotl loaded the {name} data as a {type(dataset).__name__}, and STAR-DSS scores "
            "data before training. Remove streaming and pretraining_dataset."
        )
    if SCORES_COLUMN in dataset.column_names:
        return dataset
    templates = chat_templates(cfg, tokenizer)
    scored = score_dataset(
        with_messages(dataset, tokenizer, templates),
        tokenizer,
        options,
        chat_template=templates[0][0] if len(templates) == 1 else None,
    )
    _announce(scored, name)
    # Axolotl's collators make tensors of every column.
    return scored.remove_columns(_MESSAGES)


def with_messages(
    dataset: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    templates: list[tuple[str, dict[str, Any]]],
) -> Dataset:
    """Add the column `messages`: the conversation of each row, or null if no template made it."""
    if _MESSAGES in dataset.column_names:
        return dataset
    inverses = [TemplateInverse(tokenizer, source, kwargs) for source, kwargs in templates]
    column = []
    for row in dataset.with_format(None).select_columns(["input_ids", "labels"]):
        found = None
        # A row that is trained as a whole is a text, whatever it looks like.
        if IGNORE_INDEX in row["labels"]:
            text = decode(tokenizer, row["input_ids"])
            found = next((m for i in inverses if (m := i.messages(text)) is not None), None)
        column.append(found)
    return dataset.add_column(_MESSAGES, column, feature=_FEATURE)


def chat_templates(
    cfg: Any, tokenizer: PreTrainedTokenizerBase
) -> list[tuple[str, dict[str, Any]]]:
    """Return the chat templates that may have made the rows, with their arguments, each once.

    Args:
        cfg: Axolotl's configuration.
        tokenizer: The run's.
    """
    from axolotl.utils.chat_templates import get_chat_template_from_config

    found: list[tuple[str, dict[str, Any]]] = []
    for dataset in [*(cfg.datasets or ()), *(cfg.test_datasets or ())]:
        if str(dataset.get("type") or "").startswith("chat_template"):
            source = get_chat_template_from_config(cfg=cfg, ds_cfg=dataset, tokenizer=tokenizer)
            given: Mapping[str, Any] = {
                **(cfg.chat_template_kwargs or {}),
                **(dataset.get("chat_template_kwargs") or {}),
            }
            found.append((source, dict(given)))
    if isinstance(tokenizer.chat_template, str):
        found.append((tokenizer.chat_template, {}))  # of rows that came tokenized
    return [entry for i, entry in enumerate(found) if entry not in found[:i]]


def _announce(scored: Dataset, name: str) -> None:
    """Log how many responses the guard read with their messages."""
    from axolotl.utils.logging import get_logger

    provenance = provenance_of(scored)
    assert provenance is not None
    total, raw = provenance["responses"], provenance["raw_contexts"]
    get_logger("axolotl.star_dss").info(
        "STAR-DSS scored the %s data: %d responses in %d prefixes; for %d of them the guard read "
        "the messages, for %d the raw prompt.",
        name,
        total,
        provenance["prefixes"],
        total - raw,
        raw,
    )
