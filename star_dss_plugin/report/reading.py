"""Read a scored data set as responses: text, scores, and the context that the guard saw."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from datasets import Dataset
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from star_dss_plugin.data.columns import ASKED_COLUMN, SCORES_COLUMN
from star_dss_plugin.data.provenance import provenance_of
from star_dss_plugin.data.requests import Message
from star_dss_plugin.data.responses import Response, find_responses, ids_and_labels
from star_dss_plugin.data.rows import content_rows, with_row_number
from star_dss_plugin.data.templates.chat import ChatTokenizer
from star_dss_plugin.errors import ConfigError, DataError
from star_dss_plugin.models.loading import load_tokenizer
from star_dss_plugin.segmenters import tokens
from star_dss_plugin.training.rows.prepare import check_scores

__all__ = ["ScoredData", "ScoredResponse", "read_scored", "tokenizer_of"]

logger = logging.getLogger(__name__)

_MOST_SOURCES, _LONGEST_SOURCE = 500, 64
_DIGITS = 6  # precision of float32 scores; 0.1 is shown as 0.1


@dataclass(frozen=True)
class ScoredResponse:
    """Hold one response and its trajectory.

    Attributes:
        row: Row in the data set, from 0.
        turn: Number of the response in its row, from 0.
        source: The value of the source column; None without one.
        context: The messages before the response, as the guard received them.
        raw_context: True if the context is decoded tokens, because no message matched.
        pieces: The response's text, split where the score changes; joined, it is complete.
        token_ends: For each piece the number of response tokens up to its end; increasing.
        scores: For each piece the STAR score in [0, 1].
        asked: For each piece True if the guard gave the score, False if a probe did
            (`trajectory="probed"`); None if no probe was used, or the data does not record it.
    """

    row: int
    turn: int
    source: str | None
    context: tuple[Message, ...]
    raw_context: bool
    pieces: tuple[str, ...]
    token_ends: tuple[int, ...]
    scores: tuple[float, ...]
    asked: tuple[bool, ...] | None = None

    @property
    def lengths(self) -> tuple[int, ...]:
        """Return the number of tokens in each piece."""
        return tuple(b - a for a, b in pairwise((0, *self.token_ends)))

    @property
    def tokens(self) -> int:
        """Return the number of tokens in the response, the end of turn included."""
        return self.token_ends[-1]

    @property
    def lowest(self) -> float:
        """Return the lowest score."""
        return min(self.scores)

    @property
    def mean(self) -> float:
        """Return the mean score of the response's tokens."""
        return sum(n * s for n, s in zip(self.lengths, self.scores, strict=True)) / self.tokens

    @property
    def largest_fall(self) -> float:
        """Return the largest fall of the score from an earlier token to a later one."""
        fall, highest = 0.0, 0.0
        for score in self.scores:
            highest = max(highest, score)
            fall = max(fall, highest - score)
        return fall

    def below(self, threshold: float) -> int:
        """Return the number of tokens with a score below the threshold."""
        pairs = zip(self.lengths, self.scores, strict=True)
        return sum(n for n, score in pairs if score < threshold)

    def crossing(self, threshold: float) -> int | None:
        """Return the first token (from 1) with a score below the threshold, or None."""
        starts = (0, *self.token_ends)
        for start, score in zip(starts, self.scores, strict=False):
            if score < threshold:
                return start + 1
        return None


@dataclass(frozen=True)
class ScoredData:
    """Hold all responses of a data set and the provenance of their scores.

    Attributes:
        responses: All responses in the order of the data.
        provenance: How the scores were made; None if the data set does not record it.
        tokenizer: Name of the tokenizer that decoded them.
    """

    responses: tuple[ScoredResponse, ...]
    provenance: Mapping[str, Any] | None
    tokenizer: str

    @property
    def guard(self) -> str:
        """Return the guard's name."""
        return str(self.provenance["guard"]) if self.provenance else "unknown"

    @property
    def demonstration(self) -> bool:
        """Return whether the scores come from a demonstration guard."""
        return bool(self.provenance and self.provenance["demonstration_guard"])

    @property
    def interpolated(self) -> bool:
        """Return whether some scores are interpolated (`trajectory="adaptive"`)."""
        return _interpolates((self.provenance or {}).get("guard_identity", {}))


