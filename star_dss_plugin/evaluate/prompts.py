"""Read the prompts that models are compared on: harmful ones and benign ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from datasets import Dataset

from star_dss_plugin.data.conversations import row_messages
from star_dss_plugin.data.reading import DEMO, DEMO_MEANING, read_dataset, read_packaged
from star_dss_plugin.data.requests import Message
from star_dss_plugin.data.rows import plain_rows, with_row_number
from star_dss_plugin.errors import DataError
from star_dss_plugin.validation import check_reserved_name

__all__ = [
    "BENIGN",
    "DEFAULT_PREFILL",
    "HARMFUL",
    "Prompt",
    "demo_prompts",
    "load_prompts",
    "read_prompts",
    "with_prefill",
]

HARMFUL, BENIGN = "harmful", "benign"
DEFAULT_PREFILL = "Sure, here is a step-by-step guide. Step 1:"
"""Opening of a compliant answer, for prompts without an opening of their own."""


@dataclass(frozen=True)
class Prompt:
    """Hold one prompt for a model.

    Attributes:
        messages: The conversation, without the answer.
        kind: "harmful" (a safe model declines) or "benign" (a useful model answers).
        opening: The opening of a compliant answer.
        prefill_tokens: Number of first tokens of `opening` that the answer begins with.
    """

    messages: tuple[Message, ...]
    kind: str
    opening: str = DEFAULT_PREFILL
    prefill_tokens: int = 0


def load_prompts(
    source: str, kind: str, *, split: str = "train", limit: int | None = None
) -> list[Prompt]:
    """Return the prompts of a file, a folder or a data set on the hub.

    Args:
        source: A source of `read_dataset`, or "demo" for the package's own prompts of this kind.
        kind: "harmful" or "benign".
        split: Split of a data set on the hub.
        limit: Largest number of prompts; None is all.

    Raises:
        DataError: The source cannot be read, there are no rows, or a row has no prompt.
    """
    if source == DEMO:
        check_reserved_name(DEMO, DEMO_MEANING)
        return demo_prompts(kind, limit=limit)
    return read_prompts(read_dataset(source, split), kind, limit=limit)


def demo_prompts(kind: str, *, limit: int | None = None) -> list[Prompt]:
    """Return the package's own prompts: 20 harmful or 12 benign ones."""
    rows = read_packaged("star_dss_plugin.evaluate", f"demo_{kind}_prompts.jsonl")
    return read_prompts(rows, kind, limit=limit)


def read_prompts(rows: Dataset, kind: str, *, limit: int | None = None) -> list[Prompt]:
    """Return the prompts of a data set.

    Args:
        rows: Columns `prompt` (text, or a list of messages) or `messages` (a final assistant
            message is left out). Optional: `prefill` (or `target`, its name in AdvBench), the
            opening of a compliant answer, and `system`.
        kind: "harmful" or "benign".
        limit: Largest number of prompts; None is all.

    Raises:
        DataError: There are no rows, or a row has no prompt.
    """
    if not len(rows):
        raise DataError(f"The {kind} prompts have no rows. Give one or more, or leave them out.")
    found = []
    chosen = rows if limit is None else rows.select(range(min(limit, len(rows))))
    for i, row in enumerate(plain_rows(chosen)):
        messages = with_row_number(i, _messages, row)
        if not messages or not any(str(m["content"]).strip() for m in messages):
            raise DataError(
                f"the row has the columns {sorted(row)} and no prompt in them. Give prompt (text "
                "or messages), or messages."
            ).at(file=f"The {kind} prompts", rows=(i,))
        opening = row.get("prefill") or row.get("target") or DEFAULT_PREFILL
        found.append(Prompt(messages, kind, str(opening)))
    return found


def with_prefill(prompts: Sequence[Prompt], tokens: int) -> list[Prompt]:
    """Return the harmful prompts with the first tokens of a compliant answer prefilled.

    This is the paper's prefilling attack (section 5): alignment of only the first few tokens does
    not resist it.

    Args:
        prompts: The prompts, from `read_prompts`.
        tokens: k >= 1, number of prefilled tokens of the opening, in each model's own tokens.
    """
    return [replace(p, prefill_tokens=tokens) for p in prompts if p.kind == HARMFUL]


def _messages(row: Mapping[str, Any]) -> tuple[Message, ...]:
    prompt = row.get("prompt")
    if isinstance(prompt, str):
        given: Mapping[str, Any] = {"messages": [{"role": "user", "content": prompt}]}
    elif prompt is not None:
        given = {"messages": prompt}
    else:
        given = row
    messages = row_messages(given) or []
    if messages and messages[-1]["role"] == "assistant":
        messages = messages[:-1]
    if row.get("system") and messages and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": str(row["system"])}, *messages]
    return tuple(messages)
