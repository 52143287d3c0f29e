"""Eq. (3): stored golden values, a naive implementation, and properties for any input."""

import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.paths import TESTS

from star_dss_plugin import ConfigError, DataError, star_dss_loss
from star_dss_plugin.logprobs import full_kl, token_logprobs
from star_dss_plugin.loss import Shaping
from star_dss_plugin.weights import last_scores

CASES = json.loads((TESTS / "golden" / "shaped_loss.json").read_text())["cases"]
MODES = ["star_dss", "hard", "static", "rejection", "kl_only", "sft"]
ESTIMATORS = ["k1", "k2", "k3", "full"]


@pytest.mark.parametrize(
    "case", CASES, ids=lambda c: f"{c['mode']}-{c['kl_estimator']}-{c['seed']}"
)
def test_the_loss_equals_golden_values(case):
    found = star_dss_loss(
        torch.tensor(case["logits"], dtype=torch.float64),
        torch.tensor(case["labels"]),
        torch.tensor(case["star_scores"], dtype=torch.float64),
        ref_logits=torch.tensor(case["ref_logits"], dtype=torch.float64),
        loss_type=case["mode"],
        kl_coef=case["kl_coef"],
        kl_estimator=case["kl_estimator"],
        threshold=case["threshold"],
    )
    for part, value in case["expected"].items():
        assert getattr(found, part).item() == pytest.approx(value, abs=1e-9), part


def naive(logits, ref, labels, scores, mode, kl_coef, estimator, threshold, n=None):
    """Return the loss of Eq. (3), computed token by token."""
    total, count = torch.zeros((), dtype=logits.dtype), 0
    for b in range(labels.shape[0]):
        for t in range(1, labels.shape[1]):
            y = labels[b, t].item()
            if y == -100:
                continue
            count += 1
            end = t
            while end + 1 < labels.shape[1] and labels[b, end + 1] != -100:
                end += 1
            s, s_last = scores[b, t].item(), scores[b, end].item()
            ce_w, kl_w = {
                "sft": (1, 0),
                "rejection": (float(s_last >= threshold), 0),
                "static": (s_last, kl_coef * (1 - s_last)),
                "hard": (float(s >= threshold), kl_coef * float(s < threshold)),
                "star_dss": (s, kl_coef * (1 - s)),
                "kl_only": (0, kl_coef),
            }[mode]
            logp = logits[b, t - 1].log_softmax(-1)
            ref_logp = ref[b, t - 1].log_softmax(-1)
            d = logp[y] - ref_logp[y]
            kl = {
                "k1": d,
                "k2": d**2 / 2,
                "k3": torch.exp(-d) - 1 + d,
                "full": (logp.exp() * (logp - ref_logp)).sum(),
            }[estimator]
            total = total + ce_w * -logp[y] + kl_w * kl
    return total / (n or max(count, 1))


@st.composite
def batches(draw):
    """Draw logits, reference logits, labels and scores of a batch."""
    b, t, v = draw(st.integers(1, 3)), draw(st.integers(2, 9)), draw(st.integers(2, 6))
    seed = draw(st.integers(0, 2**31))
    g = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, v, (b, t), generator=g)
    labels[torch.rand(b, t, generator=g) < draw(st.floats(0, 1))] = -100
    grid = torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0], dtype=torch.float64)
    scores = grid[torch.randint(0, 5, (b, t), generator=g)]
    logits = torch.randn(b, t, v, generator=g, dtype=torch.float64) * 3
    ref = torch.randn(b, t, v, generator=g, dtype=torch.float64) * 3
    return logits, ref, labels, scores


@settings(max_examples=60, deadline=None)
@given(
    batches(),
    st.sampled_from(MODES),
    st.sampled_from(ESTIMATORS),
    st.floats(0, 2),
    st.sampled_from([0.0, 0.25, 0.5, 1.0]),
    st.sampled_from([None, 7]),
)
def test_values_and_gradients_equal_a_naive_implementation(
    batch, mode, estimator, kl_coef, threshold, n
):
    logits, ref, labels, scores = batch
    ours, naive_logits = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    found = star_dss_loss(
        ours,
        labels,
        scores,
        ref_logits=ref,
        loss_type=mode,
        kl_coef=kl_coef,
        kl_estimator=estimator,
        threshold=threshold,
        num_items_in_batch=n,
    ).loss
    expected = naive(naive_logits, ref, labels, scores, mode, kl_coef, estimator, threshold, n)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    found.backward()
    if expected.requires_grad:
        expected.backward()
        torch.testing.assert_close(ours.grad, naive_logits.grad, rtol=1e-9, atol=1e-12)
    else:
        assert not ours.grad.any()


def sample(dtype=torch.float64, seed=0):
    """Return logits, reference logits, labels and scores of a random batch."""
    g = torch.Generator().manual_seed(seed)
    logits = torch.randn(2, 6, 11, generator=g, dtype=torch.float64).to(dtype)
    ref = torch.randn(2, 6, 11, generator=g, dtype=torch.float64).to(dtype)
    labels = torch.randint(0, 11, (2, 6), generator=g)
    labels[:, :2] = -100
    scores = torch.rand(2, 6, generator=g, dtype=torch.float64)
    return logits.requires_grad_(), ref, labels, scores


