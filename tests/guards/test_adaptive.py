"""Adaptive trajectories: which prefixes are scored or interpolated, and the largest error."""

from itertools import pairwise

import pytest
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st

from star_dss_plugin import score_dataset
from star_dss_plugin.data.provenance import provenance_of
from star_dss_plugin.data.requests import PrefixRequest, Trajectory
from star_dss_plugin.errors import ConfigError, GuardError
from star_dss_plugin.guards.adaptive import STRIDE, AdaptiveGuard, make_adaptive
from star_dss_plugin.guards.base import Guard, StreamingGuard


class Recorded(Guard):
    """Return listed scores, for prefixes that end at 1, 2, 3, … characters."""

    name = "recorded"
    identity = {"guard": "recorded"}

    def __init__(self, *trajectories, mass=None):
        self.trajectory_of = dict(enumerate(trajectories))
        self.mass, self.asked = mass, []

    def trajectories(self, requests):
        found = []
        for request in requests:
            scores = self.trajectory_of[int(request.context[0]["content"])]
            self.asked += [(int(request.context[0]["content"]), end) for end in request.ends]
            picked = tuple(scores[end - 1] for end in request.ends)
            mass = None if self.mass is None else (self.mass,) * len(picked)
            found.append(Trajectory(picked, mass))
        return found


def request(number, length):
    context = ({"role": "user", "content": str(number)},)
    return PrefixRequest(context, "x" * length, tuple(range(1, length + 1)))


def test_a_safe_response_is_scored_at_every_eighth_prefix():
    inner = Recorded([0.99] * 33)
    guard = AdaptiveGuard(inner)
    [found] = guard.trajectories([request(0, 33)])
    assert inner.asked == [(0, 1), (0, 9), (0, 17), (0, 25), (0, 33)]
    assert found.scores == pytest.approx([0.99] * 33)
    assert (guard.asked, guard.wanted) == (5, 33)


def test_every_prefix_after_a_fall_of_the_score_is_scored():
    scores = [0.99] * 13 + [0.3, 0.2, 0.1] * 9
    inner = Recorded(scores)
    [found] = AdaptiveGuard(inner).trajectories([request(0, 40)])
    assert found.scores == pytest.approx(scores)
    assert len(inner.asked) == len(set(inner.asked)) < 40 - 4  # no prefix twice


def test_interpolates_over_characters():
    inner = Recorded([1.0, 1, 1, 1, 1, 1, 1, 1, 1, 0.99])
    uneven = PrefixRequest(request(0, 10).context, "x" * 10, (1, 2, 3, 4, 5, 6, 8, 10))
    scores = AdaptiveGuard(inner, 0.02).trajectories([uneven])[0].scores
    assert scores == pytest.approx([1 - 0.01 * (end - 1) / 9 for end in uneven.ends])


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    st.lists(
        st.lists(st.sampled_from([0.0, 0.5, 0.97, 0.985, 1.0]), min_size=1, max_size=40),
        min_size=1,
        max_size=4,
    ),
    st.sampled_from([0.0, 0.02, 0.6, 1.0]),
)
def test_asked_prefixes_are_exact_and_the_others_lie_near_one(trajectories, epsilon):
    inner = Recorded(*trajectories, mass=0.9)
    guard = AdaptiveGuard(inner, epsilon)
    requests = [request(i, len(t)) for i, t in enumerate(trajectories)]
    found = guard.trajectories(requests)
    asked = set(inner.asked)
    assert len(asked) == len(inner.asked) == guard.asked
    for i, (exact, got) in enumerate(zip(trajectories, found, strict=True)):
        assert got.label_mass == pytest.approx([0.9] * len(exact))
        for k, (a, b) in enumerate(zip(exact, got.scores, strict=True)):
            if (i, k + 1) in asked:
                assert a == b
            else:
                assert b >= 1 - epsilon
        # Every unsettled interval was split to its end.
        known = [k for k in range(len(exact)) if (i, k + 1) in asked]
        assert known[0] == 0
        assert known[-1] == len(exact) - 1
        for a, b in pairwise(known):
            settled = min(exact[a], exact[b]) >= 1 - epsilon
            assert b - a == 1 or (settled and b - a <= STRIDE)


