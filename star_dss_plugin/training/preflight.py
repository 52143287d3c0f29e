"""Describe what a configuration does, and list what would stop it, for `star-dss check`.

A host may silently train without STAR-DSS (Axolotl drops the block of a plugin that is not listed,
and only logs a plugin that it cannot import). A run cannot report that itself, so it is checked
here.
"""

from __future__ import annotations

from datasets import Dataset, IterableDataset

from star_dss_plugin.data.columns import SCORES_COLUMN
from star_dss_plugin.data.media_rows import MediaRows
from star_dss_plugin.data.row_responses import RowOptions, read_responses
from star_dss_plugin.data.templates.chat import ChatTokenizer
from star_dss_plugin.errors import StarDSSError
from star_dss_plugin.guards.base import display_name
from star_dss_plugin.guards.probing.guard import make_probing
from star_dss_plugin.guards.spec import missing_guard, parse_guard
from star_dss_plugin.hookspecs import Findings, GuardInfo
from star_dss_plugin.options import StarDSSOptions
from star_dss_plugin.plugins import load_plugins
from star_dss_plugin.scoring.scorer import guard_of

__all__ = ["check_options", "describe_stream", "estimate", "estimate_of_media", "lacks_guard"]


def check_options(options: StarDSSOptions) -> Findings:
    """Check the options and the names in them, without loading the guard's weights."""
    found = Findings()
    try:
        options.validate()
        if options.guard is not None:
            guard = guard_of(options)
            assert guard.identity
            if options.trajectory == "probed":
                how = (options.probe_sample, options.probe_tolerance, options.threshold)
                guard = make_probing(guard, *how)
            found.notes.append(f"guard: {display_name(guard.name, guard.demonstration)}")
    except StarDSSError as error:
        found.problems.append(str(error))
    found.notes.append(
        f"loss: {options.loss_type} (kl_coef={options.kl_coef}, kl_estimator="
        f"{options.kl_estimator}), reference: {options.reference}, one score per "
        f"{options.chunk_size} {options.segmenter}"
    )
    return found


def lacks_guard(dataset: Dataset, options: StarDSSOptions) -> bool:
    """Return whether a data set would have to be scored and no guard is named."""
    reads = options.shaping().needs_scores
    return reads and options.guard is None and SCORES_COLUMN not in dataset.column_names


def describe_stream(dataset: IterableDataset, options: StarDSSOptions) -> str:
    """Describe in one line how a stream would be scored; its first row is read.

    Args:
        dataset: The stream, of raw or tokenized rows.
        options: The run's options.

    Raises:
        StarDSSError: The stream would have to be scored and no guard is named.
    """
    if SCORES_COLUMN in next(iter(dataset), {}):
        return "a stream that brings its scores: nothing to score"
    if not options.shaping().needs_scores:
        return "a stream, and this loss_type reads no scores"
    if options.guard is None:
        raise missing_guard()
    return (
        f"a stream, scored {options.stream_buffer} rows at a time while the model waits; how much "
        "the guard would read cannot be counted beforehand"
    )


def estimate(
    dataset: Dataset,
    chat: ChatTokenizer,
    options: StarDSSOptions,
    *,
    max_length: int | None = None,
    assistant_only_loss: bool = False,
    keep_end: bool = False,
) -> str:
    """Describe in one line how many tokens a guard would read to score a data set (no time).

    Args:
        dataset: Raw rows; or rows with `input_ids`, `labels` and, if known, the messages.
        chat: The tokenizer and the chat template that made the tokens.
        options: The run's options.
        max_length: Raw rows are truncated to this many tokens.
        assistant_only_loss: Whether only the tokens of raw rows that the template marks as
            generated are trained.
        keep_end: Whether truncation of raw rows keeps the end instead of the beginning.

    Raises:
        DataError: A row cannot be scored; its number is in the message.
    """
    if SCORES_COLUMN in dataset.column_names or options.guard is None:
        return f"{len(dataset)} rows: nothing to score"
    cut = load_plugins().segmenter(options.segmenter)
    responses = raw = calls = once = alone = 0
    how = RowOptions(cut, options.chunk_size, max_length, assistant_only_loss, keep_end)
    found = read_responses(dataset, chat, how)
    for response in (response for row in found.responses for response in row):
        responses += 1
        raw += response.raw_context
        calls += len(response.chunk_ends)
        once += response.end
        alone += sum(response.chunk_ends)
    most = "" if options.trajectory == "exact" else "at most "
    untrained = "".join(
        f", {count} rows train nothing because {why}" for why, count in found.untrained.items()
    )
    said = f"{len(dataset)} rows, {responses} responses ({raw} without messages){untrained}: "
    name, _ = parse_guard(options.guard)
    info = GuardInfo() if name is None else load_plugins().guard_info(name)
    if info.reads == "once":
        return f"{said}one pass over each, {once} tokens of conversation in all"
    if info.reads == "again":
        return f"{said}{most}{calls} guard calls, each from the beginning; {alone} tokens in all"
    words = "the guard's own words before and after it"
    if info.per_prefix:
        words = f"about {calls * info.per_prefix} of {words}"
    return (
        f"{said}{most}{calls} guard calls; {once} tokens of conversation where prefixes are shared "
        f"({alone} if each were read alone), and {words}"
    )


def estimate_of_media(
    dataset: Dataset, name: str, media: MediaRows, options: StarDSSOptions
) -> str:
    """Describe in one line how much a guard would read of rows with media: their text alone.

    Args:
        dataset: Raw rows; the files that they name are not opened.
        name: Name of the data set ("train", "eval", …) for messages.
        media: The host's reader of these rows.
        options: The run's options.

    Raises:
        DataError: A row cannot be scored; its number is in the message.
    """
    rows = media.text_rows(dataset, name)
    marked = sum(map(bool, rows["media"]))
    return f"{estimate(rows, media.chat, options)}; a mark in place of media in {marked} rows"
