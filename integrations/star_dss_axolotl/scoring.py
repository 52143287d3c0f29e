"""Score Axolotl's tokenized data sets."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from datasets import Dataset, IterableDataset
from transformers import PreTrainedTokenizerBase

from star_dss_axolotl.formats import prompt_reader
from star_dss_plugin.data.columns import SCORES_COLUMN, without_asked_column
from star_dss_plugin.data.provenance import provenance_of
from star_dss_plugin.data.templates.chat import ChatTokenizer
from star_dss_plugin.errors import DataError
from star_dss_plugin.options import StarDSSOptions
from star_dss_plugin.scoring.scorer import score_dataset
from star_dss_plugin.training.rows.prepare import needs_guard

__all__ = ["chat_of", "chat_templates", "score"]


def score(
    dataset: Any, cfg: Any, tokenizer: PreTrainedTokenizerBase, options: StarDSSOptions, name: str
) -> Any:
    """Add `star_scores` to a data set of Axolotl's, unless it needs none now.

    Raw rows that the collator tokenizes, and streams, are returned unchanged: the trainer scores
    them later.

    Args:
        dataset: The result of Axolotl's loader: a data set with `input_ids` and `labels`, raw rows,
            a stream, or None.
        cfg: Axolotl's configuration.
        tokenizer: The tokenizer that made the tokens.
        options: The run's options.
        name: "train" or "eval", for messages.

    Raises:
        StarDSSError: The data cannot be scored.
    """
    if dataset is None or isinstance(dataset, IterableDataset) or not needs_guard(options, name):
        return dataset
    if not isinstance(dataset, Dataset):
        raise DataError(
            f"Axolotl loaded the {name} data as a {type(dataset).__name__}, whose rows cannot be "
            "scored. Remove the setting or the plugin that loads it (such as pretraining_dataset)."
        )
    raw = cfg.get("processor_type") and "input_ids" not in dataset.column_names
    if raw:
        return dataset
    if SCORES_COLUMN in dataset.column_names:
        return without_asked_column(dataset)
    chat = chat_of(cfg, tokenizer)
    scored = score_dataset(dataset, chat, options, num_proc=cfg.get("dataset_num_proc") or 1)
    _announce(scored, name)
    # Axolotl's collators make tensors of every column.
    return without_asked_column(scored)


def chat_of(cfg: Any, tokenizer: PreTrainedTokenizerBase) -> ChatTokenizer:
    """Return the tokenizer with every chat template and format that may have made the rows.

    Args:
        cfg: Axolotl's configuration.
        tokenizer: The run's tokenizer.
    """
    templates = chat_templates(cfg, tokenizer)
    chats = [ChatTokenizer(tokenizer, source, kwargs) for source, kwargs in templates]
    first = chats[0] if chats else ChatTokenizer(tokenizer)
    reader = prompt_reader(cfg, tokenizer)
    return replace(first, others=tuple(chats[1:]), read_prompt=reader)


def chat_templates(
    cfg: Any, tokenizer: PreTrainedTokenizerBase
) -> list[tuple[str, dict[str, Any]]]:
    """Return the distinct chat templates that may have made the rows, with their arguments.

    Args:
        cfg: Axolotl's configuration.
        tokenizer: The run's tokenizer.
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
        found.append((tokenizer.chat_template, {}))  # for rows that came tokenized
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
