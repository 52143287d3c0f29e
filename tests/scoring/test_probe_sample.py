"""The sample that a probe is fitted to: which responses and prefixes, and what they cost."""

import numpy as np
import pytest
from support.probed import probed, talks

from star_dss_plugin import GuardError, provenance_of
from star_dss_plugin.guards.verdict import VerdictGuard
from star_dss_plugin.scoring.probed import (
    POOL,
    STRIDE,
    prefixes_to_score,
    pseudo_random_order,
    stratified,
)


def test_the_sample_has_all_kinds_of_responses_with_weights():
    scores = {f"s{i}": 0.99 for i in range(90)} | {f"u{i}": 0.01 for i in range(6)}
    scores |= {f"m{i}": 0.5 for i in range(4)}
    weights = stratified(scores, 20)
    assert len(weights) == 20
    kinds = {kind: [w for key, w in weights.items() if key[0] == kind] for kind in "sum"}
    assert [len(kinds[kind]) for kind in "sum"] == [10, 6, 4]
    assert kinds == {"s": [9.0] * 10, "u": [1.0] * 6, "m": [1.0] * 4}
    assert sum(weights.values()) == pytest.approx(len(scores))
    assert list(weights) == [key for key in scores if key in weights]
    assert stratified(scores, 1000) == dict.fromkeys(scores, 1.0)


def test_the_drawn_order_depends_only_on_the_contents():
    keys = {f"{i}": None for i in range(100)}
    assert pseudo_random_order(keys) == pseudo_random_order(dict(reversed(keys.items())))
    assert pseudo_random_order(keys) != list(keys)
    few = {key: None for key in keys if int(key) % 2}
    assert pseudo_random_order(few) == [key for key in pseudo_random_order(keys) if key in few]


def test_every_prefix_is_sampled_equally_often():
    found = [prefixes_to_score(f"{i}", 10) for i in range(4000)]
    counts = np.bincount(np.concatenate(found), minlength=10)
    assert counts == pytest.approx(np.full(10, 4000 / STRIDE), rel=0.12)
    assert found == [prefixes_to_score(f"{i}", 10) for i in range(4000)]
    assert all(len(prefixes_to_score(f"{i}", count)) > 0 for i in range(50) for count in (1, 2, 3))


def test_the_sample_scores_last_prefixes_and_every_fourth_one(
    tokenizer, learnable_guard, monkeypatch
):
    """The guard scores each pool response's last prefix and every fourth prefix of the sample."""
    trajectories, requested = VerdictGuard.trajectories, []
    monkeypatch.setattr(
        VerdictGuard,
        "trajectories",
        lambda self, requests: requested.extend(requests) or trajectories(self, requests),
    )
    probed(talks(), tokenizer, learnable_guard)
    scored = [request for request in requested if request.text != "a"]
    last_prefixes, sampled = scored[: POOL * 30], scored[POOL * 30 :]
    assert all(request.ends == (len(request.text),) for request in last_prefixes)
    for request in sampled[:30]:
        assert len(request.ends) <= -(-len(tokenizer(request.text)["input_ids"]) // STRIDE) + 1


def test_responses_that_fail_are_left_out_of_the_sample(tokenizer, learnable_guard, monkeypatch):
    trajectories, requested = VerdictGuard.trajectories, []

    def fail_on_foxes(self, requests):
        for index, request in enumerate(requests):
            if request.text.startswith("fox"):
                requested.append(request)
                raise GuardError("no foxes", request=index)
        return trajectories(self, requests)

    monkeypatch.setattr(VerdictGuard, "trajectories", fail_on_foxes)
    with pytest.raises(GuardError, match="no foxes"):
        probed(talks(), tokenizer, learnable_guard)
    found = probed(talks(), tokenizer, learnable_guard, on_guard_error="unsafe")
    assert requested
    assert provenance_of(found)["probes"][0]["fell_back"] is None
