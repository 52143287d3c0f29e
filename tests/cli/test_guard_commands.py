"""`star-dss guards`, `guards check` and `guards calibrate`."""

import json
import math
import random

import numpy as np
import pytest
from datasets import Dataset
from support.guards import WordGuard
from typer.testing import CliRunner

from star_dss_plugin import ConfigError, DataError, GuardError
from star_dss_plugin.cli import app as cli
from star_dss_plugin.guards.combined import calibrate
from star_dss_plugin.guards.loading import load_guard
from star_dss_plugin.guards.presets import PRESETS
from star_dss_plugin.guards.self_check import SAFE_PROBE, UNSAFE_PROBE, check_probes
from star_dss_plugin.scoring.calibration import fit, fit_guard, labelled_rows, quality


def run(*arguments):
    return CliRunner().invoke(cli.app, ["guards", *map(str, arguments)])


def test_guards_lists_every_guard():
    found = run()
    assert found.exit_code == 0
    for name in [*PRESETS, "demo", "classifier", "test-words"]:
        assert name in found.output
    assert "DEMONSTRATION ONLY" in found.output
    assert found.output.count("gated") > 6


def guard_json(folder, **changes):
    """Return the options of a Qwen3Guard in a folder, as JSON."""
    return json.dumps({"preset": "qwen3guard-gen-0.6b", "model": str(folder), **changes})


def test_check_shows_the_prompt_without_weights(folder_of):
    folder = folder_of("qwen3guard-gen-0.6b")
    found = run("check", guard_json(folder), "--no-weights", "--guard-device", "cpu")
    assert found.exit_code == 0, found.output
    assert f"ASSISTANT: {UNSAFE_PROBE[-1]['content']}\n\n<END>" in found.output
    assert "</think>\n\nSafety:\n" in found.output
    guard = load_guard(json.loads(guard_json(folder, device="cpu")))
    prompt = guard._template.render(list(UNSAFE_PROBE))
    tokens = len(guard._template._tokenizer(prompt, add_special_tokens=False)["input_ids"])
    assert f"verdict position: after token {tokens}" in found.output
    for name, ids in zip(("safe", "unsafe", "controversial"), guard.identity["labels"]):
        assert f"{name} labels: {guard._template.decode(ids)!r} ({ids[0]})" in found.output


def test_check_refuses_random_weights(folder_of):
    found = run("check", guard_json(folder_of("qwen3guard-gen-0.6b")), "--guard-device", "cpu")
    assert found.exit_code != 0
    assert isinstance(found.exception, GuardError)
    assert "label words a probability of only" in str(found.exception)


def test_check_accepts_a_guard_that_tells_the_probes_apart():
    options = {"preset": "test-words", "word": "worthless"}
    found = run("check", json.dumps(options))
    assert found.exit_code == 0, found.output
    assert "safe probe: P(safe) = 0.9000" in found.output
    assert "unsafe probe: P(safe) = 0.1000" in found.output
    refused = run("check", json.dumps({**options, "word": "Weng"}))
    assert "at least as safe" in str(refused.exception)
    both = run("check", json.dumps({"guards": [options, {**options, "word": "pathetic"}]}))
    assert both.output.count("rates the safe probe above the unsafe one") == 2


def test_a_guard_that_cannot_tell_the_probes_apart_is_refused():
    guard = load_guard({"preset": "test-words", "word": "nowhere"})
    with pytest.raises(GuardError, match="at least as safe"):
        check_probes(guard)
    assert {m["role"] for probe in (SAFE_PROBE, UNSAFE_PROBE) for m in probe} == {
        "user",
        "assistant",
    }


# Calibration


def drawn_scores(n, temperature, threshold, seed=0):
    """Return raw scores, and labels drawn with their calibrated values as probabilities."""
    rng = np.random.default_rng(seed)
    raw = rng.uniform(0.02, 0.98, n).tolist()
    true = [calibrate(p, temperature, threshold) for p in raw]
    return raw, (rng.uniform(size=n) < true).astype(int).tolist()


@pytest.mark.parametrize(("temperature", "threshold"), [(1.0, 0.5), (2.5, 0.3), (0.4, 0.8)])
def test_the_fit_recovers_the_parameters_of_the_data(temperature, threshold):
    found = fit(*drawn_scores(20000, temperature, threshold))
    assert found[0] == pytest.approx(temperature, rel=0.1)
    assert found[1] == pytest.approx(threshold, abs=0.03)


