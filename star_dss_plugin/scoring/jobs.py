"""Plan a run over shards, resume it, and merge its shards.

A job is the description of a run that all workers share. It is stored as JSON next to the shards,
so that a command with other settings is rejected instead of mixing shards of two runs.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from star_dss_plugin.data.columns import SCORES_COLUMN
from star_dss_plugin.data.files.parquet_shards import DATA, shard_name, shard_note, write_card
from star_dss_plugin.data.fingerprints import dataset_hash, tokenizer_hash
from star_dss_plugin.data.reading import read_dataset
from star_dss_plugin.data.writing import write_text
from star_dss_plugin.errors import ConfigError, DataError
from star_dss_plugin.guards.probing.guard import make_probing
from star_dss_plugin.models.loading import load_tokenizer
from star_dss_plugin.options import ScoringOptions
from star_dss_plugin.scoring.cached_trajectories import none_scored_error
from star_dss_plugin.scoring.guard_statistics import merge_provenance
from star_dss_plugin.scoring.scorer import guard_of, versions
from star_dss_plugin.validation import at_least

__all__ = ["Job", "begin", "finish"]

_JOB_FILE = "job.json"


@dataclass(frozen=True)
class Job:
    """Hold everything that a worker needs to score a shard, as JSON values.

    Attributes:
        data: The source for `read_dataset`.
        split: The split to read.
        tokenizer: Id or folder of the model to be trained.
        output: The folder to create.
        rows: The number of rows in the data.
        shard_rows: Rows of every shard but the last.
        content: A hash of all rows, by which a worker, or a resumed run, detects other data.
        tokens: A hash of the tokenizer and its template, by which a worker detects other ones.
        guard: The guard's identity.
        options: The fields of `ScoringOptions`, without `score_cache_dir`.
        per_guard: Whether each guard of an ensemble gets a column.
        max_length: Rows are truncated to this many tokens; None: they are not.
        assistant_only_loss: Whether only text within `{% generation %}` is trained.
        chat_template: The template of raw rows; None: the tokenizer's own.
        num_proc: Processes that render and tokenize the rows of a shard.
        versions: Versions of the packages on which scores depend.
    """

    data: str
    split: str
    tokenizer: str
    output: str
    rows: int
    shard_rows: int
    content: str
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
        """The folder that collects shards until the run is complete."""
        return Path(f"{self.output}.incomplete")

    @property
    def shard_caches(self) -> Path:
        """The folder with the caches of unfinished shards."""
        return self.folder / "begun"

    @property
    def shards(self) -> int:
        """The number of shards."""
        return -(-self.rows // self.shard_rows)

    @property
    def uses_probe(self) -> bool:
        """Whether all shards use a probe, which the worker with the first shard fits."""
        return bool(self.options["trajectory"] == "probed")

    def path(self, index: int) -> Path:
        """Return the path of a shard's file."""
        return self.folder / DATA / shard_name(index, self.shards)

    def missing(self) -> list[int]:
        """Return the indices of the shards that do not exist yet."""
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
    """Plan a run, or resume the run that was begun with the same output.

    Args:
        data: The source for `read_dataset`; every worker reads it itself.
        tokenizer: Id or folder of the model to be trained.
        output: The folder to create; until the run is complete its name is `<output>.incomplete`.
        options: Scoring options, or None to give them by name. `score_cache_dir` must not be set,
            because each unfinished shard has its own cache.
        split: The split to read.
        shard_rows: Rows per shard, at least 1.
        per_guard: Whether to add a column for each guard of an ensemble.
        max_length: Rows are truncated to this many tokens before they are scored.
        assistant_only_loss: As for `score_dataset`.
        chat_template: As for `score_dataset`.
        num_proc: As for `score_dataset`.
        **changes: Options of `ScoringOptions` by name.

    Raises:
        StarDSSError: The run is not possible, or another run was begun with this output.
    """
    if output.exists():
        raise ConfigError(f"{output} exists. Name a new folder, or remove it first.")
    options = (options or ScoringOptions()).scoring(**changes)
    if options.score_cache_dir is not None:
        raise ConfigError(
            f"score_cache_dir is {options.score_cache_dir!r}, but each unfinished shard has a "
            "cache beside the output, and they share no cache. Leave it out."
        )
    at_least("shard_rows", shard_rows, 1, integer=True)
    dataset = read_dataset(data, split)
    if len(dataset) == 0:
        raise DataError(f"{data} has no rows, so there is nothing to score.")
    if SCORES_COLUMN in dataset.column_names:
        raise DataError(f"{data} already has a {SCORES_COLUMN!r} column. Remove it to score again.")
    tokens = tokenizer_hash(load_tokenizer(tokenizer))
    options.validate()
    guard = guard_of(options)
    if options.trajectory == "probed":
        make_probing(guard, options.probe_sample, options.probe_tolerance, 0.5)
    # Workers may run in other folders.
    data = str(Path(data).absolute()) if Path(data).exists() else data
    job = Job(
        data,
        split,
        tokenizer,
        str(output.absolute()),
        len(dataset),
        shard_rows,
        dataset_hash(dataset),
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
        free = {"num_proc"}  # a shard's contents do not depend on it
        if changed := [name for name in sorted(now.keys() - free) if before.get(name) != now[name]]:
            raise ConfigError(
                f"{job.folder} holds shards of another run: {', '.join(changed)} differ from "
                f"{known}. Start the command that began it, name another output, or remove the "
                "whole folder."
            )
    else:
        write_text(known, plan + "\n")
    return job


def finish(job: Job) -> dict[str, Any]:
    """Check the shards, write their merged provenance, and give the folder its final name.

    Returns:
        The provenance of all rows.

    Raises:
        DataError: A shard is missing or damaged, or no row has a response.
        GuardError: No response could be scored.
    """
    notes = list(_notes(job))
    provenance = merge_provenance(notes)
    if provenance["guard_errors"] == provenance["responses"]:
        raise none_scored_error(provenance["guard"], provenance["responses"])
    write_card(job.folder, provenance)
    shutil.rmtree(job.shard_caches, ignore_errors=True)
    job.folder.rename(job.output)
    # The job is removed last, because without it shards could be mistaken for another run's.
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
