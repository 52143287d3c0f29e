"""Score a data set in shards, for data that is too large for one process or one machine.

The data is split into consecutive shards of `shard_rows` rows. Each is scored on its own
(`score_dataset`) and written as one parquet file, whose bytes do not depend on which process wrote
it, when, or after how many failures. Existing shards are kept, so the same command resumes a killed
run. Each unfinished shard has its own cache.
"""

from __future__ import annotations

import json
import shutil
from functools import cached_property
from typing import Any

from datasets import Dataset
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from star_dss_plugin.data.columns import with_attention_mask
from star_dss_plugin.data.files.parquet_shards import write_shard
from star_dss_plugin.data.fingerprints import dataset_hash, tokenizer_hash
from star_dss_plugin.data.reading import read_dataset
from star_dss_plugin.errors import ConfigError, DataError, StarDSSError
from star_dss_plugin.guards.base import Guard
from star_dss_plugin.models.loading import load_tokenizer
from star_dss_plugin.options import ScoringOptions
from star_dss_plugin.scoring.jobs import Job
from star_dss_plugin.scoring.scorer import PoolRows, guard_of, pool_rows, score_dataset, versions

__all__ = ["ShardScorer", "progress_bar", "score_shards"]


class ShardScorer:
    """Score shards of a job, loading data, tokenizer and guard on the first call.

    Args:
        job: The job from `jobs.begin`.

    Raises:
        StarDSSError: A call failed; the error has the rows' indices in the whole data set.
    """

    def __init__(self, job: Job) -> None:
        self.job = job

    def __call__(self, index: int) -> None:
        """Score and write a shard, unless it exists."""
        job, path = self.job, self.job.path(index)
        if path.exists():
            return
        start = index * job.shard_rows
        stop = min(start + job.shard_rows, job.rows)
        begun = job.shard_caches / f"{index:05d}"
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
            # Row numbers in the error are relative to the shard.
            error.counted_from(start).at(rows=range(start, stop))
            raise
        write_shard(with_attention_mask(scored), path)
        shutil.rmtree(begun, ignore_errors=True)

    def _pool(self, start: int) -> PoolRows | None:
        """Return the rows of all shards from which the probe's sample is drawn, and their cache.

        The worker with the first shard fills the cache.
        """
        if not self.job.uses_probe:
            return None
        # Row numbers are relative to the shard, because error handling adds the shard's start.
        places = [row - start for row in self._pool_rows]
        return PoolRows(
            self._dataset.select(self._pool_rows), places, self.job.shard_caches / "probe"
        )

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
        if len(dataset) != self.job.rows or dataset_hash(dataset) != self.job.content:
            raise DataError(
                f"A worker finds other rows in {self.job.data} than the run was begun with. Put "
                "the data where every machine reads the same, and leave it as it is meanwhile."
            )
        return dataset

    @cached_property
    def _tokenizer(self) -> PreTrainedTokenizerBase:
        found = load_tokenizer(self.job.tokenizer)
        if tokenizer_hash(found) != self.job.tokens:
            raise ConfigError(
                f"A worker finds another tokenizer or chat template in {self.job.tokenizer} than "
                "the run was begun with. Give all machines the same files, and leave them as they "
                "are meanwhile."
            )
        return found

    @cached_property
    def _loaded_guard(self) -> Guard:
        guard = guard_of(ScoringOptions(**self.job.options))
        # Compared as JSON, in which the job was stored: tuples have become lists.
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
        with progress_bar(job, progress) as advance:
            for index in todo:
                scorer(index)
                advance.update()
    finally:
        scorer.close()


def progress_bar(job: Job, progress: bool) -> Any:
    """Return a progress bar over a job's shards, advanced by the existing ones."""
    return tqdm(
        total=job.shards,
        initial=job.shards - len(job.missing()),
        unit="shard",
        desc="STAR scores",
        disable=not progress,
        smoothing=0,
    )
