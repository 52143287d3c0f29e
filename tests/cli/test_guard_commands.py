"""`star-dss guards`, `guards check` and `guards calibrate`."""

import json

import pytest
from support.guards import WordGuard
from support.labelled import ROWS, row
from typer.testing import CliRunner

from star_dss_plugin import GuardError
from star_dss_plugin.cli import app as cli
from star_dss_plugin.guards.loading import load_guard
from star_dss_plugin.guards.presets import PRESETS
from star_dss_plugin.guards.self_check import SAFE_PROBE, UNSAFE_PROBE, check_probes


def run(*arguments):
    """Return the result of `star-dss guards` with these arguments."""
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
    written = json.loads((tmp_path / "out" / "calibration.json").read_text())
    assert written["demonstration_guard"] is True
