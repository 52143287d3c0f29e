"""Probes: their inputs, selection, error bounds, and the guards that can have one."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.guards import WordGuard
from support.probed import learnable, slow_states
from support.verdict_guards import QUESTION, describe
from transformers import AutoModelForCausalLM

from star_dss_plugin import ConfigError, load_guard
from star_dss_plugin.data.requests import PrefixRequest, Trajectory
from star_dss_plugin.guards.base import Guard
from star_dss_plugin.guards.combined import CalibratedGuard, EnsembleGuard
from star_dss_plugin.guards.probing.bounds import (
    COVERAGE,
    Bounds,
    HeldOut,
    check_bounds,
    probabilities,
)
from star_dss_plugin.guards.probing.fitted import FittedProbe
from star_dss_plugin.guards.probing.guard import ProbingGuard, make_probing
from star_dss_plugin.guards.probing.linear import Linear, Sample, choose_probe, features, summaries
from star_dss_plugin.options import ScoringOptions

# States


def request(text, *ends):
    return PrefixRequest(tuple(QUESTION), text, ends or (len(text),))


def test_states_are_those_of_the_last_whole_token_of_each_prefix(tmp_path, tokenizer):
    guard = load_guard(learnable(tmp_path, tokenizer))
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    text = "i am fine, thank you."
    [found] = guard.trunk_states([request(text, 1, 6, len(text))], [0, 2])
    ids, ends = guard._template.prompt_with_response(QUESTION, text)
    states = slow_states(model, ids, [0, 2])
    first = len(ids) - len(ends)
    for end, got in zip((1, 6, len(text)), found, strict=True):
        last = max(k for k, token_end in enumerate(ends) if token_end <= end)
        torch.testing.assert_close(got, states[first + last], rtol=1e-4, atol=1e-4)


def test_states_depend_on_nothing_behind_the_prefix(tmp_path, tokenizer):
    guard = load_guard(learnable(tmp_path, tokenizer))
    one, other = "i am fine. the fox is bad", "i am fine. thank you"
    a, b = guard.trunk_states([request(one, 4, 9, len(one)), request(other, 4, 9, 12)], [0, 1])
    torch.testing.assert_close(a[:2], b[:2], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(a[2], b[2])


def test_a_prefix_without_a_token_has_the_state_before_the_response(tmp_path, tokenizer):
    guard = load_guard(learnable(tmp_path, tokenizer))
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    found = guard.trunk_states([request("", 0), request("you are", 0, 3)], [1])
    for text, states in zip(("", "you are"), found, strict=True):
        ids, ends = guard._template.prompt_with_response(QUESTION, text)
        before = slow_states(model, ids, [1])[len(ids) - len(ends) - 1]
        torch.testing.assert_close(states[0], before, rtol=1e-4, atol=1e-4)


def test_features_are_the_state_and_the_mean_so_far():
    states = torch.arange(12.0).view(3, 2, 2)
    found = features(summaries(states))
    flat = states.flatten(1).numpy()
    assert found.shape == (3, 8)
    np.testing.assert_allclose(found[:, :4], flat)
    np.testing.assert_allclose(found[:, 4:], [flat[: k + 1].mean(0) for k in range(3)])


# Fits


def samples(count, noise, seed=0, informative=1):
    """Return responses whose scores are a function of one block's states plus noise."""
    random = np.random.default_rng(seed)
    found = []
    for _ in range(count):
        states = torch.tensor(random.normal(size=(int(random.integers(3, 30)), 3, 4)))
        logits = 3 * states[:, informative, 0].numpy() + noise * random.normal(size=len(states))
        found.append(Sample(summaries(states.float()), probabilities(logits), 1.0))
    return found


def test_the_block_whose_states_give_the_score_is_chosen():
    for informative in range(3):
        chosen = choose_probe(samples(60, 0.05, informative=informative))
        assert informative in chosen.blocks
        held = [np.abs(probabilities(z) - s.scores) for z, s in zip(
            chosen.held_out, samples(60, 0.05, informative=informative), strict=True
        )]  # fmt: skip
        assert np.concatenate(held).mean() < 0.03


