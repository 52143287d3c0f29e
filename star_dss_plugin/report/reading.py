"""A scored data set, read back as responses: text, scores, and what the guard saw before them."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from datasets import Dataset
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from star_dss_plugin.data.chat import ChatTokenizer
from star_dss_plugin.data.columns import SCORES_COLUMN
from star_dss_plugin.data.provenance import provenance_of
from star_dss_plugin.data.requests import Message
from star_dss_plugin.data.responses import Response, find_responses, tokens_of
from star_dss_plugin.data.rows import in_row, known_rows
from star_dss_plugin.errors import ConfigError, DataError
from star_dss_plugin.models import load_tokenizer
from star_dss_plugin.segmenters import tokens
from star_dss_plugin.training.prepare import check_scores

__all__ = ["ScoredData", "ScoredResponse", "read_scored", "tokenizer_of"]

logger = logging.getLogger(__name__)

_MOST_SOURCES, _LONGEST_SOURCE = 500, 64
_DIGITS = 6  # a float32 score has no more; 0.1 reads as 0.1 again


@dataclass(frozen=True)
class ScoredResponse:
    """One response and its trajectory.

    Attributes:
        row: Its row in the data set, from 0.
        turn: Which response of the row it is, from 0.
        source: The value of the source column, if there is one.
        context: The messages that the guard was given before it.
        raw_context: True if the context is decoded tokens, because no message matched.
        pieces: Its text, cut where the score changes; joined they are the whole text.
        token_ends: For each piece the number of the response's tokens up to its end; increasing.
        scores: For each piece its STAR score in [0, 1].
    """

    row: int
    turn: int
    source: str | None
    context: tuple[Message, ...]
    raw_context: bool
    pieces: tuple[str, ...]
    token_ends: tuple[int, ...]
    scores: tuple[float, ...]

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens of each piece."""
        return tuple(b - a for a, b in pairwise((0, *self.token_ends)))

    @property
    def tokens(self) -> int:
        """Number of its tokens, the end of turn included."""
        return self.token_ends[-1]

    @property
    def lowest(self) -> float:
        """The lowest score."""
        return min(self.scores)

    @property
    def mean(self) -> float:
        """The mean score of its tokens."""
        return sum(n * s for n, s in zip(self.lengths, self.scores, strict=True)) / self.tokens

    @property
    def largest_fall(self) -> float:
        """How far the score falls at most from an earlier token to a later one: how mixed it is."""
        fall, highest = 0.0, 0.0
        for score in self.scores:
            highest = max(highest, score)
            fall = max(fall, highest - score)
        return fall

    def below(self, threshold: float) -> int:
        """How many of its tokens have a score below the threshold."""
        pairs = zip(self.lengths, self.scores, strict=True)
        return sum(n for n, score in pairs if score < threshold)

    def crossing(self, threshold: float) -> int | None:
        """The first token (from 1) with a score below the threshold; None if there is none."""
        starts = (0, *self.token_ends)
        for start, score in zip(starts, self.scores, strict=False):
            if score < threshold:
                return start + 1
        return None


@dataclass(frozen=True)
class ScoredData:
    """All responses of a data set, and who scored them.

    Attributes:
        responses: In the order of the data.
        provenance: How the scores were made, or None if the data does not say.
        tokenizer: Name of the tokenizer that read them.
    """

    responses: tuple[ScoredResponse, ...]
    provenance: Mapping[str, Any] | None
    tokenizer: str

    @property
    def guard(self) -> str:
        """The guard's name."""
        return str(self.provenance["guard"]) if self.provenance else "unknown"

    @property
    def demonstration(self) -> bool:
        """Whether the scores come from a guard that protects nobody."""
        return bool(self.provenance and self.provenance["demonstration_guard"])

    @property
    def interpolated(self) -> bool:
        """Whether some scores lie between the guard's own (`trajectory="adaptive"`)."""
        return _interpolates((self.provenance or {}).get("guard_identity", {}))


def _interpolates(identity: Any) -> bool:
    """Whether a guard, or one of those it is made of, leaves prefixes out."""
    if not isinstance(identity, Mapping):  # the data may note anything
        return False
    guards = identity.get("guards")
    members = guards if isinstance(guards, list) else []
    return "trajectory" in identity or any(map(_interpolates, members))


def tokenizer_of(dataset: Dataset, name: str | None) -> PreTrainedTokenizerBase:
    """The tokenizer that made a scored data set's tokens.

    Args:
        dataset: Scored; what it says of its tokenizer is used if no name is given.
        name: Id or folder.

    Raises:
        DataError: The data set is not scored.
        ConfigError: It does not say which, or the tokenizer cannot be loaded.
    """
    _check_scored(dataset)
    noted = str((provenance_of(dataset) or {}).get("tokenizer", ""))
    if not (name or noted):
        raise ConfigError(
            "The data set does not say which tokenizer made its tokens, so they cannot be shown as "
            "text: it was not written by `star-dss score`, or by an older version. Give the id or "
            "folder of the model it was scored for with --tokenizer."
        )
    try:
        return load_tokenizer(name or noted, only_local=name is None)
    except ConfigError as error:
        if name is not None:
            raise
        raise ConfigError(
            f"{error} (The data set notes this name. If the model is somewhere else now, say where "
            "with --tokenizer.)"
        ) from error


