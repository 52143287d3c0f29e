"""Score data in shards: more rows than one process should hold, or one machine can score.

The data is cut into runs of `shard_rows` rows; each is scored alone (`score_dataset`) and written
as one parquet file. Its bytes do not depend on which process made it, when, or after how many
failures. Existing shards are kept, so the same command resumes a run that was killed; begun shards
have caches of their own.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from datasets import Dataset
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from star_dss_plugin.data.columns import SCORES_COLUMN, with_attention_mask
from star_dss_plugin.data.fingerprints import sample_of, words_of
from star_dss_plugin.data.parquet_shards import (
    DATA,
    shard_name,
    shard_note,
    write_card,
    write_shard,
)
from star_dss_plugin.data.reading import read_dataset
from star_dss_plugin.data.writing import write_text
from star_dss_plugin.errors import ConfigError, DataError, StarDSSError
from star_dss_plugin.guards.base import Guard
from star_dss_plugin.guards.probing.guard import probing
from star_dss_plugin.models import load_tokenizer
from star_dss_plugin.options import ScoringOptions
from star_dss_plugin.scoring.cached_trajectories import none_scored
from star_dss_plugin.scoring.guard_statistics import merged
from star_dss_plugin.scoring.scorer import (
    PoolRows,
    guard_of,
    pool_rows,
    score_dataset,
    versions,
)
from star_dss_plugin.validation import at_least

__all__ = ["Job", "ShardScorer", "bar", "begin", "finish", "score_shards"]

_JOB_FILE = "job.json"


@dataclass(frozen=True)
class Job:
    """Hold all that a worker needs to score a shard, as JSON values.

    Attributes:
        data: What `read_dataset` reads.
        split: Of a data set that has splits.
        tokenizer: Id or folder of the model to be trained.
        output: The folder that is to be made.
        rows: Of the data.
        shard_rows: Rows of every shard but the last.
        sample: A hash over some rows, by which a worker that reads other data notices.
        tokens: A hash of the tokenizer and its template, likewise.
        guard: The guard's identity.
        options: The fields of `ScoringOptions`; begun shards have caches of their own.
        per_guard: Whether each guard of several gets a column.
        max_length: Rows are cut to this many tokens; None: they are not.
        assistant_only_loss: Whether only what the chat template marks as generated is trained.
        chat_template: The template of raw rows; None: the tokenizer's own.
        num_proc: Processes that render and tokenize the rows of a shard.
        versions: Of the packages that scores depend on.
    """

    data: str
    split: str
    tokenizer: str
    output: str
    rows: int
    shard_rows: int
    sample: str
    tokens: str
    guard: Mapping[str, Any]
    options: Mapping[str, Any]
    per_guard: bool
    max_length: int | None
    assistant_only_loss: bool
    chat_template: str | None
    num_proc: int
    versions: Mapping[str, str]

    @property
    def folder(self) -> Path:
        """The folder that collects shards until all are there."""
        return Path(f"{self.output}.incomplete")

    @property
    def begun(self) -> Path:
        """The folder in which workers keep what they have of unfinished shards."""
        return self.folder / "begun"

    @property
    def shards(self) -> int:
        """The number of shards."""
        return -(-self.rows // self.shard_rows)

    @property
    def learns(self) -> bool:
        """Whether shards need what the first one learns for all."""
        return bool(self.options["trajectory"] == "probed")

    def path(self, index: int) -> Path:
        """Return the file of a shard."""
        return self.folder / DATA / shard_name(index, self.shards)

    def missing(self) -> list[int]:
        """Return the numbers of the shards that are not there yet."""
        return [index for index in range(self.shards) if not self.path(index).exists()]


def begin(
    data: str,
    tokenizer: str,
    output: Path,
    options: ScoringOptions | None = None,
    *,
    split: str = "train",
    shard_rows: int = 1000,
    per_guard: bool = False,
    max_length: int | None = None,
    assistant_only_loss: bool = False,
    chat_template: str | None = None,
    num_proc: int = 1,
    **changes: Any,
) -> Job:
    """Plan a run, or resume the one that was begun in the same place.

    Args:
        data: What `read_dataset` reads; every worker reads it for itself.
        tokenizer: Id or folder of the model to be trained.
        output: The folder to make; until it is complete it is called `<output>.incomplete`.
        options: How responses are scored, or None to give the options by name; no
            `score_cache_dir`: begun shards have caches of their own.
        split: Of a data set that has splits.
        shard_rows: Rows of a shard, at least 1.
        per_guard: Whether to add a column for each guard of several.
        max_length: Rows are cut to this many tokens before they are scored.
        assistant_only_loss: As for `score_dataset`.
        chat_template: As for `score_dataset`.
        num_proc: As for `score_dataset`.
        **changes: Options of `ScoringOptions` by name.

    Raises:
        StarDSSError: The run cannot be done, or another one was begun there. Nothing was scored.
    """
    if output.exists():
        raise ConfigError(f"{output} exists. Name a new folder, or remove it first.")
    options = (options or ScoringOptions()).scoring(**changes)
    if options.score_cache_dir is not None:
        raise ConfigError(
            f"score_cache_dir is {options.score_cache_dir!r}, but shards keep what they have begun "
            "beside the output, and share no cache. Leave it out."
        )
    at_least("shard_rows", shard_rows, 1, integer=True)
    dataset = read_dataset(data, split)
    if len(dataset) == 0:
        raise DataError(f"{data} has no rows, so there is nothing to score.")
    if SCORES_COLUMN in dataset.column_names:
        raise DataError(f"{data} already has a {SCORES_COLUMN!r} column. Remove it to score again.")
    tokens = words_of(load_tokenizer(tokenizer))
    options.validate()
    guard = guard_of(options)
    if options.trajectory == "probed":
        probing(guard, options.probe_sample, options.probe_tolerance, 0.5)
    # Workers may run in other folders.
    data = str(Path(data).absolute()) if Path(data).exists() else data
    job = Job(
        data,
        split,
        tokenizer,
        str(output.absolute()),
        len(dataset),
        shard_rows,
        sample_of(dataset),
        tokens,
        guard.identity,
        asdict(options),
        per_guard,
        max_length,
        assistant_only_loss,
        chat_template,
        num_proc,
        versions(),
    )
    known = job.folder / _JOB_FILE
    plan = json.dumps(asdict(job), indent=2, sort_keys=True)
    if known.exists():
        now = json.loads(plan)
        try:
            before = dict(json.loads(known.read_bytes()))
        except (ValueError, TypeError) as error:
            raise DataError(
                f"{known} is damaged ({error}), so it is unknown how the shards beside it were "
                f"scored. Remove the whole folder {job.folder} and start again."
            ) from error
        free = {"num_proc"}  # what a shard holds does not depend on it
        if changed := [name for name in sorted(now.keys() - free) if before.get(name) != now[name]]:
            raise ConfigError(
                f"{job.folder} holds shards of another run: {', '.join(changed)} differ from "
                f"{known}. Start the command that began it, name another output, or remove the "
                "whole folder."
            )
    else:
        write_text(known, plan + "\n")
    return job


class ShardScorer:
    """Score shards of a job; data, tokenizer and guard are loaded once, on the first shard.

    Args:
        job: What to do.

    Raises:
        StarDSSError: From a call, with the rows it is about.
    """

    def __init__(self, job: Job) -> None:
        self.job = job

    def __call__(self, index: int) -> None:
        """Score and write a shard that is not there yet."""
        job, path = self.job, self.job.path(index)
        if path.exists():
            return
        start = index * job.shard_rows
        stop = min(start + job.shard_rows, job.rows)
        begun = job.begun / f"{index:05d}"
        try:
            scored = score_dataset(
                self._dataset.select(range(start, stop)),
                self._tokenizer,
                ScoringOptions(**job.options),
                guard=self._loaded_guard,
                score_cache_dir=str(begun),
                per_guard=job.per_guard,
                max_length=job.max_length,
                assistant_only_loss=job.assistant_only_loss,
                chat_template=job.chat_template,
                num_proc=job.num_proc,
                part=True,
                pool=self._pool(start),
                progress=False,
            )
        except StarDSSError as error:
            # Rows of a shard count from its first one.
            error.counted_from(start).at(rows=range(start, stop))
            raise
        write_shard(with_attention_mask(scored), path)
        shutil.rmtree(begun, ignore_errors=True)

    def _pool(self, start: int) -> PoolRows | None:
        """Return what the probe is learned from: rows of all shards, and a cache beside theirs.

        Whoever scores the first shard fills that cache.
        """
        if not self.job.learns:
            return None
        # A shard's rows count from its first one, and whoever reports an error adds that.
        places = [row - start for row in self._pool_rows]
        return PoolRows(self._dataset.select(self._pool_rows), places, self.job.begun / "probe")

    @cached_property
    def _pool_rows(self) -> list[int]:
        return pool_rows(self._dataset, ScoringOptions(**self.job.options))

    def close(self) -> None:
        """Free the guard."""
        if "_loaded_guard" in self.__dict__:
            self._loaded_guard.close()

    @cached_property
    def _dataset(self) -> Dataset:
        if versions() != self.job.versions:
            raise ConfigError(
                f"A worker has {versions()}, the run was begun with {dict(self.job.versions)}. "
                "Scores may depend on it: install the same versions everywhere."
            )
        dataset = read_dataset(self.job.data, self.job.split)
        if len(dataset) != self.job.rows or sample_of(dataset) != self.job.sample:
            raise DataError(
                f"A worker finds other rows in {self.job.data} than the run was begun with. Put "
                "the data where every machine reads the same, and leave it as it is meanwhile."
            )
        return dataset

    @cached_property
    def _tokenizer(self) -> PreTrainedTokenizerBase:
        found = load_tokenizer(self.job.tokenizer)
        if words_of(found) != self.job.tokens:
            raise ConfigError(
                f"A worker finds another tokenizer or chat template in {self.job.tokenizer} than "
                "the run was begun with. Give all machines the same files, and leave them as they "
                "are meanwhile."
            )
        return found

    @cached_property
    def _loaded_guard(self) -> Guard:
        guard = guard_of(ScoringOptions(**self.job.options))
        # Through JSON, as the job went: a tuple comes back as a list.
        if json.loads(json.dumps(guard.identity)) != json.loads(json.dumps(self.job.guard)):
            raise ConfigError(
                "A worker loads another guard than the run was begun with: its weights, template "
                "or dtype differ. Give all machines the same files and devices, or set guard_dtype."
            )
        return guard


def score_shards(job: Job, *, progress: bool = True) -> None:
    """Score the missing shards one after the other, in this process."""
    scorer = ShardScorer(job)
    todo = job.missing()
    try:
        with bar(job, progress) as advance:
            for index in todo:
                scorer(index)
                advance.update()
    finally:
        scorer.close()


def bar(job: Job, progress: bool) -> Any:
    """Return a progress bar over a job's shards that counts those already there."""
    return tqdm(
        total=job.shards,
        initial=job.shards - len(job.missing()),
        unit="shard",
        desc="STAR scores",
        disable=not progress,
        smoothing=0,
    )


def finish(job: Job) -> dict[str, Any]:
    """Check the shards, write their merged provenance, and give the folder its final name.

    Returns:
        The provenance of all rows.

    Raises:
        DataError: A shard is missing or damaged, or no row has a response.
        GuardError: Not one response could be scored.
    """
    notes = list(_notes(job))
    provenance = merged(notes)
    if provenance["guard_errors"] == provenance["responses"]:
        raise none_scored(provenance["guard"], provenance["responses"])
    write_card(job.folder, provenance)
    shutil.rmtree(job.begun, ignore_errors=True)
    job.folder.rename(job.output)
    # Last: shards without it could be taken for those of any run.
    (Path(job.output) / _JOB_FILE).unlink()
    return provenance


def _notes(job: Job) -> Iterator[dict[str, Any]]:
    for index in range(job.shards):
        note = shard_note(job.path(index))
        expected = min(job.shard_rows, job.rows - index * job.shard_rows)
        if note["rows"] != expected:
            raise DataError(
                f"{job.path(index)} has {note['rows']} rows instead of {expected}. Remove it and "
                "start the same run again."
            )
        yield note
