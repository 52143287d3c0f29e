"""Logged metrics: compared with plain sums, and read from TensorBoard's files."""

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from star_dss_plugin.logprobs import kl_estimate, kl_slope
from star_dss_plugin.loss import Shaping, shaped_loss
from star_dss_plugin.training.metrics import TokenMetrics

ONE = SimpleNamespace(num_processes=1)


def batch(seed, mode="star_dss", threshold=0.5):
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(3, 9, generator=generator, dtype=torch.float64)
    scores[0] = scores[0].round()
    labels = torch.randint(0, 5, (3, 9), generator=generator)
    labels[torch.rand(3, 9, generator=generator) < 0.4] = -100
    logps = -3 * torch.rand(3, 8, generator=generator, dtype=torch.float64)
    ref = -3 * torch.rand(3, 8, generator=generator, dtype=torch.float64)
    weights = Shaping.named(mode, kl_coef=0.5, threshold=threshold).weights(scores, labels)
    return scores[:, 1:], logps, ref, weights


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
@given(d=st.floats(-5, 5))
def test_the_slope_is_the_derivative(estimator, d):
    logp = torch.tensor(d, dtype=torch.float64, requires_grad=True)
    ref = torch.tensor(0.3, dtype=torch.float64)
    kl_estimate(logp, ref, estimator).backward()
    torch.testing.assert_close(kl_slope(logp.detach(), ref, estimator), logp.grad)


@pytest.mark.parametrize("mode", ["star_dss", "hard", "static", "kl_only"])
@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_every_mean_equals_the_plain_one(mode, estimator):
    metrics, plain = TokenMetrics(), []
    pulls = {"ce": 0.0, "kl": 0.0}
    for seed in range(4):
        scores, logps, ref, weights = batch(seed, mode)
        kl = kl_estimate(logps, ref, estimator)
        metrics.add("train", scores, 0.5, logps, kl, weights, kl_slope(logps, ref, estimator))
        plain += [
            (scores[i].item(), -logps[i].item(), kl[i].item(), weights.kl[i].item())
            for i in map(tuple, weights.trained.nonzero().tolist())
        ]
        # The gradient of each part of the loss, by a backward pass through the real loss.
        leaf = logps.clone().requires_grad_()
        parts = shaped_loss(leaf, kl_estimate(leaf, ref, estimator), weights, 1)
        for name in pulls:
            part = getattr(parts, name)
            if part.requires_grad:
                (slope,) = torch.autograd.grad(part, leaf, retain_graph=True)
                pulls[name] += slope.abs().sum().item()
    logged = metrics.pop("train", ONE)

    def mean(values):
        values = list(values)
        return pytest.approx(sum(values) / len(values), rel=1e-5)

    assert logged["star_dss/ce_unweighted"] == mean(ce for _, ce, _, _ in plain)
    assert logged["star_dss/kl"] == mean(w * kl for _, _, kl, w in plain)
    held = [(s, kl) for s, _, kl, w in plain if w]
    assert logged["star_dss/kl_unweighted"] == mean(kl for _, kl in held)
    for name, side in (("kl_safe", False), ("kl_unsafe", True)):
        values = [kl for s, kl in held if (s < 0.5) is side]
        assert (f"star_dss/{name}" in logged) == bool(values)
        if values:
            assert logged[f"star_dss/{name}"] == mean(values)
    share = pulls["kl"] / (pulls["kl"] + pulls["ce"])
    assert logged["star_dss/kl_gradient_share"] == pytest.approx(share, rel=1e-5)
    assert metrics.pop("train", ONE) == {}


def test_what_is_not_known_is_not_logged():
    scores, logps, _, weights = batch(0)
    metrics = TokenMetrics()
    metrics.add("train", scores, 0.5, logps, logps.square(), weights)  # full: no slopes
    assert "star_dss/kl_gradient_share" not in metrics.pop("train", ONE)
    scores, logps, _, weights = batch(0, "rejection")
    metrics.add("train", scores, 0.5, logps, None, weights)
    logged = metrics.pop("train", ONE)
    assert not any(name.startswith("star_dss/kl_") for name in logged) or (
        logged["star_dss/kl_gradient_share"] == 0
    )
    assert "star_dss/kl_safe" not in logged


def test_tensorboard_files_hold_every_metric(tmp_path, tokenizer, capsys, monkeypatch):
    pytest.importorskip("trl")
    pytest.importorskip("tensorboard")
    from support.trl_runs import tiny_trainer
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder = tmp_path / "events"
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(folder))  # transformers >= 5
    trainer = tiny_trainer(tmp_path, tokenizer, report_to="tensorboard", kl_coef=2.0)
    trainer.train()
    history = [line for line in trainer.state.log_history if "star_dss/ce" in line]
    assert len(history) == 3
    events = EventAccumulator(str(next(folder.rglob("events.out*")).parent))
    events.Reload()
    for name in [name for name in history[0] if name.startswith("star_dss/")]:
        written = {e.step: e.value for e in events.Scalars(f"train/{name}")}
        expected = {line["step"]: line[name] for line in history if name in line}
        assert written == pytest.approx(expected, rel=1e-5), name
    assert history[0]["star_dss/kl_gradient_share"] == pytest.approx(0, abs=1e-4)
    assert history[-1]["star_dss/kl_gradient_share"] > 0.01
    out = capsys.readouterr().out
    table = out[out.index("STAR-DSS: loss_type=star_dss, guard=test-words") :]
    for name in history[-1]:
        if name.startswith("star_dss/"):
            assert name in table
    assert "step 1" in table
    assert "step 3" in table