def read_scored(
    dataset: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    *,
    source: str | None = None,
    progress: bool = False,
) -> ScoredData:
    """The responses of a scored data set.

    Args:
        dataset: With `input_ids`, `labels` and `star_scores`.
        tokenizer: The one that made `input_ids`.
        source: The column that says where a row comes from; None: "source", if there is one with
            names in it.
        progress: Whether to show a progress bar.

    Raises:
        DataError: The data set is not scored, a row's scores do not fit its tokens, or the tokens
            are not this tokenizer's.
        ConfigError: There is no such source column.
    """
    _check_scored(dataset)
    columns = dataset.column_names
    if source is not None and source not in columns:
        raise ConfigError(
            f"There is no column {source!r} to tell sources by. The columns are: "
            f"{', '.join(columns)}."
        )
    plain = dataset.with_format(None)
    if source is None and "source" in columns and _names_sources(plain["source"]):
        source = "source"
    origins = [None] * len(dataset) if source is None else plain[source]
    rows = tqdm(known_rows(dataset), "Reading", len(dataset), unit="row", disable=not progress)
    chat = ChatTokenizer(tokenizer)
    found: list[ScoredResponse] = []
    for i, (row, scores, origin) in enumerate(
        zip(rows, plain[SCORES_COLUMN], origins, strict=True)
    ):
        ids, _ = in_row(i, tokens_of, row)
        check_scores(f"Row {i}", scores, len(ids))
        if max(ids, default=0) >= len(tokenizer) or min(ids, default=0) < 0:
            raise _other_tokenizer(tokenizer)
        responses = in_row(i, find_responses, row, chat, tokens, 1)
        name = None if origin is None else str(origin)
        found += [_scored(i, k, name, r, scores) for k, r in enumerate(responses)]
    if not found:
        raise DataError(
            f"None of the {len(dataset)} rows has a response: every label is -100. Check how the "
            "data was tokenized."
        )
    provenance = provenance_of(dataset)
    spoken = "messages" in columns or {"prompt", "completion"} <= set(columns)
    raw = sum(response.raw_context for response in found)
    if spoken and provenance is not None and raw > provenance["raw_contexts"]:
        raise _other_tokenizer(tokenizer)
    return ScoredData(tuple(found), provenance, str(tokenizer.name_or_path))


def _names_sources(values: Sequence[Any]) -> bool:
    """Whether a column called "source" holds names; in translation data it holds texts."""
    names = {str(value) for value in values if value is not None}
    named = len(names) <= _MOST_SOURCES and all(
        len(name) <= _LONGEST_SOURCE and name.isprintable() for name in names
    )
    if not named:
        logger.warning(
            "The column 'source' does not look like the names of sources and is left out. To use "
            "it all the same, or another one, name it with --source."
        )
    return named


def _check_scored(dataset: Dataset) -> None:
    columns = dataset.column_names
    missing = [c for c in ("input_ids", "labels", SCORES_COLUMN) if c not in columns]
    if missing:
        raise DataError(
            f"The data set has no {' and no '.join(map(repr, missing))} (it has "
            f"{', '.join(columns)}), so there are no scores to show. Score it first: star-dss "
            "score DATA --guard … --tokenizer … -o SCORED"
        )


def _other_tokenizer(tokenizer: PreTrainedTokenizerBase) -> DataError:
    return DataError(
        f"The tokens are not those of the tokenizer {tokenizer.name_or_path!r}: their text is not "
        "in the rows' messages. Give the tokenizer of the model the data was scored for with "
        "--tokenizer."
    )


def _scored(
    row: int, turn: int, source: str | None, response: Response, scores: Sequence[float]
) -> ScoredResponse:
    """Joins the tokens of a response where neighbours have one score."""
    text = response.request.text
    pieces: list[str] = []
    ends: list[int] = []
    values: list[float] = []
    begin = 0
    for token_end, char_end in zip(response.chunk_ends, response.request.ends, strict=True):
        piece, begin = text[begin:char_end], char_end
        score = round(float(scores[token_end - 1]), _DIGITS)
        if values and values[-1] == score:
            pieces[-1] += piece
            ends[-1] = token_end - response.start
        else:
            pieces.append(piece)
            ends.append(token_end - response.start)
            values.append(score)
    return ScoredResponse(
        row,
        turn,
        source,
        response.request.context,
        response.raw_context,
        tuple(pieces),
        tuple(ends),
        tuple(values),
    )
