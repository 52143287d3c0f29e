"""Probed trajectories of shards: one probe for a whole job."""

import pytest
from support.probed import PROBED, talks
from support.shards import contents
from support.verdict_guards import describe

from star_dss_plugin import ConfigError, GuardError
from star_dss_plugin.data.columns import ASKED_COLUMN
from star_dss_plugin.data.reading import read_dataset
from star_dss_plugin.guards.probing import guard as probing_guard
from star_dss_plugin.guards.verdict import VerdictGuard
from star_dss_plugin.options import StarDSSOptions
from star_dss_plugin.scoring import jobs, shards
from star_dss_plugin.training.preflight import check_options


@pytest.fixture
def data(tmp_path):
    """Return a file of talks."""
    path = tmp_path / "talks.jsonl"
    talks().to_json(path)
    return path


def begin_job(data, output, guard, model=None, **changes):
    """Begin a job of shards of 15 rows with a probe."""
    model = model or guard["model"]
    options = {**PROBED, "shard_rows": 15, **changes}
    return jobs.begin(str(data), model, output, guard=guard, **options)


def test_all_shards_use_one_probe(data, learnable_guard, tmp_path, monkeypatch):
    learned, learn = [], probing_guard.ProbingGuard.fit_probe
    monkeypatch.setattr(
        probing_guard.ProbingGuard,
        "fit_probe",
        lambda self, *args: learned.append(1) or learn(self, *args),
    )
    job = begin_job(data, tmp_path / "one", learnable_guard)
    shards.score_shards(job, progress=False)
    provenance = jobs.finish(job)
    assert len(learned) == 1
    [note] = provenance["probes"]
    assert note["fell_back"] is None
    found = read_dataset(str(tmp_path / "one"))
    marks = [m for row in found[ASKED_COLUMN] for m in row]
    assert False in marks
    assert provenance["probed_prefixes"] > 0
    # Another worker with another order of shards writes the same files.
    other = begin_job(data, tmp_path / "two", learnable_guard)
    for index in reversed(range(other.shards)):
        scorer = shards.ShardScorer(other)
        scorer(index)
        scorer.close()
    assert jobs.finish(other) == provenance
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def test_an_error_in_the_sample_names_its_row(
    data, learnable_guard, tmp_path, monkeypatch, tokenizer
):
    rows = read_dataset(str(data))
    failing = rows[37]["messages"][1]["content"]
    trajectories = VerdictGuard.trajectories

    def fail_on_one_row(self, requests):
        for index, request in enumerate(requests):
            if request.text == failing:
                raise GuardError("no", request=index)
        return trajectories(self, requests)

    monkeypatch.setattr(VerdictGuard, "trajectories", fail_on_one_row)
    job = begin_job(
        data, tmp_path / "out", learnable_guard, probe_sample=60
    )  # all rows are in the pool
    scorer = shards.ShardScorer(job)
    with pytest.raises(GuardError, match="Row 37"):
        scorer(1)


def test_a_guard_that_cannot_be_probed_is_refused_before_a_job_begins(data, model_dir, tmp_path):
    one, other = (describe(model_dir, prefill=prefill) for prefill in ("a:", "b:"))
    both = {"guards": [one, other], "calibration": {"temperature": 2.0, "threshold": 0.5}}
    with pytest.raises(ConfigError, match="Calibrate each guard by itself"):
        begin_job(data, tmp_path / "out", both, str(model_dir))
    found = check_options(StarDSSOptions(guard=both, trajectory="probed"))
    assert "Calibrate each guard by itself" in " ".join(found.problems)
    assert not (tmp_path / "out.incomplete").exists()