def _interpolates(identity: Any) -> bool:
    """Return whether a guard, or one of its parts, skips prefixes."""
    if not isinstance(identity, Mapping):  # provenance is untrusted
        return False
    guards = identity.get("guards")
    members = guards if isinstance(guards, list) else []
    trajectory = identity.get("trajectory")
    own = isinstance(trajectory, Mapping) and "adaptive" in trajectory
    return own or any(map(_interpolates, members))


def tokenizer_of(dataset: Dataset, name: str | None) -> PreTrainedTokenizerBase:
    """Load the tokenizer that made a scored data set's tokens.

    Args:
        dataset: A scored data set. Its provenance names the tokenizer if `name` is None.
        name: Hugging Face Hub id or folder.

    Raises:
        DataError: The data set is not scored.
        ConfigError: The provenance names no tokenizer, or the tokenizer cannot be loaded.
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
            f"{error} (The data set names this tokenizer. If the model has moved, say where "
            "with --tokenizer.)"
        ) from error


def read_scored(
    dataset: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    *,
    source: str | None = None,
    progress: bool = False,
) -> ScoredData:
    """Return the responses of a scored data set.

    Args:
        dataset: A data set with `input_ids`, `labels` and `star_scores`.
        tokenizer: The tokenizer that made `input_ids`.
        source: Column that names the source of a row; None is "source", if that column exists and
            contains names.
        progress: Whether to show a progress bar.

    Raises:
        DataError: The data set is not scored, a row's scores do not match its tokens, or the tokens
            were made by another tokenizer.
        ConfigError: The source column does not exist.
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
    nothing = [None] * len(dataset)
    marks = plain[ASKED_COLUMN] if ASKED_COLUMN in columns else nothing
    rows = tqdm(content_rows(dataset), "Reading", len(dataset), unit="row", disable=not progress)
    chat = ChatTokenizer(tokenizer)
    found: list[ScoredResponse] = []
    for i, (row, scores, asked, origin) in enumerate(
        zip(rows, plain[SCORES_COLUMN], marks, origins, strict=True)
    ):
        ids, _ = with_row_number(i, ids_and_labels, row)
        with_row_number(i, check_scores, scores, len(ids))
        if asked is not None:
            with_row_number(i, _check_marks, asked, len(ids))
        if max(ids, default=0) >= len(tokenizer) or min(ids, default=0) < 0:
            raise _other_tokenizer(tokenizer)
        responses = with_row_number(i, find_responses, row, chat, tokens, 1)
        name = None if origin is None else str(origin)
        found += [_scored(i, k, name, r, scores, asked) for k, r in enumerate(responses)]
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
    """Return whether a column "source" contains names, and not texts, as in translation data."""
    names = {str(value) for value in values if value is not None}
    named = len(names) <= _MOST_SOURCES and all(
        len(name) <= _LONGEST_SOURCE and name.isprintable() for name in names
    )
    if not named:
        logger.warning(
            "The column 'source' does not look like names of sources and is left out. To use "
            "it nevertheless, or another one, name it with --source."
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


def _check_marks(marks: Any, length: int) -> None:
    if not isinstance(marks, list) or [type(mark) for mark in marks] != [bool] * length:
        raise DataError(
            f"{ASKED_COLUMN} does not hold true or false for each of the {length} tokens. Score "
            "the data again, or remove the column."
        )


def _scored(
    row: int,
    turn: int,
    source: str | None,
    response: Response,
    scores: Sequence[float],
    asked: Sequence[bool] | None,
) -> ScoredResponse:
    """Join adjacent tokens with the same score and the same entry in `asked` to pieces."""
    text = response.request.text
    pieces: list[str] = []
    ends: list[int] = []
    values: list[float] = []
    marks: list[bool] = []
    begin = 0
    for token_end, char_end in zip(response.chunk_ends, response.request.ends, strict=True):
        piece, begin = text[begin:char_end], char_end
        score = round(float(scores[token_end - 1]), _DIGITS)
        mark = True if asked is None else asked[token_end - 1]
        if values and values[-1] == score and marks[-1] == mark:
            pieces[-1] += piece
            ends[-1] = token_end - response.start
        else:
            pieces.append(piece)
            ends.append(token_end - response.start)
            values.append(score)
            marks.append(mark)
    return ScoredResponse(
        row,
        turn,
        source,
        response.request.context,
        response.raw_context,
        tuple(pieces),
        tuple(ends),
        tuple(values),
        None if asked is None else tuple(marks),
    )