def test_with_epsilon_zero_only_runs_of_ones_are_skipped():
    scores = [1.0] * 20 + [0.999] * 20
    [found] = AdaptiveGuard(Recorded(scores), 0.0).trajectories([request(0, 40)])
    assert found.scores == pytest.approx(scores)


def test_an_error_names_the_response_it_is_about():
    class Failing(Recorded):
        def trajectories(self, requests):
            for index, asked in enumerate(requests):
                if asked.context[0]["content"] == "1" and 5 in asked.ends:
                    raise GuardError("no", request=index)
            return super().trajectories(requests)

    guard = AdaptiveGuard(Failing([1.0] * 9, [0.0] * 9))
    with pytest.raises(GuardError) as error:
        guard.trajectories([request(0, 9), request(1, 9)])
    assert error.value.request == 1


def test_a_streaming_guard_is_returned_unchanged():
    class Streaming(StreamingGuard):
        name, identity = "streaming", {}

        def token_scores(self, responses):
            raise AssertionError

    guard = Streaming()
    assert make_adaptive(guard, 0.02) is guard
    assert isinstance(make_adaptive(Recorded([1.0]), 0.02), AdaptiveGuard)


def test_the_provenance_and_the_cache_know_adaptive_scores(tokenizer, tmp_path):
    rows = [
        {
            "messages": [
                {"role": "user", "content": "0"},
                {"role": "assistant", "content": "yes " * 60},
            ]
        }
    ]

    class Counting(Recorded):
        def trajectories(self, requests):
            self.asked += [end for r in requests for end in r.ends]
            return [Trajectory((1.0,) * len(r.ends)) for r in requests]

    def score(**options):
        inner = Counting()
        scored = score_dataset(
            Dataset.from_list(rows),
            tokenizer,
            guard=inner,
            score_cache_dir=tmp_path,
            progress=False,
            **options,
        )
        return scored, len(inner.asked)

    exact, all_of_them = score()
    fewer, asked = score(trajectory="adaptive")
    assert 0 < asked < all_of_them / 4  # and nothing came from the exact run's cache
    assert fewer["star_scores"] == exact["star_scores"]
    assert "trajectory" in provenance_of(fewer)["guard_identity"]
    assert score(trajectory="adaptive")[1] == 0
    assert score(trajectory="adaptive", trajectory_epsilon=0.1)[1] == asked
    with pytest.raises(ConfigError, match="adaptive"):
        score(trajectory="adaptve")


@pytest.mark.parametrize(
    "wrong",
    [
        lambda scores: [*scores[:-1], float("nan")],
        lambda scores: [*scores[:-1], 1.5],
        lambda scores: scores[:1],
        lambda scores: [*scores, 1.0],
    ],
    ids=["nan", "no probability", "too few", "too many"],
)
def test_wrong_scores_of_a_guard_are_errors_and_not_interpolated(wrong):
    class Wrong(Recorded):
        def trajectories(self, requests):
            return [Trajectory(tuple(wrong([0.99] * len(r.ends)))) for r in requests]

    with pytest.raises(GuardError, match="one probability in"):
        AdaptiveGuard(Wrong()).trajectories([request(0, 33)])


def test_a_missing_trajectory_is_an_error():
    class Lazy(Recorded):
        def trajectories(self, requests):
            return []

    with pytest.raises(GuardError, match="0 trajectories for 1"):
        AdaptiveGuard(Lazy()).trajectories([request(0, 33)])


@pytest.mark.parametrize("epsilon", [-0.1, 5.0, float("nan"), True, "0.02"])
def test_epsilon_must_be_a_probability(epsilon):
    with pytest.raises(ConfigError, match="trajectory_epsilon"):
        AdaptiveGuard(Recorded([1.0]), epsilon)