def test_held_out_scores_come_from_probes_that_have_not_seen_them():
    """Changing one response's scores changes the predictions of other folds only."""
    known = samples(30, 0.1)
    changed = [*known[:7], Sample(known[7].inputs, 1 - known[7].scores, 1.0), *known[8:]]
    one, other = choose_probe(known), choose_probe(changed)
    if (one.blocks, one.penalty) == (other.blocks, other.penalty):
        np.testing.assert_allclose(one.held_out[7], other.held_out[7])
        assert not np.allclose(one.held_out[8], other.held_out[8])
    else:
        pytest.fail("the case decides nothing: choose other samples")


def test_a_fit_is_the_same_each_time():
    one, other = choose_probe(samples(25, 0.2)), choose_probe(samples(25, 0.2))
    assert (one.probe.weight == other.probe.weight).all()
    assert one.probe.bias == other.probe.bias


# Bounds


def held(count, noise, seed=0):
    random = np.random.default_rng(seed)
    found = []
    for _ in range(count):
        z = random.normal(3, 3, size=20)
        found.append(HeldOut(z, probabilities(z + noise * random.normal(size=20)), 1.0))
    return found


@settings(max_examples=25, deadline=None, derandomize=True)
@given(st.floats(0.05, 1), st.integers(0, 10**6), st.sampled_from([0.02, 0.05, 0.1]))
def test_scores_that_are_not_asked_keep_the_promise_on_new_responses(noise, seed, tolerance):
    bounds = Bounds.from_held_out(held(200, noise, seed), tolerance, 0.5)
    new = held(400, noise, seed + 1)
    logits, scores = (np.concatenate([getattr(h, n) for h in new]) for n in ("logits", "scores"))
    kept = ~bounds.needs_guard(logits)
    assert kept.sum() > 500
    off = np.abs(probabilities(logits) - scores)[kept]
    assert (off <= tolerance).mean() >= COVERAGE


def test_noisier_probes_leave_more_prefixes_to_the_guard():
    shares = [check_bounds(held(200, noise), 0.05, 0.5)["probed"] for noise in (0.01, 0.3, 3.0)]
    assert shares[0] > 0.9
    assert shares[0] > shares[1] > shares[2]


def test_an_interval_that_holds_the_threshold_is_asked():
    bounds = Bounds(np.array([]), np.array([0.04]), 0.05, 0.5)
    p = np.array([0.45, 0.47, 0.5, 0.53, 0.55])
    assert bounds.needs_guard(np.log(p / (1 - p))).tolist() == [False, True, True, True, False]
    other = Bounds(np.array([]), np.array([0.04]), 0.05, 0.9)
    assert other.needs_guard(np.log(p / (1 - p))).tolist() == [False] * 5


def test_few_held_out_prefixes_give_infinite_bounds():
    few = [HeldOut(np.array([3.0]), np.array([0.95]), 1.0)] * 5
    assert np.isinf(Bounds.from_held_out(few, 0.05, 0.5).halves).all()
    assert check_bounds(few, 0.05, 0.5)["probed"] == 0


def test_a_weight_counts_as_that_many_responses():
    """Wrong predictions widen the bounds if their weight is large, and not if it is small."""
    right, wrong = (
        [HeldOut(np.full(20, 2.0), np.full(20, probabilities(np.array([2.0]))[0] - off), weight)]
        * 50
        for off, weight in ((0.0, 1.0), (0.5, 1.0))
    )
    mixed = [one for pair in zip(right, wrong, strict=True) for one in pair]
    heavy = [HeldOut(h.logits, h.scores, 50.0 if i % 2 else 1.0) for i, h in enumerate(mixed)]
    light = [HeldOut(h.logits, h.scores, 0.001 if i % 2 else 1.0) for i, h in enumerate(mixed)]
    assert Bounds.from_held_out(heavy, 0.05, 0.9).halves[-1] == pytest.approx(0.5)
    assert Bounds.from_held_out(light, 0.05, 0.9).halves[-1] == pytest.approx(0.0)