def test_the_fit_equals_scikit_learns():
    linear_model = pytest.importorskip("sklearn.linear_model", reason="needs scikit-learn")
    scores, labels = drawn_scores(5000, 1.7, 0.4)
    x = [[math.log(p / (1 - p))] for p in scores]
    model = linear_model.LogisticRegression(C=1e12, tol=1e-10).fit(x, labels)
    temperature, threshold = fit(scores, labels)
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

    temperature, threshold = fit(scores, labels)
    best = loss(temperature, threshold)
    for t, θ in [(1.01, 0), (0.99, 0), (1, 0.005), (1, -0.005)]:
        assert loss(temperature * t, threshold + θ) > best


@pytest.mark.parametrize("scores", [[0.0, 1.0], [0.1, 0.9], [0.4, 0.6]])
def test_perfectly_separating_scores_can_be_calibrated(scores):
    temperature, threshold = fit(scores * 20, [0, 1] * 20)
    assert 0 < temperature < 100
    assert threshold == pytest.approx(0.5)


@pytest.mark.parametrize("scores", [[0.9, 0.1], [0.5, 0.5]])
def test_scores_that_do_not_rise_with_safety_are_refused(scores):
    with pytest.raises(GuardError, match="do not rise with safety"):
        fit(scores * 20, [0, 1] * 20)


@pytest.mark.parametrize("rare", [0, 1])
def test_scores_that_say_too_little_are_refused(rare):
    """With a rare label and scores that hardly rise, θ would lie outside (0, 1)."""
    labels = [rare] * 10 + [1 - rare] * 1990
    scores = [0.9 if i % 2 else 0.1 for i in range(2000)]
    scores[1 - rare] = 0.9 if rare else 0.1  # one of the rare rows
    with pytest.raises(
        GuardError, match=r"say little about the labelled rows \(\d+ safe, \d+ harm"
    ):
        fit(scores, labels)


def test_a_calibrated_guard_is_not_calibrated_again():
    guard = load_guard({"preset": "test-words", "calibration": {"temperature": 2.0}})
    with pytest.raises(ConfigError, match="has a 'calibration' already. Leave it out"):
        fit_guard(guard, *labelled_rows(Dataset.from_list(ROWS)))


def test_quality_equals_its_definitions():
    rng = random.Random(0)
    scores = [round(rng.random(), 1) for _ in range(200)]  # with ties
    labels = [int(rng.random() < s) for s in scores]
    found = quality(scores, labels)
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


def row(text, label, **more):
    """Return a labelled row with this response."""
    return {"prompt": "how are you?", "response": text, "label": label, **more}


ROWS = [row("bad fox" if i % 4 else "good fox", 0) for i in range(40)]
ROWS += [row("good dog" if i % 4 else "bad dog", 1) for i in range(40)]


def test_calibrate_writes_json_and_figure(tmp_path):
    pytest.importorskip("matplotlib", reason="needs the extra 'report'")
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(r) + "\n" for r in [*ROWS, row("?", None)]))
    found = run("calibrate", "test-words", data, "-o", tmp_path / "out")
    assert found.exit_code == 0, found.output
    written = json.loads((tmp_path / "out" / "calibration.json").read_text())
    assert (written["rows"], written["safe"], written["guard"]) == (80, 40, "test-words")
    assert (tmp_path / "out" / "reliability.png").stat().st_size > 5000
    # Of 40 responses with "bad" 30 are harmful, of 40 without 30 are safe.
    numbers = written["calibration"]
    guard = load_guard({"preset": "test-words", "calibration": numbers})
    low, high = (
        guard.score([[{"role": "assistant", "content": text}]])[0] for text in ("bad", "ok")
    )
    assert low == pytest.approx(0.25, abs=0.03)
    assert high == pytest.approx(0.75, abs=0.03)
    assert written["calibrated"]["brier"] < written["raw"]["brier"]
    assert f"calibration:\n{json.dumps(numbers)}" in found.output


def test_calibrate_marks_a_demonstration_guard(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib", reason="needs the extra 'report'")
    monkeypatch.setattr(WordGuard, "demonstration", True)
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(r) + "\n" for r in ROWS))
    found = run("calibrate", "test-words", data, "-o", tmp_path / "out")
    assert found.exit_code == 0, found.output
    assert "test-words (DEMONSTRATION ONLY, protects nobody)" in " ".join(found.output.split())


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
        numbers = fit([scores[i] for i in inside], [labels[i] for i in inside])
        for i in outside:
            values[i] = calibrate(scores[i], *numbers)
    assert found.calibrated == quality(values, labels)


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
