"""Score data sets: compute the column `star_scores`, using the cache.

The guard scores only prefixes that the cache lacks. Batches depend only on the data, so a run that
was killed and restarted gives the same bytes as an uninterrupted one.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from datasets import Dataset, List, Value
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from star_dss_plugin._version import __version__
from star_dss_plugin.data.cache import default_cache_dir
from star_dss_plugin.data.columns import ASKED_COLUMN, SCORES_COLUMN, with_column
from star_dss_plugin.data.fingerprints import request_key, row_keys
from star_dss_plugin.data.provenance import write_note
from star_dss_plugin.data.requests import PrefixRequest, Trajectory
from star_dss_plugin.data.responses import Response
from star_dss_plugin.data.row_digests import write_row_digests
from star_dss_plugin.data.row_responses import RowOptions, read_responses
from star_dss_plugin.data.templates.chat import ChatTokenizer
from star_dss_plugin.errors import DataError
from star_dss_plugin.guards.adaptive import make_adaptive
from star_dss_plugin.guards.base import Guard
from star_dss_plugin.guards.loading import load_guard
from star_dss_plugin.guards.probing.guard import make_probing
from star_dss_plugin.guards.spec import missing_guard
from star_dss_plugin.options import ScoringOptions
from star_dss_plugin.plugins import load_plugins
from star_dss_plugin.scoring.guard_statistics import attempt_notes, label_mass, member_notes
from star_dss_plugin.scoring.probed import POOL, Pool, ProbedTrajectories, pseudo_random_order
from star_dss_plugin.scoring.ranks import SINGLE_PROCESS, Share

__all__ = ["PoolRows", "guard_of", "pool_rows", "score_dataset", "versions"]

_SCORES = List(Value("float32"))


@dataclass
class _Row:
    """Hold the responses of one row and their cache keys."""

    length: int
    responses: list[Response] = field(default_factory=list)
    keys: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class PoolRows:
    """Hold the rows from which all shards of a data set draw the same sample for a probe.

    Attributes:
        dataset: The rows that `pool_rows` has chosen.
        places: The rows' indices, for messages.
        root: A cache folder that all shards share.
    """

    dataset: Dataset
    places: Sequence[int]
    root: Path


def score_dataset(
    dataset: Dataset,
    tokenizer: PreTrainedTokenizerBase | ChatTokenizer,
    options: ScoringOptions | None = None,
    *,
    per_guard: bool = False,
    max_length: int | None = None,
    chat_template: str | None = None,
    assistant_only_loss: bool = False,
    num_proc: int = 1,
    share: Share = SINGLE_PROCESS,
    part: bool = False,
    pool: PoolRows | None = None,
    progress: bool = True,
    **changes: Any,
) -> Dataset:
    """Return a data set with the column `star_scores`: the STAR score of every token.

    Args:
        dataset: Tokenized rows (`input_ids`, `labels`, and if possible the messages they came
            from), or raw ones (`messages`, `prompt` and `completion`, or `text`), which are
            tokenized here.
        tokenizer: The trained model's tokenizer, or a `ChatTokenizer` with its template.
        options: Scoring options, or None to give them by name.
        per_guard: Whether to add a column `star_scores_NAME` for each guard of an ensemble.
        max_length: Raw rows are truncated to this many tokens before they are scored.
        chat_template: The chat template of the rows; None: the tokenizer's own.
        assistant_only_loss: Whether only text within `{% generation %}` of raw rows is trained, as
            with TRL's option of this name.
        num_proc: Processes that render and tokenize rows, at least 1; scores do not depend on it.
        share: This process's part of the work, if several processes score the same data set; each
            of them returns all rows.
        part: Whether these rows are only a part of the data (a shard). Then it is no error if they
            have no response, or at most 20 responses that all fail; `jobs.finish` checks the whole.
        pool: With `trajectory="probed"` and `part`: the rows of the whole data set from which all
            parts draw the same sample.
        progress: Whether to show a progress bar.
        **changes: Options of `ScoringOptions` by name: `score_dataset(rows, tokenizer,
            guard="qwen3guard-gen-0.6b", chunk_size=5)`. `guard` may also be a loaded guard.

    Returns:
        The same rows with `input_ids`, `labels` and `star_scores` (float32, one per token of
        `input_ids`, 1.0 outside responses). If user turns were trained, they are -100 in `labels`
        now. The description contains the provenance (`provenance_of`).

    Raises:
        StarDSSError: An option is invalid, or a row cannot be scored; the error has its number.
    """
    loaded = changes.get("guard")
    if isinstance(loaded, Guard):
        changes = {**changes, "guard": None}
    else:
        loaded = None
    # Training options have a threshold, near which a probe must be exact; for scoring it is 0.5.
    threshold = getattr(options, "threshold", 0.5)
    options = (options or ScoringOptions()).scoring(**changes)
    options.validate()
    if loaded is None and options.guard is None:
        raise missing_guard()
    if SCORES_COLUMN in dataset.column_names:
        raise DataError(
            "The data set already has a 'star_scores' column. Remove it to score again, or use "
            "the data set as it is."
        )
    if isinstance(tokenizer, ChatTokenizer):
        chat, tokenizer = tokenizer, tokenizer.tokenizer
    else:
        chat = ChatTokenizer(tokenizer, chat_template)
    how = RowOptions(
        load_plugins().segmenter(options.segmenter),
        options.chunk_size,
        max_length,
        assistant_only_loss,
    )
    read = read_responses(dataset, chat, how, needed=not part, num_proc=num_proc)
    dataset, responses, untrained = read
    rows = [
        _Row(len(labels), found, [request_key(r.request) for r in found])
        for labels, found in zip(dataset.with_format(None)["labels"], responses, strict=True)
    ]
    with _own_random_numbers():
        guard = loaded or guard_of(options)
    if options.trajectory == "adaptive":
        guard = make_adaptive(guard, options.trajectory_epsilon)
    uses_probe = options.trajectory == "probed"
    try:
        if uses_probe:
            guard = make_probing(guard, options.probe_sample, options.probe_tolerance, threshold)
        lookup = ProbedTrajectories(
            _unique_requests(rows),
            _first_rows(rows),
            Path(options.score_cache_dir) if options.score_cache_dir else default_cache_dir(),
            share=share,
            progress=progress,
            strict=options.on_guard_error == "raise",
            part=part,
            pool=_pool(pool, chat, how) if pool and uses_probe else None,
        )
        with _own_random_numbers():
            trajectories = lookup.trajectories(guard)
        notes = attempt_notes(
            guard,
            ((i, r.request, r.raw_context) for i, row in enumerate(rows) for r in row.responses),
            chat.added,
        )
    finally:
        if loaded is None:
            guard.close()
    provenance = _provenance(guard, options, rows, trajectories)
    keys = [key for row in rows for key in row.keys]
    provenance |= notes | member_notes(lookup.members, keys)
    provenance["untrained_rows"] = untrained
    if uses_probe:
        provenance["probes"] = lookup.notes
        provenance["probed_prefixes"] = sum(
            (trajectories[key].asked or ()).count(False) for key in keys
        )
    provenance["guard_errors"] = sum(key in lookup.failed for key in keys)
    provenance["tokenizer"] = str(tokenizer.name_or_path)  # reports decode tokens with it
    scored = with_column(dataset, SCORES_COLUMN, _scores(rows, trajectories), _SCORES)
    write_note(scored, "scores", provenance)
    if uses_probe:
        scored = with_column(scored, ASKED_COLUMN, _asked(rows, trajectories), List(Value("bool")))
    columns = [SCORES_COLUMN]
    for name, found in (lookup.members if per_guard else {}).items():
        columns.append(f"{SCORES_COLUMN}_{name}")
        scored = with_column(scored, columns[-1], _scores(rows, found), _SCORES)
    write_row_digests(scored, columns)
    return scored


def _own_random_numbers() -> contextlib.AbstractContextManager[None]:
    """Return a context after which the random numbers of the training are as they were before.

    If a guard drew some of them, a run whose scores are in the cache would take other steps than
    the run that computed them.
    """
    devices = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []
    return torch.random.fork_rng(devices)


def _first_rows(rows: Sequence[_Row]) -> dict[str, int]:
    """Return the index of the first row with each key."""
    return {key: i for i, row in reversed(list(enumerate(rows))) for key in row.keys}


def pool_rows(dataset: Dataset, options: ScoringOptions) -> list[int]:
    """Return the indices of the rows from which all shards draw the sample for a probe."""
    first = {key: i for i, key in reversed(list(enumerate(row_keys(dataset))))}
    return [first[key] for key in pseudo_random_order(first)[: POOL * options.probe_sample]]


def _pool(rows: PoolRows, chat: ChatTokenizer, how: RowOptions) -> Pool:
    """Return the pool of responses in these rows."""
    read = read_responses(rows.dataset, chat, how, needed=False).responses
    found = [_Row(0, one, [request_key(r.request) for r in one]) for one in read]
    places = {key: rows.places[i] for key, i in _first_rows(found).items()}
    return Pool(_unique_requests(found), places, rows.root)


def _unique_requests(rows: Iterable[_Row]) -> dict[str, PrefixRequest]:
    """Return each distinct request once, in the order of the data."""
    return {
        key: response.request
        for row in rows
        for key, response in zip(row.keys, row.responses, strict=True)
    }


def _provenance(
    guard: Guard,
    options: ScoringOptions,
    rows: list[_Row],
    trajectories: Mapping[str, Trajectory],
) -> dict[str, Any]:
    """Return the provenance of the scores, which is the same for repeated runs."""
    responses = [(key, r) for row in rows for key, r in zip(row.keys, row.responses, strict=True)]
    scores = np.array([s for key, _ in responses for s in trajectories[key].scores])
    return {
        "guard": guard.name,
        "demonstration_guard": guard.demonstration,
        "guard_identity": guard.identity,
        "segmenter": options.segmenter,
        "chunk_size": options.chunk_size,
        "rows": len(rows),
        "responses": len(responses),
        "prefixes": len(scores),
        "trained_tokens": sum(r.end - r.start for _, r in responses),
        "raw_contexts": sum(r.raw_context for _, r in responses),
        "no_contexts": sum(r.lacks_context for _, r in responses),
        "mean_prefix_score": float(scores.mean()) if scores.size else None,
        "label_mass": label_mass(trajectories, [key for key, _ in responses]),
        "versions": versions(),
    }


def versions() -> dict[str, str]:
    """Return the versions of the packages on which scores depend."""
    return {
        "star-dss-plugin": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def _scores(rows: list[_Row], trajectories: Mapping[str, Trajectory]) -> list[Any]:
    """Return each token's score: one float32 array per row."""
    return _per_token(rows, trajectories, np.float32, lambda found: found.scores)


