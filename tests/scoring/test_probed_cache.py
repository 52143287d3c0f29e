"""Probed trajectories and the cache: later, killed and damaged runs."""

import shutil

import pytest
from support.probed import exact, probed, talks, trained
from support.scoring import saved_bytes
from transformers import AutoModelForCausalLM

from star_dss_plugin.data.columns import ASKED_COLUMN
from star_dss_plugin.guards.probing import guard as probing_guard
from star_dss_plugin.guards.verdict import VerdictGuard


@pytest.fixture(scope="module")
def uninterrupted_run(tmp_path_factory, tokenizer, learnable_guard):
    """Return a run whose guard scores 16 responses per call."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(probing_guard, "_RESPONSES_PER_CALL", 16)
        folder = tmp_path_factory.mktemp("uninterrupted")
        return probed(talks(), tokenizer, learnable_guard, score_cache_dir=str(folder))


def test_a_second_run_loads_no_weights_and_writes_the_same_bytes(
    tokenizer, learnable_guard, scored_twice, tmp_path, monkeypatch
):
    monkeypatch.setattr(
        AutoModelForCausalLM, "from_pretrained", lambda *_, **__: pytest.fail("weights were loaded")
    )
    two = probed(talks(), tokenizer, learnable_guard, score_cache_dir=str(scored_twice.cache))
    assert saved_bytes(scored_twice.probed, tmp_path / "one") == saved_bytes(two, tmp_path / "two")


@pytest.mark.parametrize(
    ("method", "calls"),
    # During the guard's scoring of the pool and of the sample, the fit, and the probe's scoring.
    [("trajectories", 0), ("trajectories", 1), ("trunk_states", 0), ("trunk_states", 2)],
)
def test_a_resumed_run_equals_an_uninterrupted_one(
    tokenizer, learnable_guard, uninterrupted_run, tmp_path, monkeypatch, method, calls
):
    monkeypatch.setattr(probing_guard, "_RESPONSES_PER_CALL", 16)
    again = {"score_cache_dir": str(tmp_path / "b")}
    method_of_guard, calls_so_far = getattr(VerdictGuard, method), []

    def fail(self, *args):
        calls_so_far.append(args)
        if len(calls_so_far) > calls:
            raise KeyboardInterrupt
        return method_of_guard(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(VerdictGuard, method, fail)
        with pytest.raises(KeyboardInterrupt):
            probed(talks(), tokenizer, learnable_guard, **again)
    resumed = probed(talks(), tokenizer, learnable_guard, **again)
    assert saved_bytes(uninterrupted_run, tmp_path / "one") == saved_bytes(
        resumed, tmp_path / "two"
    )


@pytest.mark.parametrize("damage", [lambda _: b"", lambda _: b"[1, 2]", lambda whole: whole[:-40]])
def test_a_damaged_probe_is_fitted_again(
    tokenizer, learnable_guard, scored_twice, tmp_path, caplog, damage
):
    folder = shutil.copytree(scored_twice.cache, tmp_path / "cache")
    [path] = [path for path in folder.glob("*/*.json") if path.name != "namespace.json"]
    path.write_bytes(damage(path.read_bytes()))
    other = probed(talks(), tokenizer, learnable_guard, score_cache_dir=str(folder))
    assert "it is fitted again" in caplog.text
    assert scored_twice.probed.to_list() == other.to_list()


def test_exact_runs_use_no_probed_scores(tokenizer, learnable_guard, scored_twice, tmp_path):
    folder = shutil.copytree(scored_twice.cache, tmp_path / "cache")
    after = exact(talks(), tokenizer, learnable_guard, score_cache_dir=str(folder))
    assert trained(after) == pytest.approx(trained(scored_twice.exact), abs=1e-6)
    assert ASKED_COLUMN not in after.column_names


def test_a_smaller_tolerance_asks_more_prefixes(tokenizer, learnable_guard, scored_twice, tmp_path):
    cache = {"score_cache_dir": str(shutil.copytree(scored_twice.cache, tmp_path / "cache"))}
    other = probed(talks(), tokenizer, learnable_guard, probe_tolerance=0.03, **cache)
    more, fewer = (trained(found, ASKED_COLUMN).mean() for found in (other, scored_twice.probed))
    assert more > fewer
