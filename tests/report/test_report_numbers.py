"""The numbers of a report, and the colours of its scores."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.report_data import response

from star_dss_plugin.report import palette
from star_dss_plugin.report.summary import by_source, histogram, mean_trajectory, summarise


@given(
    st.lists(st.tuples(st.integers(1, 9), st.floats(0, 1)), min_size=1, max_size=12),
    st.floats(0, 1),
)
def test_a_responses_numbers_equal_those_of_its_tokens(runs, threshold):
    ends = np.cumsum([n for n, _ in runs])
    found = response(
        pieces=["x"] * len(runs), scores=[s for _, s in runs], token_ends=tuple(map(int, ends))
    )
    tokens = [s for n, s in runs for _ in range(n)]
    below = [s < threshold for s in tokens]
    assert found.tokens == len(tokens)
    assert found.lowest == min(tokens)
    assert found.mean == pytest.approx(np.mean(tokens))
    assert found.below(threshold) == sum(below)
    assert found.crossing(threshold) == (below.index(True) + 1 if any(below) else None)
    falls = [a - b for i, a in enumerate(tokens) for b in tokens[i:]]
    assert found.largest_fall == pytest.approx(max(falls))
    counts, _ = np.histogram(tokens, bins=20, range=(0, 1))
    assert sum(histogram([found])) == sum(counts)
    grid, mean = mean_trajectory([found])
    assert (mean[0], mean[-1]) == (tokens[0], tokens[-1])
    assert len(grid) == 41
    expected_mean = [tokens[max(-(-k * len(tokens) // 40), 1) - 1] for k in range(41)]
    np.testing.assert_allclose(mean, expected_mean)


def test_the_summary_counts_tokens():
    responses = [response(0, source="a"), response(1, source="b", scores=(1.0, 1.0)), response(2)]
    total = summarise(responses, 0.5)
    assert (total.responses, total.tokens, total.below, total.crossing) == (3, 30, 10, 2)
    assert total.mean == pytest.approx((0.9 + 0.2 + 1 + 1 + 0.9 + 0.2) / 6)
    assert [(g.name, g.share_below) for g in by_source(responses, 0.5)] == [("a", 0.5), ("b", 0.0)]


def test_the_colour_scale_is_legible_and_monotonic():
    for colours, ink in (
        (palette.LIGHT, palette.INK["light"]),
        (palette.DARK, palette.INK["dark"]),
    ):
        assert min(contrast(colour, ink) for colour in colours) >= 4.5
        steps = [luminance(c) for c in colours]
        assert steps == sorted(steps) or steps == sorted(steps, reverse=True)


def luminance(colour):
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return sum(w * p for w, p in zip((0.2126, 0.7152, 0.0722), linear))


def contrast(a, b):
    high, low = sorted((luminance(a), luminance(b)), reverse=True)
    return (high + 0.05) / (low + 0.05)
