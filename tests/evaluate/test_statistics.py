"""Shares, their intervals, and differences of pairs."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from star_dss_plugin.evaluate import statistics
from star_dss_plugin.evaluate.statistics import bootstrap_share, paired_difference


@given(st.lists(st.booleans(), min_size=1, max_size=40), st.integers(0, 5))
@settings(max_examples=40, deadline=None)
def test_the_interval_equals_that_of_resampled_means(hits, seed):
    found = bootstrap_share(hits, resamples=300, seed=seed)
    draw = np.random.default_rng(seed)
    means = [
        np.mean([hits[i] for i in row]) for row in draw.integers(0, len(hits), (300, len(hits)))
    ]
    assert found.value == pytest.approx(np.mean(hits))
    assert (found.low, found.high) == pytest.approx(tuple(np.quantile(means, (0.025, 0.975))))
    assert found.low <= found.value + 1e-12
    assert found.count == len(hits)


def test_the_interval_has_its_nominal_coverage():
    draw = np.random.default_rng(0)
    covered = 0
    for i in range(300):
        found = bootstrap_share(list(draw.random(100) < 0.3), resamples=400, seed=i)
        covered += found.low <= 0.3 <= found.high
    assert 0.90 <= covered / 300 <= 0.98


@pytest.mark.parametrize("batch", [1, 7, 250, 299])
def test_batches_of_resamples_give_the_interval_of_a_single_draw(monkeypatch, batch):
    hits = [True, False, True] * 15
    whole = bootstrap_share(hits, resamples=300)
    monkeypatch.setattr(statistics, "_BATCH", batch)
    assert bootstrap_share(hits, resamples=300) == whole


def test_paired_differences_have_narrow_intervals():
    one = [i % 2 == 0 for i in range(60)]
    assert paired_difference(one, one) == paired_difference(one, one)
    same = paired_difference(one, one)
    assert (same.value, same.low, same.high) == (0, 0, 0)
    better = paired_difference([True] * 60, one)
    assert better.value == 0.5
    assert 0.3 < better.low < better.high < 0.7
