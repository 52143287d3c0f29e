"""Score a stream (`datasets.IterableDataset`) while the trainer reads it, a buffer at a time.

The scores and the cache are those of a data set that is scored before training. The guard stays in
memory until training ends.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pyarrow as pa
import torch
from accelerate.data_loader import DataLoaderDispatcher, IterableDatasetShard
from datasets import Dataset, DatasetInfo, IterableDataset

from star_dss_plugin.data.columns import ASKED_COLUMN, REF_COLUMN, SCORES_COLUMN
from star_dss_plugin.data.rows import CONTENT_COLUMNS
from star_dss_plugin.errors import ConfigError, DataError, StarDSSError
from star_dss_plugin.scoring.cached_trajectories import TOLERATED_FAILURES, none_scored_error
from star_dss_plugin.scoring.ranks import SINGLE_PROCESS, Share
from star_dss_plugin.training.rows.even import EvenLoader
from star_dss_plugin.training.rows.known_rows import KnownRows
from star_dss_plugin.training.rows.summary import DatasetSummary
from star_dss_plugin.training.sharding import Ranks

__all__ = ["ScoredStream"]

Score = Callable[[Dataset, Share], tuple[Dataset, DatasetSummary]]

_SCORING_COLUMNS = (*CONTENT_COLUMNS, SCORES_COLUMN, REF_COLUMN, ASKED_COLUMN, "seq_lengths")
"""Columns that scoring reads or makes; a row's other columns are passed through."""

_ROW_MODULES = ("data.rows", "data.row_responses", "training.rows.prepare")
"""Modules whose log messages on the form of rows would be repeated for each buffer."""


