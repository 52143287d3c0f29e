"""The sample that a probe is fitted to: which responses and prefixes, and what they cost."""

import numpy as np
import pytest
from support.probed import probed, talks

from star_dss_plugin import GuardError, provenance_of
from star_dss_plugin.guards.verdict import VerdictGuard
from star_dss_plugin.scoring.probed import POOL, STRIDE, drawn, places, stratified


def test_the_sample_takes_all_kinds_and_weighs_them(tokenizer):
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


def test_what_is_drawn_depends_on_contents_alone():
    keys = {f"{i}": None for i in range(100)}
    assert drawn(keys) == drawn(dict(reversed(keys.items())))
    assert drawn(keys) != list(keys)
    few = {key: None for key in keys if int(key) % 2}
    assert drawn(few) == [key for key in drawn(keys) if key in few]


def test_every_prefix_is_asked_as_often_as_any_other():
    found = [places(f"{i}", 10) for i in range(4000)]
    counts = np.bincount(np.concatenate(found), minlength=10)
    assert counts == pytest.approx(np.full(10, 4000 / STRIDE), rel=0.12)
    assert found == [places(f"{i}", 10) for i in range(4000)]
    assert all(len(places(f"{i}", count)) > 0 for i in range(50) for count in (1, 2, 3))


def test_what_the_sample_costs(tokenizer, learnable_guard, monkeypatch):
    """The guard scores each pool response's last prefix and every fourth prefix of the sample."""
    own, wanted = VerdictGuard.trajectories, []
    monkeypatch.setattr(
        VerdictGuard,
        "trajectories",
        lambda self, requests: wanted.extend(requests) or own(self, requests),
    )
    probed(talks(), tokenizer, learnable_guard)
    said = [request for request in wanted if request.text != "a"]
    firsts, rest = said[: POOL * 30], said[POOL * 30 :]
    assert all(request.ends == (len(request.text),) for request in firsts)
    for request in rest[:30]:
        places = len(request.ends)
        assert places <= -(-len(tokenizer(request.text)["input_ids"]) // STRIDE) + 1


def test_what_cannot_be_scored_is_left_out_of_the_sample(tokenizer, learnable_guard, monkeypatch):
    own, wanted = VerdictGuard.trajectories, []

    def picky(self, requests):
        for index, request in enumerate(requests):
            if request.text.startswith("fox"):
                wanted.append(request)
                raise GuardError("no foxes", request=index)
        return own(self, requests)

    monkeypatch.setattr(VerdictGuard, "trajectories", picky)
    with pytest.raises(GuardError, match="no foxes"):
        probed(talks(), tokenizer, learnable_guard)
    found = probed(talks(), tokenizer, learnable_guard, on_guard_error="unsafe")
    assert wanted
    assert provenance_of(found)["probes"][0]["fell_back"] is None