def test_a_probe_comes_back_from_json_as_it_was():
    facts = {"coverage": 0.97, "probed": 0.5}
    bounds = Bounds(np.array([0.1]), np.array([0.02, np.inf]), 0.05, 0.5)
    one = FittedProbe((1, 2), Linear(np.array([0.1, 1 / 3]), -0.2), bounds, facts)
    other = FittedProbe.parse(one.dump())
    assert other.dump() == one.dump()
    assert other.blocks == one.blocks
    assert np.isinf(other.bounds.halves[1])
    for damaged in ("{}", "[]", "null", one.dump().replace("[0.1]", "[0.1, 0.2]")):
        with pytest.raises((ValueError, TypeError, KeyError)):
            FittedProbe.parse(damaged)


# Guards that can have a probe


class Plugin(Guard):
    name, identity = "plugin", {"guard": "plugin"}

    def trajectories(self, requests):
        return [Trajectory((0.5,) * len(r.ends)) for r in requests]


def test_guards_without_states_are_refused(model_dir):
    with pytest.raises(ConfigError, match="'plugin' is no causal guard that answers with"):
        make_probing(Plugin(), 20, 0.05, 0.5)
    one, other = (load_guard(describe(model_dir, prefill=p)) for p in ("a:", "b:"))
    both = CalibratedGuard(EnsembleGuard([one, other]), temperature=2.0)
    with pytest.raises(ConfigError, match="Calibrate each guard by itself"):
        make_probing(both, 20, 0.05, 0.5)
    with pytest.raises(ConfigError, match="is no causal guard"):
        make_probing(EnsembleGuard([one, Plugin()]), 20, 0.05, 0.5)


def test_engines_without_hidden_states_are_refused(model_dir):
    served = load_guard(describe(model_dir, engine="http://localhost:9", device=None))
    with pytest.raises(ConfigError, match="computed by vLLM or a server, which give no hidden"):
        make_probing(served, 20, 0.05, 0.5)
    options = {"trajectory": "probed", "guard": "test-words"}
    for engine in ("vllm", "http://localhost:9"):
        with pytest.raises(ConfigError, match="a probe reads the guard's hidden states"):
            ScoringOptions(**options, engine=engine).validate()
        ScoringOptions(guard="test-words", engine=engine).validate()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"probe_sample": 19}, "probe_sample"),
        ({"probe_sample": 20.5}, "probe_sample"),
        ({"probe_tolerance": 1.5}, "probe_tolerance is 1.5"),
        ({"probe_tolerance": 0}, "no probe is exact"),
    ],
)
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        ScoringOptions(trajectory="probed", **options).validate()


def test_a_streaming_guard_is_returned_unchanged():
    guard = WordGuard()
    assert make_probing(guard, 20, 0.05, 0.5) is guard
    calibrated = CalibratedGuard(WordGuard(), 2.0)
    assert make_probing(calibrated, 20, 0.05, 0.5) is calibrated


def test_everything_that_changes_a_score_is_in_the_identity(model_dir):
    guard = load_guard(describe(model_dir))
    made = [
        ProbingGuard(guard, *how).identity
        for how in ((20, 0.05, 0.5), (21, 0.05, 0.5), (20, 0.06, 0.5), (20, 0.05, 0.6))
    ]
    assert all(one not in made[:i] for i, one in enumerate(made))
    assert guard.identity not in made


def test_a_guard_with_one_block_is_refused(tmp_path, tokenizer):
    from support.models import tiny_llama

    tiny_llama(len(tokenizer), num_hidden_layers=1).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    guard = ProbingGuard(load_guard(describe(tmp_path)), 20)
    with pytest.raises(ConfigError, match="has one block"):
        guard.fit_probe([request("a")] * 20, [[0]] * 20, [Trajectory((0.5,))] * 20, [1.0] * 20)
