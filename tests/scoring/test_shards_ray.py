"""Shards on Ray: the same files, also if workers or the driver are killed."""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from types import SimpleNamespace

import pytest
from support import ray_words
from support.paths import ROOT
from support.probed import PROBED, learnable, talks
from support.shards import ROWS, SHARD_ROWS, SHARDS, asked, begin, contents, in_one_process

from star_dss_plugin import ConfigError, GuardError
from star_dss_plugin.scoring import jobs, shards

pytestmark = pytest.mark.slow


@pytest.fixture(scope="session")
def ray_cluster(tmp_path_factory):
    """Start a cluster of two CPUs whose workers have the test guard as an installed plugin."""
    ray = pytest.importorskip("ray", reason="needs Ray (pip install 'star-dss-plugin[ray]')")
    site = plugin_site(tmp_path_factory.mktemp("site"))
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = search_path(site)
    # Paths of sockets have at most 107 characters; pytest's folders may be longer.
    folder = tempfile.mkdtemp(prefix="ray-")
    ray.init(
        address="local",
        num_cpus=2,
        include_dashboard=False,
        _temp_dir=folder,
        logging_level="warning",
    )
    yield
    ray.shutdown()
    shutil.rmtree(folder, ignore_errors=True)
    os.environ.pop("PYTHONPATH")
    if before is not None:
        os.environ["PYTHONPATH"] = before


def plugin_site(folder):
    """Write the test guard as pip would install it."""
    shutil.copy(ray_words.__file__, folder)
    info = folder / "star_dss_letters-0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: star-dss-letters\nVersion: 0\n")
    (info / "entry_points.txt").write_text("[star_dss]\nletters = ray_words\n")
    return folder


def search_path(site):
    """Return a new process's PYTHONPATH: the plugin, and this package."""
    known = [site, ROOT, ROOT / "integrations", os.environ.get("PYTHONPATH", "")]
    return os.pathsep.join(map(str, filter(None, known)))


@pytest.mark.parametrize("workers", [1, 2])
def test_ray_makes_the_same_files(ray_cluster, data, model_dir, tmp_path, log, workers):
    """With any number of workers, also if one of two is killed."""
    from star_dss_plugin.scoring.on_ray import score_on_ray

    in_one_process(data, model_dir, tmp_path / "one", log)
    shutil.rmtree(log)
    log.mkdir()
    deadly = {"die_at": "it is 17" if workers == 2 else ""}
    job = begin(data, model_dir, tmp_path / "out", log, guard_options=deadly)
    score_on_ray(job, num_workers=workers, progress=False)
    jobs.finish(job)
    assert contents(tmp_path / "out") == contents(tmp_path / "one")
    assert (log / "died").exists() == (workers == 2)
    # Each worker loads its guard once; Ray decides how many shards each one scores.
    assert 1 <= len(asked(log)) <= workers + (workers == 2)
    assert {text for texts in asked(log) for text in texts} == {f"it is {i}" for i in range(ROWS)}


def test_a_shard_whose_workers_all_died_is_an_error(data, model_dir, tmp_path, log):
    from star_dss_plugin.scoring.on_ray import _Worker

    job = begin(data, model_dir, tmp_path / "out", log)
    job.shard_caches.mkdir()
    (job.shard_caches / "00002.tries").write_text(".....")
    worker = _Worker(dataclasses.asdict(job))
    assert worker({"shard": 1}) == {"kind": "", "error": ""}
    found = worker({"shard": 2})
    assert found["kind"] == "GuardError"
    assert "5 workers have died on shard 2 (rows 10 and on)" in found["error"]


