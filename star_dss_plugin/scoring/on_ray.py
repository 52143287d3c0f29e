"""Score the shards of a job on a Ray cluster (Ray Data, one actor per worker).

Ray assigns shards to workers, restarts workers that die, and reassigns their shards. The contents
of a shard do not depend on that (see `shards.py`).
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from star_dss_plugin import errors
from star_dss_plugin.data.writing import writing
from star_dss_plugin.errors import ConfigError, GuardError, PluginError, StarDSSError
from star_dss_plugin.scoring.jobs import Job
from star_dss_plugin.scoring.shards import ShardScorer, progress_bar
from star_dss_plugin.validation import at_least, require

__all__ = ["score_on_ray"]

_TRIES = 5
"""How many workers may die on a shard; Ray itself would retry for ever."""


class _Worker:
    """Score shards on the cluster with a guard that is loaded once."""

    def __init__(self, job: Mapping[str, Any]) -> None:
        self._job = Job(**job)
        self._score = ShardScorer(self._job)

    def __call__(self, row: Mapping[str, Any]) -> dict[str, Any]:
        shard = int(row["shard"])
        try:
            _count_try(self._job, shard)
            self._score(shard)
        except StarDSSError as error:  # returned as text, for the driver to raise again
            return {"kind": type(error).__name__, "error": str(error)}
        return {"kind": "", "error": ""}


def score_on_ray(
    job: Job,
    *,
    num_workers: int,
    address: str | None = None,
    gpus_per_worker: float | None = None,
    progress: bool = True,
) -> None:
    """Score the missing shards of a job on a cluster.

    Args:
        job: From `jobs.begin`; all machines must see its data and output at the same paths.
        num_workers: The number of workers, at least 1; each takes one CPU.
        address: The cluster's address ("auto": the cluster of this machine); None starts a cluster
            on this machine and stops it afterwards. Ignored if this process is connected already.
        gpus_per_worker: GPUs per worker; None: one if the cluster has any and the guard does not
            run on a server, else none.
        progress: Whether to show a progress bar.

    Raises:
        StarDSSError: Ray is missing or cannot be reached, or a worker's error.
    """
    at_least("num_workers", num_workers, 1, integer=True)
    for module in ("ray", "ray.data"):
        require(module, "ray", "Scoring on a cluster", load=True)
    import ray
    import ray.data

    todo = job.missing()
    if not todo:
        return
    for tries in job.shard_caches.glob("*.tries"):
        tries.unlink()
    own = not ray.is_initialized()
    if own:
        _connect(ray, address, num_workers)
    try:
        gpus = _gpus(ray, job, gpus_per_worker)
        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False
        # The worker with the first shard fits the probe that all shards use.
        rounds = [todo[:1], todo[1:]] if job.uses_probe else [todo]
        with progress_bar(job, progress) as advance:
            for shards in filter(None, rounds):
                # One block per shard, because Ray assigns blocks to workers.
                items = [{"shard": i} for i in shards]
                rows = ray.data.from_items(items, override_num_blocks=len(items))
                done = rows.map(
                    _Worker,
                    fn_constructor_args=(asdict(job),),
                    compute=ray.data.ActorPoolStrategy(
                        size=min(num_workers, len(items)), max_tasks_in_flight_per_actor=1
                    ),
                    num_cpus=1,
                    num_gpus=gpus,
                )
                for result in done.iter_rows():
                    if result["kind"]:
                        # An error class of a plugin is raised as StarDSSError.
                        raise getattr(errors, result["kind"], StarDSSError)(result["error"])
                    advance.update()
    except ray.exceptions.RayError as error:
        raise PluginError(
            f"Ray gave up: {error}. What is scored stays in {job.folder}: start the same command "
            "again, with smaller shards (--shard-rows) if workers ran out of memory."
        ) from error
    finally:
        if own:
            ray.shutdown()


def _count_try(job: Job, shard: int) -> None:
    """Count on disk how often workers began a shard, because a worker that dies cannot report."""
    with writing(job.shard_caches):
        job.shard_caches.mkdir(exist_ok=True)
        with (job.shard_caches / f"{shard:05d}.tries").open("a") as file:
            file.write(".")
            tries = file.tell()
    if tries > _TRIES:
        raise GuardError(
            f"{_TRIES} workers have died on shard {shard} (rows {shard * job.shard_rows} and on). "
            "If they ran out of memory, lower score_batch_tokens or --shard-rows; Ray's own "
            "messages are above. What is scored stays."
        )


def _connect(ray: Any, address: str | None, num_workers: int) -> None:
    # Ray sends usage statistics unless this variable is set.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    local = {} if address else {"num_cpus": num_workers, "include_dashboard": False}
    try:
        ray.init(address=address or "local", logging_level="warning", **local)
    except (ConnectionError, RuntimeError, ValueError, OSError) as error:
        raise ConfigError(
            f"Ray at {address or 'this machine'} cannot be used: {error}. Give --address auto on a "
            "machine of the cluster, ray://host:10001 from elsewhere, or none for this machine."
        ) from error


def _gpus(ray: Any, job: Job, wanted: float | None) -> float:
    """Return the GPUs per worker. A worker with 0 sees no GPU and computes on its CPU."""
    if wanted is not None:
        return wanted
    return 1.0 if ray.cluster_resources().get("GPU", 0) and not _served(job.guard) else 0.0


def _served(identity: Mapping[str, Any]) -> bool:
    """Return whether a guard, or every guard of an ensemble, runs on a server."""
    if "guards" in identity:
        return all(map(_served, identity["guards"]))
    engine = identity.get("engine")
    return isinstance(engine, Mapping) and engine.get("kind") == "server"
