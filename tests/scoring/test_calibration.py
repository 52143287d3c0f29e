"""Calibration: the fit, the quality of scores, and labelled rows."""

import math
import random

import numpy as np
import pytest
from datasets import Dataset
from support.labelled import ROWS, row

from star_dss_plugin import ConfigError, DataError, GuardError
from star_dss_plugin.guards.combined import calibrate
from star_dss_plugin.guards.loading import load_guard
from star_dss_plugin.scoring.calibration import (
    calibration_quality,
    fit_calibration,
    fit_guard,
    labelled_rows,
)


def drawn_scores(n, temperature, threshold, seed=0):
    """Return raw scores, and labels drawn with their calibrated values as probabilities."""
    rng = np.random.default_rng(seed)
    raw = rng.uniform(0.02, 0.98, n).tolist()
    true = [calibrate(p, temperature, threshold) for p in raw]
    return raw, (rng.uniform(size=n) < true).astype(int).tolist()


@pytest.mark.parametrize(("temperature", "threshold"), [(1.0, 0.5), (2.5, 0.3), (0.4, 0.8)])
def test_the_fit_recovers_the_parameters_of_the_data(temperature, threshold):
    found = fit_calibration(*drawn_scores(20000, temperature, threshold))
    assert found[0] == pytest.approx(temperature, rel=0.1)
    assert found[1] == pytest.approx(threshold, abs=0.03)


def test_the_fit_equals_scikit_learns():
    linear_model = pytest.importorskip("sklearn.linear_model", reason="needs scikit-learn")
    scores, labels = drawn_scores(5000, 1.7, 0.4)
    x = [[math.log(p / (1 - p))] for p in scores]
    model = linear_model.LogisticRegression(C=1e12, tol=1e-10).fit(x, labels)
    temperature, threshold = fit_calibration(scores, labels)
    assert temperature == pytest.approx(1 / model.coef_[0, 0], rel=1e-2)
    logit = -model.intercept_[0] / model.coef_[0, 0]
    assert threshold == pytest.approx(1 / (1 + math.exp(-logit)), abs=1e-3)


def test_the_fit_has_the_smallest_loss():
    scores, labels = drawn_scores(400, 1.3, 0.6)

    def loss(temperature, threshold):
        safe = sum(labels)
        high, low = (safe + 1) / (safe + 2), 1 / (len(labels) - safe + 2)
        total = 0.0
        for score, label in zip(scores, labels):
            p, target = calibrate(score, temperature, threshold), high if label else low
            total -= target * math.log(p) + (1 - target) * math.log(1 - p)
        return total

    temperature, threshold = fit_calibration(scores, labels)
    best = loss(temperature, threshold)
    for t, θ in [(1.01, 0), (0.99, 0), (1, 0.005), (1, -0.005)]:
        assert loss(temperature * t, threshold + θ) > best


@pytest.mark.parametrize("scores", [[0.0, 1.0], [0.1, 0.9], [0.4, 0.6]])
def test_perfectly_separating_scores_can_be_calibrated(scores):
    temperature, threshold = fit_calibration(scores * 20, [0, 1] * 20)
    assert 0 < temperature < 100
    assert threshold == pytest.approx(0.5)


@pytest.mark.parametrize("scores", [[0.9, 0.1], [0.5, 0.5]])
def test_scores_that_do_not_rise_with_safety_are_refused(scores):
    with pytest.raises(GuardError, match="do not rise with safety"):
        fit_calibration(scores * 20, [0, 1] * 20)


@pytest.mark.parametrize("rare", [0, 1])
def test_scores_that_say_too_little_are_refused(rare):
    """With a rare label and scores that hardly rise, θ would lie outside (0, 1)."""
    labels = [rare] * 10 + [1 - rare] * 1990
    scores = [0.9 if i % 2 else 0.1 for i in range(2000)]
    scores[1 - rare] = 0.9 if rare else 0.1  # one of the rare rows
    with pytest.raises(
        GuardError, match=r"say little about the labelled rows \(\d+ safe, \d+ harm"
    ):
        fit_calibration(scores, labels)


def test_a_calibrated_guard_is_not_calibrated_again():
    guard = load_guard({"preset": "test-words", "calibration": {"temperature": 2.0}})
    with pytest.raises(ConfigError, match="has a 'calibration' already. Leave it out"):
        fit_guard(guard, *labelled_rows(Dataset.from_list(ROWS)))


def test_quality_equals_its_definitions():
    rng = random.Random(0)
    scores = [round(rng.random(), 1) for _ in range(200)]  # with ties
    labels = [int(rng.random() < s) for s in scores]
    found = calibration_quality(scores, labels)
    pairs = [(s, h) for s, a in zip(scores, labels) if a for h, b in zip(scores, labels) if not b]
    assert found.auroc == pytest.approx(sum((s > h) + (s == h) / 2 for s, h in pairs) / len(pairs))
    assert found.brier == pytest.approx(sum((s - y) ** 2 for s, y in zip(scores, labels)) / 200)
    right = sum(s < 0.5 and not y for s, y in zip(scores, labels))
    precision, recall = right / sum(s < 0.5 for s in scores), right / labels.count(0)
    assert found.f1 == pytest.approx(2 * precision * recall / (precision + recall))
    assert sum(count for count, _, _ in found.bins) == 200
    count, mean, share = found.bins[0]
    inside = [y for s, y in zip(scores, labels) if s < 0.1]
    assert (count, share) == (len(inside), pytest.approx(sum(inside) / len(inside)))
    assert 0 <= mean < 0.1


def test_calibrated_quality_is_that_of_held_out_rows():
    """The calibrated figures come from fits that did not see the row."""
    conversations, labels = labelled_rows(Dataset.from_list(ROWS))
    guard = load_guard("test-words")
    found, scores = fit_guard(guard, conversations, labels)
    order = sorted(range(80), key=lambda i: labels[i])
    values = [0.0] * 80
    for fold in range(5):
        outside = order[fold::5]
        inside = [i for i in range(80) if i not in outside]
        numbers = fit_calibration([scores[i] for i in inside], [labels[i] for i in inside])
        for i in outside:
            values[i] = calibrate(scores[i], *numbers)
    assert found.calibrated == calibration_quality(values, labels)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"prompt": "a", "response": "b"}], "lacks label"),
        ([{"prompt": "a", "label": 1}], "lacks response"),
        ([row("a", 2)], "Row 0: the label is 2"),
        ([{**row("a", 1), "response": None}], "Row 0: the row has a label and no response"),
        (ROWS[:45], "5 safe and 40 harmful"),
    ],
    ids=range(5),
)
def test_unusable_rows_are_refused(rows, message):
    with pytest.raises(DataError, match=message):
        labelled_rows(Dataset.from_list(rows))


def test_labelled_rows_may_be_messages():
    talk = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    data = [{"messages": talk, "label": i % 2} for i in range(20)]
    conversations, labels = labelled_rows(Dataset.from_list(data))
    assert conversations[3][-1]["content"] == "b"
    assert labels[:3] == [0, 1, 0]
