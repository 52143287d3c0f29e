"""A small job of shards, and the responses that its guard scored."""

from star_dss_plugin.scoring import jobs, shards

ROWS, SHARD_ROWS, SHARDS = 33, 5, 7


def asked(log):
    """Return the responses that the guard was asked to score, by worker."""
    return [path.read_text().splitlines() for path in sorted(log.glob("worker-*"))]


def begin(data, model_dir, output, log, **changes):
    """Begin a job whose guard records in `log` what it scores."""
    options = {"shard_rows": SHARD_ROWS, "chunk_size": 2, **changes}
    guard = {"preset": "test-letters", "log": str(log), **options.pop("guard_options", {})}
    return jobs.begin(str(data), str(model_dir), output, guard=guard, **options)


def in_one_process(data, model_dir, output, log, **changes):
    """Score all shards of a job in this process, and finish it."""
    job = begin(data, model_dir, output, log, **changes)
    shards.score_shards(job, progress=False)
    return jobs.finish(job)


def contents(folder):
    """Return the bytes of each file in a folder, by name."""
    return {p.name: p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
