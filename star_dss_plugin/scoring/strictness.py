"""Lower scores around a response's first unsafe chunk: `unsafe_lookahead` and `monotone`.

A guard notices harm only when it is said, which is after the response turned towards it, and may
score the chunks after it as harmless. Both rules only lower scores, and apply before the weight
map, so they work with every `loss_type`. Both are off by default; the paper has neither.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from datasets import Dataset, List, Value

from star_dss_plugin.data.columns import SCORES_COLUMN, with_column
from star_dss_plugin.data.provenance import provenance_of, read_note, read_notes, write_note
from star_dss_plugin.data.responses import find_responses
from star_dss_plugin.data.templates.chat import ChatTokenizer
from star_dss_plugin.errors import DataError
from star_dss_plugin.options import StarDSSOptions
from star_dss_plugin.plugins import load_plugins

__all__ = ["stricter_dataset", "stricter_scores"]

_NOTE = "stricter"


def stricter_scores(
    scores: Sequence[float], *, threshold: float, unsafe_lookahead: int, monotone: bool
) -> list[float]:
    """Return a response's scores, lowered around its first unsafe chunk.

    Args:
        scores: One score per chunk, in [0, 1].
        threshold: τ: a chunk with a score below it is unsafe.
        unsafe_lookahead: n >= 0: the n chunks before the first unsafe one get at most its score.
        monotone: Whether scores never rise from the first unsafe chunk on.

    Returns:
        One score per chunk, none higher than before; unchanged if no chunk is unsafe.
    """
    found = list(scores)
    first = next((k for k, score in enumerate(found) if score < threshold), None)
    if first is None:
        return found
    for k in range(max(0, first - unsafe_lookahead), first):
        found[k] = min(found[k], found[first])
    if monotone:
        found[first:] = np.minimum.accumulate(found[first:]).tolist()
    return found


def stricter_dataset(dataset: Dataset, chat: ChatTokenizer, options: StarDSSOptions) -> Dataset:
    """Apply `unsafe_lookahead` and `monotone` to the `star_scores` of a data set.

    A note in the data set's description prevents applying the rules twice.

    Args:
        dataset: Rows with `input_ids`, `labels` and `star_scores`.
        chat: The tokenizer and the template that made the tokens.
        options: The run's options.

    Raises:
        DataError: The rules were applied before with other options, or the data set's provenance
            does not determine its chunks.
    """
    rules: dict[str, Any] = {
        "threshold": options.threshold,
        "unsafe_lookahead": options.unsafe_lookahead,
        "monotone": options.monotone,
    }
    known = read_note(dataset, _NOTE)
    if known is not None and known != rules:
        raise DataError(
            f"The scores were lowered before with {known}, and the options now say {rules}. Use "
            "the same options, or the scores as they were."
        )
    joined = len(read_notes(dataset, "scores")) > 1
    if known is not None and joined:
        raise DataError(
            "The data set was joined from several after the scores of some were lowered. Join them "
            "first, and score them together."
        )
    if known is not None or not (options.unsafe_lookahead or options.monotone):
        return dataset
    provenance = provenance_of(dataset)
    if provenance is None or joined or "seq_lengths" in dataset.features:
        raise DataError(
            "unsafe_lookahead and monotone need to know how the responses were cut into chunks, "
            "and this star_scores column does not say: it was made elsewhere, joined from data "
            "sets that were scored separately, or packed. Score all of the data with star-dss "
            "score, or remove the column and set a guard."
        )
    segmenter = load_plugins().segmenter(provenance["segmenter"])
    column = []
    for i, row in enumerate(dataset.with_format(None)):
        scores = np.array(row[SCORES_COLUMN], dtype=np.float32)
        for response in find_responses(row, chat, segmenter, provenance["chunk_size"]):
            ends = response.chunk_ends
            chunks = [slice(a, b) for a, b in pairwise([response.start, *ends])]
            if any(np.ptp(scores[chunk]) for chunk in chunks):
                raise DataError(
                    "a chunk has several scores, so the responses are not cut as they were when "
                    "they were scored. Score the data again, as it is now."
                ).at(rows=(i,))
            given = [float(scores[chunk][0]) for chunk in chunks]
            for chunk, score in zip(chunks, stricter_scores(given, **rules), strict=True):
                scores[chunk] = score
        column.append(scores)
    dataset = with_column(dataset, SCORES_COLUMN, column, List(Value("float32")))
    write_note(dataset, _NOTE, rules)
    return dataset