def _asked(rows: list[_Row], trajectories: Mapping[str, Trajectory]) -> list[Any]:
    """Return whether the guard gave each token's score itself: one bool array per row."""
    return _per_token(
        rows, trajectories, bool, lambda found: found.asked or [True] * len(found.scores)
    )


def _per_token(
    rows: list[_Row],
    trajectories: Mapping[str, Trajectory],
    dtype: type,
    values: Callable[[Trajectory], Sequence[float]],
) -> list[Any]:
    """Spread each chunk's value over its tokens; tokens outside responses get 1.

    Returns:
        One array per row.
    """
    columns = []
    for row in rows:
        column: NDArray[Any] = np.ones(row.length, dtype=dtype)
        for key, response in zip(row.keys, row.responses, strict=True):
            start = response.start
            for end, value in zip(response.chunk_ends, values(trajectories[key]), strict=True):
                column[start:end] = value
                start = end
        columns.append(column)
    return columns


def guard_of(options: ScoringOptions) -> Guard:
    """Load the guard that the options name.

    Raises:
        StarDSSError: No guard is set, or as for `load_guard`.
    """
    if options.guard is None:
        raise missing_guard()
    return load_guard(
        options.guard,
        device=options.guard_device,
        dtype=options.guard_dtype,
        batch_tokens=options.score_batch_tokens,
        engine=options.engine,
        engine_options=options.engine_options,
    )