def test_the_loss_with_safe_scores_is_that_of_sft():
    logits, ref, labels, scores = sample()
    ones = torch.ones_like(scores)
    expected = star_dss_loss(logits, labels, scores, loss_type="nll").loss
    for mode in ("star_dss", "hard", "static", "rejection", "sft"):
        assert star_dss_loss(logits, labels, ones, ref_logits=ref, loss_type=mode).loss == expected


def test_unsafe_scores_at_the_reference_have_no_loss_and_no_gradient():
    logits, _, labels, scores = sample()
    zeros = torch.zeros_like(scores)
    found = star_dss_loss(logits, labels, zeros, ref_logits=logits.detach(), kl_estimator="full")
    found.loss.backward()
    assert found.loss.item() == pytest.approx(0, abs=1e-12)
    assert logits.grad.abs().max() < 1e-12


def test_a_token_without_weight_has_no_gradient():
    logits, ref, labels, scores = sample()
    scores[0, 3] = 0.0
    star_dss_loss(logits, labels, scores, ref_logits=ref, kl_coef=0.0).loss.backward()
    assert not logits.grad[0, 2].any()  # token 3 is predicted from position 2
    assert logits.grad[0, 3].any()


def test_nan_at_a_token_without_weight_does_not_reach_the_loss():
    logits, ref, labels, scores = sample()
    ref = ref.clone()
    ref[0, 2] = float("nan")
    scores[0, 3] = 1.0  # KL weight 0 at token 3
    assert math.isfinite(star_dss_loss(logits, labels, scores, ref_logits=ref).loss)


def test_scores_of_prompt_tokens_are_ignored():
    logits, ref, labels, scores = sample()
    changed = scores.clone()
    changed[labels == -100] = 0.123
    a = star_dss_loss(logits, labels, scores, ref_logits=ref).loss
    assert star_dss_loss(logits, labels, changed, ref_logits=ref).loss == a


def test_precomputed_log_probabilities_equal_reference_logits():
    logits, ref, labels, scores = sample()
    shifted = token_logprobs(ref, labels)
    ref_logps = torch.cat([torch.zeros(2, 1, dtype=shifted.dtype), shifted], dim=1)
    for estimator in ("k1", "k2", "k3"):
        a = star_dss_loss(logits, labels, scores, ref_logits=ref, kl_estimator=estimator).loss
        b = star_dss_loss(logits, labels, scores, ref_logps=ref_logps, kl_estimator=estimator).loss
        assert a == b


def test_full_kl_in_chunks_equals_one_piece(monkeypatch):
    from star_dss_plugin import logprobs

    logits, ref, labels, _ = sample()
    wanted = labels[:, 1:] != -100
    whole = full_kl(logits, ref, wanted)
    whole.sum().backward()
    expected, logits.grad = logits.grad, None
    monkeypatch.setattr(logprobs, "_ROWS_PER_CHUNK", 1)
    pieces = full_kl(logits, ref, wanted)
    pieces.sum().backward()
    assert torch.equal(whole, pieces)
    torch.testing.assert_close(logits.grad, expected)


def test_half_precision_logits_are_upcast():
    logits, ref, labels, scores = sample(torch.bfloat16)
    found = star_dss_loss(logits, labels, scores, ref_logits=ref)
    exact = star_dss_loss(logits.double(), labels, scores, ref_logits=ref.double())
    assert found.loss.dtype == torch.float32
    assert found.loss.item() == pytest.approx(exact.loss.item(), rel=1e-5)


@given(st.lists(st.booleans(), min_size=1, max_size=20), st.randoms(use_true_random=False))
def test_last_scores_are_those_at_the_ends_of_runs(trained, random):
    scores = [random.random() for _ in trained]
    expected = list(scores)
    for i, on in enumerate(trained):
        if on:
            end = i
            while end + 1 < len(trained) and trained[end + 1]:
                end += 1
            expected[i] = scores[end]
    tensor = torch.tensor([scores], dtype=torch.float64)
    assert last_scores(tensor, torch.tensor([trained])).tolist() == [expected]


@pytest.mark.parametrize(
    ("mode", "guard", "reference"),
    [
        ("star_dss", True, True),
        ("hard", True, True),
        ("static", True, True),
        ("rejection", True, False),
        ("kl_only", False, True),
        ("sft", False, False),
    ],
)
def test_a_mode_needs_scores_and_reference_by_its_weights(mode, guard, reference):
    shaping = Shaping.named(mode, kl_coef=0.5, threshold=0.5)
    assert shaping.needs_scores is guard
    assert shaping.needs_reference is reference
    assert not Shaping.named(mode, kl_coef=0.0, threshold=0.5).needs_reference


def test_errors_say_what_to_change():
    logits, ref, labels, scores = sample()
    with pytest.raises(ConfigError, match="but ref_logits or ref_logps was not given"):
        star_dss_loss(logits, labels, scores)
    with pytest.raises(ConfigError, match="but ref_logits was not given"):
        star_dss_loss(logits, labels, scores, ref_logps=scores, kl_estimator="full")
    with pytest.raises(ConfigError, match="Did you mean 'star_dss'"):
        star_dss_loss(logits, labels, scores, loss_type="star_ds")
    with pytest.raises(ConfigError, match="kl_estimator 'k4'"):
        star_dss_loss(logits, labels, scores, ref_logits=ref, kl_estimator="k4")
    with pytest.raises(DataError, match=r"star_scores has shape \(2, 5\)"):
        star_dss_loss(logits, labels, scores[:, :5], ref_logits=ref)
