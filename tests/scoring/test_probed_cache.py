"""Probed trajectories and the cache: later, killed and damaged runs."""

import shutil

import pytest
from support.probed import exact, probed, talks, trained
from transformers import AutoModelForCausalLM

from star_dss_plugin.data.columns import ASKED_COLUMN
from star_dss_plugin.guards.probing import guard as probing_guard
from star_dss_plugin.guards.verdict import VerdictGuard


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory, tokenizer, learnable_guard):
    """Return a run whose guard scores few responses at a time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(probing_guard, "_RESPONSES_PER_CALL", 16)
        folder = tmp_path_factory.mktemp("undisturbed")
        return probed(talks(), tokenizer, learnable_guard, score_cache_dir=str(folder))


def saved(dataset, folder):
    dataset.save_to_disk(folder)
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_a_second_run_loads_nothing_and_is_the_same_to_the_byte(
    tokenizer, learnable_guard, scored_twice, tmp_path, monkeypatch
):
    monkeypatch.setattr(
        AutoModelForCausalLM, "from_pretrained", lambda *_, **__: pytest.fail("weights were loaded")
    )
    two = probed(talks(), tokenizer, learnable_guard, score_cache_dir=str(scored_twice.cache))
    assert saved(scored_twice.probed, tmp_path / "one") == saved(two, tmp_path / "two")


@pytest.mark.parametrize(
    ("method", "calls"),
    # During the guard's scoring of the pool and of the sample, the fit, and the probe's scoring.
    [("trajectories", 0), ("trajectories", 1), ("trunk_states", 0), ("trunk_states", 2)],
)
def test_a_run_that_is_killed_ends_as_if_it_had_not_been(
    tokenizer, learnable_guard, whole_run, tmp_path, monkeypatch, method, calls
):
    monkeypatch.setattr(probing_guard, "_RESPONSES_PER_CALL", 16)
    again = {"score_cache_dir": str(tmp_path / "b")}
    own, made = getattr(VerdictGuard, method), []

    def dies(self, *args):
        made.append(args)
        if len(made) > calls:
            raise KeyboardInterrupt
        return own(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(VerdictGuard, method, dies)
        with pytest.raises(KeyboardInterrupt):
            probed(talks(), tokenizer, learnable_guard, **again)
    resumed = probed(talks(), tokenizer, learnable_guard, **again)
    assert saved(whole_run, tmp_path / "one") == saved(resumed, tmp_path / "two")


@pytest.mark.parametrize("damage", [lambda _: b"", lambda _: b"[1, 2]", lambda whole: whole[:-40]])
def test_a_probe_that_is_damaged_is_fitted_again(
    tokenizer, learnable_guard, scored_twice, tmp_path, caplog, damage
):
    folder = shutil.copytree(scored_twice.cache, tmp_path / "cache")
    [path] = [path for path in folder.glob("*/*.json") if path.name != "namespace.json"]
    path.write_bytes(damage(path.read_bytes()))
    other = probed(talks(), tokenizer, learnable_guard, score_cache_dir=str(folder))
    assert "it is fitted again" in caplog.text
    assert scored_twice.probed.to_list() == other.to_list()


def test_exact_runs_take_no_probed_scores(tokenizer, learnable_guard, scored_twice, tmp_path):
    folder = shutil.copytree(scored_twice.cache, tmp_path / "cache")
    after = exact(talks(), tokenizer, learnable_guard, score_cache_dir=str(folder))
    assert trained(after) == pytest.approx(trained(scored_twice.exact), abs=1e-6)
    assert ASKED_COLUMN not in after.column_names


def test_another_tolerance_is_another_score(tokenizer, learnable_guard, scored_twice, tmp_path):
    cache = {"score_cache_dir": str(shutil.copytree(scored_twice.cache, tmp_path / "cache"))}
    other = probed(talks(), tokenizer, learnable_guard, probe_tolerance=0.03, **cache)
    more, fewer = (trained(found, ASKED_COLUMN).mean() for found in (other, scored_twice.probed))
    assert more > fewer
