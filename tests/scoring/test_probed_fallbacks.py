"""Probed trajectories where no probe is used: the guard scores every prefix."""

import pytest
from support.guards import WordGuard
from support.probed import exact, learnable, probed, talks, trained

from star_dss_plugin import provenance_of
from star_dss_plugin.data.columns import ASKED_COLUMN
from star_dss_plugin.guards.probing import guard as probing_guard
from star_dss_plugin.scoring.guard_statistics import remarks


@pytest.fixture(scope="module")
def unlearnable_guard(tmp_path_factory, tokenizer):
    """Return a guard whose scores differ too much for a probe."""
    return learnable(tmp_path_factory.mktemp("unlearnable"), tokenizer, seed=0, spread=0.2)


def same_as_exact(found, tokenizer, guard, rows):
    """Return whether the guard scored every prefix, with the scores of an exact run."""
    expected = exact(rows, tokenizer, guard)
    return (trained(found) == trained(expected)).all() and trained(found, ASKED_COLUMN).all()


def test_the_guard_scores_all_prefixes_of_few_responses(tokenizer, learnable_guard, caplog):
    rows = talks(30)
    found = probed(rows, tokenizer, learnable_guard)
    assert "the data has 30 different responses, and probe_sample is 30" in caplog.text
    assert "every prefix is asked" in caplog.text
    assert same_as_exact(found, tokenizer, learnable_guard, rows)
    [note] = provenance_of(found)["probes"]
    assert "30 different responses" in note["fell_back"]
    assert provenance_of(found)["probed_prefixes"] == 0
    assert "was not used" in " ".join(remarks(provenance_of(found)))


def test_a_guard_with_unpredictable_scores_scores_all_prefixes(
    tokenizer, unlearnable_guard, caplog
):
    rows = talks(60)
    found = probed(rows, tokenizer, unlearnable_guard)
    assert "the probe is sure of no held-out response" in caplog.text
    assert same_as_exact(found, tokenizer, unlearnable_guard, rows)


def test_a_probe_below_the_promised_coverage_is_not_used(
    tokenizer, learnable_guard, caplog, monkeypatch
):
    check_bounds = probing_guard.check_bounds
    monkeypatch.setattr(
        probing_guard, "check_bounds", lambda *args: {**check_bounds(*args), "coverage": 0.9499}
    )
    rows = talks(60)
    found = probed(rows, tokenizer, learnable_guard)
    assert "only 95.0% of the probe's scores" in caplog.text
    assert "(promised: 95%)" in caplog.text
    assert same_as_exact(found, tokenizer, learnable_guard, rows)


def test_a_streaming_guard_has_no_probe(tokenizer):
    rows = talks(40)
    found = probed(rows, tokenizer, WordGuard())
    assert provenance_of(found)["probes"] == []
    assert (trained(found) == trained(exact(rows, tokenizer, WordGuard()))).all()