class ScoredStream:
    """Read a stream in buffers and yield its rows with their scores.

    Args:
        dataset: The stream of tokenized rows.
        name: Name of the stream ("train", "eval", …) for messages.
        rows: Number of rows that are read and scored together.
        score: Takes a buffer and this process's share of the scoring; returns the buffer with
            scores and its summary.
        known: Remembers digests of the rows that were yielded.
        ranks: The ranks of the run.

    Attributes:
        dataset: The stream with `star_scores`, or packs of its rows; reading it scores it.
        summary: Statistics of the longest pass so far; None before the first buffer.
        seconds: Time that reading and scoring took in all passes.
        together: Whether all processes read the same rows and divide their scoring. If not, each
            process reads files of its own.
        even: The loader with which processes that read their own files get equally many batches;
            None if `together`.
    """

    def __init__(
        self,
        dataset: IterableDataset,
        name: str,
        rows: int,
        score: Score,
        known: KnownRows,
        ranks: Ranks,
    ) -> None:
        self.name = name
        self.summary: DatasetSummary | None = None
        self.seconds = 0.0
        self.together = True
        self.even: EvenLoader | None = None
        self._score, self._known, self._ranks = score, known, ranks
        self._pass: DatasetSummary | None = None
        self._log_once = _LogOnce()
        self._judged = False
        self._failed = 0
        self._description = dataset.info.description or ""
        self._reached = 0
        plain = dataset.with_format(None)
        # `map` would otherwise keep the buffer's columns beside those of the packed rows.
        self._columns = plain.column_names or list(next(iter(plain), {}))
        self.dataset: Any = plain.map(self._count, with_indices=True).map(
            self._scored,
            with_indices=True,
            batched=True,
            batch_size=rows,
            remove_columns=self._columns,
        )

    def score_first_buffer(self) -> DatasetSummary:
        """Read the first buffer and return its summary; every process must call this.

        Raises:
            StarDSSError: The stream is empty, or the buffer has no trained token or cannot be
                scored.
        """
        next(self.iterate(self.dataset), None)
        if self.summary is None:
            raise DataError(
                f"The {self.name} data set is a stream that gives no row. Check what it is made "
                "of: a filter that keeps nothing, or max_length that leaves no response."
            )
        if not self.summary.trained_tokens:
            raise DataError(
                f"None of the first {self.summary.rows} rows of the {self.name} stream has a "
                "trained token: every label is -100. Check the columns, the chat template and "
                "max_length (a prompt that fills it leaves no response), or read more rows at "
                "first with stream_buffer."
            )
        return self.summary

    def iterate(self, items: Iterable[Any]) -> Iterator[Any]:
        """Yield the rows, packs or batches of a pass over the stream; errors name the row.

        Raises:
            DataError: The user's or the host's code that makes the rows fails.
        """
        try:
            yield from self._with_row_numbers(items)
        finally:
            self._reached = 0

    def next_batches(self, batches: Iterator[Any], limit: int) -> Iterator[Any]:
        """Yield the next batches of a pass; every process must call this.

        Args:
            batches: The iterator of the pass, the same object throughout it.
            limit: How many batches to yield at most if processes read their own files; if not, the
                caller takes from the iterator what it needs.

        Raises:
            DataError: As `iterate` raises it.
        """
        return self._with_row_numbers(
            batches if self.even is None else self._even_batches(self.even, batches, limit)
        )

    def _even_batches(self, even: EvenLoader, batches: Iterator[Any], limit: int) -> Iterator[Any]:
        yield from even.next_batches(batches, limit)

    def _with_row_numbers(self, items: Iterable[Any]) -> Iterator[Any]:
        try:
            # Not `yield from`: it would close `items`, which the next call goes on with.
            for one in items:  # noqa: UP028
                yield one
            self._reached = 0  # the pass is over
        except StarDSSError:
            raise
        except Exception as error:
            raise DataError(
                f"it, or a row that is read together with it, cannot be read: "
                f"{type(error).__name__}: {error}. Every row needs the columns that the first one "
                "has, filled. Mend the row, or leave it out with filter, before the trainer gets "
                "the stream."
            ).at(file=f"The {self.name} stream", rows=(self._reached,)) from error

    def wrap_loader(self, loader: Any, processes: int) -> Any:
        """Set `together` by how the data loader divides the stream among processes.

        Args:
            loader: The stream's data loader.
            processes: Number of processes on all machines that train on different rows.

        Returns:
            A loader of the same batches, equally many in each process.

        Raises:
            ConfigError: The loader does not read the stream in the training process.
        """
        if isinstance(loader, DataLoaderDispatcher) or getattr(loader, "num_workers", 0) > 0:
            raise ConfigError(
                f"The {self.name} stream would be read by the data loader's workers, or by one "
                "process for all others (dispatch_batches), which have no guard: a setting of the "
                "data loader was changed since STAR-DSS was set up. Set dataloader_num_workers=0 "
                "and dispatch_batches=False."
            )
        together = processes == 1 or isinstance(loader.dataset, IterableDatasetShard)
        if together != self.together:
            self.together = together
            # The rows of the first buffer, which all processes read, would be counted for each.
            self.summary = self._pass = None
        self.even = None if together else EvenLoader(loader, self.name, self._ranks.gather)
        return _ReadingLoader(self.even or loader, self.iterate)

    def total_summary(self) -> DatasetSummary:
        """Return the summary of the rows of all processes; every process must call this."""
        assert self.summary is not None  # set by `score_first_buffer` or the check of a batch
        found: list[DatasetSummary] = self._ranks.gather(self.summary)
        if self.together:
            return self.summary
        total = found[0]
        for other in found[self._ranks.tp_size :: self._ranks.tp_size]:
            total = total.merged_with(other)
        return total

    def _count(self, row: dict[str, Any], index: int) -> dict[str, Any]:
        """Remember the number of the row that will be read next, for error messages."""
        self._reached = index + 1
        return {}

    def _scored(self, batch: dict[str, list[Any]], indices: list[int]) -> dict[str, list[Any]]:
        started = time.monotonic()
        share = self._ranks.share if self.together else SINGLE_PROCESS
        read = {name: values for name, values in batch.items() if name in _SCORING_COLUMNS}
        try:
            # A guard that draws random numbers must not change those of the training.
            with torch.random.fork_rng(_devices()), self._log_once.quiet():
                dataset, summary = self._score(self._table(read), share)
            self._check_judged(summary)
        except StarDSSError as error:
            error.counted_from(indices[0]).at(file=f"The {self.name} stream")
            raise
        digest = self._known.add_buffer(dataset, self.name, first=not indices[0])
        if self.together:
            self._ranks.check_equal({f"scored {self.name} data": digest})
        self._pass = self._pass.merged_with(summary) if self._pass and indices[0] else summary
        if self.summary is None or self._pass.rows >= self.summary.rows:
            self.summary = self._pass
        self.seconds += time.monotonic() - started
        found: dict[str, list[Any]] = dataset.with_format(None)[:]
        if found["input_ids"] != read["input_ids"]:
            # Packed, so the columns that are passed through are dropped. `map` does not drop a
            # column that the first row of the stream lacked: give it the length of the packs.
            late = [name for name in batch if name not in (*self._columns, *found)]
            return {**found, **dict.fromkeys(late, [None] * len(dataset))}
        others = {name: values for name, values in batch.items() if name not in _SCORING_COLUMNS}
        return {**others, **found}

    def _check_judged(self, summary: DatasetSummary) -> None:
        """Check that the guard does not fail for all responses, counted over buffers.

        Raises:
            GuardError: It has failed for more than `TOLERATED_FAILURES` responses and scored none.
        """
        note = summary.provenance or {}
        failed = note.get("guard_errors", 0)
        self._judged = self._judged or failed < note.get("responses", 0)
        self._failed += failed
        if self._failed > TOLERATED_FAILURES and not self._judged:
            raise none_scored_error(summary.guard, self._failed)

    def _table(self, rows: dict[str, list[Any]]) -> Dataset:
        """Return the rows of a buffer as a data set.

        Raises:
            DataError: A column has values of different types.
        """
        info = DatasetInfo(description=self._description)
        try:
            return Dataset.from_dict(rows, info=info)
        except (pa.ArrowInvalid, pa.ArrowTypeError, pa.ArrowNotImplementedError) as error:
            raise DataError(
                f"rows that are read together differ in form: {error}. Give a column values of "
                "one type, with map, before the trainer gets the stream."
            ).at(rows=range(len(next(iter(rows.values()), [])))) from error


class _ReadingLoader:
    """Wrap a loader so that iterating over it goes through a function."""

    def __init__(self, loader: Any, read: Callable[[Any], Iterator[Any]]) -> None:
        self._loader, self._read = loader, read

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)

    def __iter__(self) -> Iterator[Any]:
        return self._read(self._loader)


def _devices() -> list[int]:
    return [torch.cuda.current_device()] if torch.cuda.is_available() else []


class _LogOnce(logging.Filter):
    """Let each message on the form of rows through once, not once for every buffer."""

    def __init__(self) -> None:
        super().__init__()
        self._logged: set[str] = set()

    def filter(self, record: logging.LogRecord) -> bool:
        new = record.msg not in self._logged
        self._logged.add(record.msg)
        return new

    @contextlib.contextmanager
    def quiet(self) -> Iterator[None]:
        loggers = [logging.getLogger(f"star_dss_plugin.{name}") for name in _ROW_MODULES]
        for one in loggers:
            one.addFilter(self)
        try:
            yield
        finally:
            for one in loggers:
                one.removeFilter(self)