def test_all_workers_use_the_same_probe(ray_cluster, tokenizer, tmp_path):
    from star_dss_plugin.scoring.on_ray import score_on_ray

    guard = learnable(tmp_path / "guard", tokenizer)
    talks().to_json(tmp_path / "talks.jsonl")
    planned = [
        jobs.begin(
            str(tmp_path / "talks.jsonl"),
            guard["model"],
            tmp_path / name,
            guard=guard,
            shard_rows=20,
            **PROBED,
        )
        for name in ("one", "out")
    ]
    shards.score_shards(planned[0], progress=False)
    score_on_ray(planned[1], num_workers=2, progress=False)
    assert [jobs.finish(job)["probes"][0]["fell_back"] for job in planned] == [None, None]
    assert contents(tmp_path / "out") == contents(tmp_path / "one")


def test_an_error_of_a_worker_is_raised_with_its_row(ray_cluster, data, model_dir, tmp_path, log):
    from star_dss_plugin.scoring.on_ray import score_on_ray

    job = begin(data, model_dir, tmp_path / "out", log, guard_options={"refuse": "it is 12"})
    with pytest.raises(GuardError, match="^Row 12: not this one$"):
        score_on_ray(job, num_workers=1, progress=False)


@pytest.mark.parametrize(
    ("guard", "gpus"),
    [
        ({"kind": "words"}, 1.0),
        ({"engine": {"kind": "vllm", "options": {}}}, 1.0),
        ({"engine": {"kind": "server", "model": "x"}}, 0.0),
        ({"kind": "calibrated", "guards": [{"engine": {"kind": "server"}}]}, 0.0),
        ({"guards": [{"engine": {"kind": "server"}}, {"kind": "words"}]}, 1.0),
    ],
)
def test_a_worker_takes_a_gpu_unless_servers_compute(guard, gpus):
    from star_dss_plugin.scoring.on_ray import _gpus

    cluster = SimpleNamespace(cluster_resources=lambda: {"GPU": 4.0})
    job = SimpleNamespace(guard=guard, options={})
    assert _gpus(cluster, job, None) == gpus
    assert _gpus(cluster, job, 0.5) == 0.5


def test_a_missing_ray_is_named_with_its_extra(data, model_dir, tmp_path, log, monkeypatch):
    from star_dss_plugin.scoring.on_ray import score_on_ray

    monkeypatch.setitem(sys.modules, "ray", None)
    job = begin(data, model_dir, tmp_path / "out", log)
    with pytest.raises(ConfigError, match=r"pip install 'star-dss-plugin\[ray\]'"):
        score_on_ray(job, num_workers=1)


def test_a_killed_driver_can_be_started_again(data, model_dir, tmp_path, log):
    """`star-dss score --ray` is killed halfway; the same command then finishes the job."""
    pytest.importorskip("ray", reason="needs Ray (pip install 'star-dss-plugin[ray]')")
    in_one_process(data, model_dir, tmp_path / "one", log)
    shutil.rmtree(log)
    log.mkdir()
    (tmp_path / "site").mkdir()
    site = plugin_site(tmp_path / "site")
    guard = {"preset": "test-letters", "log": str(log), "delay": 0.5}
    command = [
        sys.executable,
        "-c",
        "from star_dss_plugin.cli.app import main; main()",
        "score",
        str(data),
        "--ray",
        "--num-workers",
        "2",
        "--shard-rows",
        str(SHARD_ROWS),
        "--tokenizer",
        str(model_dir),
        "-o",
        str(tmp_path / "out"),
        "--chunk-size",
        "2",
        "-q",
        "--guard",
        json.dumps(guard),
    ]
    environment = {**os.environ, "PYTHONPATH": search_path(site)}
    driver = subprocess.Popen(command, env=environment, start_new_session=True)
    made = tmp_path / "out.incomplete" / "data"
    deadline = time.monotonic() + 600
    while len(list(made.glob("train-*.parquet"))) < 2:
        assert driver.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.killpg(driver.pid, signal.SIGKILL)
    driver.wait()
    kept = {path.name: path.stat().st_mtime_ns for path in made.glob("train-*.parquet")}
    assert len(kept) < SHARDS
    subprocess.run(command, env=environment, check=True, timeout=600)
    again = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out" / "data").iterdir()}
    assert kept.items() <= again.items()
    assert contents(tmp_path / "out") == contents(tmp_path / "one")
