"""`star-dss landscape`: its results, its figure and its errors."""

import json
import shutil

import pytest
from support.commands import run_command
from support.guards import WordGuard
from support.landscape import PROMPTS, slow_visage
from support.models import tiny_llama
from transformers import GenerationConfig

from star_dss_plugin import ConfigError
from star_dss_plugin.evaluate.landscape import (
    grid,
    random_lines,
)
from star_dss_plugin.evaluate.landscape_figure import write_landscape
from star_dss_plugin.evaluate.landscape_points import assemble_landscape
from star_dss_plugin.evaluate.models import load_whole_model
from star_dss_plugin.evaluate.moved_weights import MovedWeights


def run(monkeypatch, *argv):
    """Return the exit status of `star-dss landscape` with these arguments."""
    return run_command(monkeypatch, "landscape", *argv)


@pytest.fixture
def prompts_file(tmp_path):
    """Return a file of two prompts."""
    path = tmp_path / "prompts.jsonl"
    rows = [{"prompt": "is this bad?"}, {"prompt": "who is lazy?"}, {"prompt": PROMPTS[1]}]
    path.write_text("".join(json.dumps(r) + "\n" for r in rows[:2]))
    return path


SMALL = ("--max-new-tokens", 6, "--steps", 2, "-q", "--device", "cpu")
JUDGE = json.dumps({"preset": "test-words", "word": "e"})


def test_landscape_measures_points_writes_a_figure_and_resumes(
    monkeypatch, capsys, prompts_file, model_dir, tmp_path
):
    pytest.importorskip("matplotlib")
    out = tmp_path / "out"
    common = (model_dir, "--prompts", prompts_file, "--judge", JUDGE, *SMALL)
    assert run(monkeypatch, *common, "-o", out, "--directions", 2) == 0
    printed = capsys.readouterr().out
    assert "6 points (5 distinct), 0 of them known, 2 prompts each, judged by test-words" in printed
    assert "VISAGE" in printed
    assert (out / "landscape.png").stat().st_size > 5000
    found = json.loads((out / "landscape.json").read_text())
    rates = [p["attack_success"] for c in found["curves"] for p in c["points"]]
    assert found["visage"] == pytest.approx(slow_visage(rates))
    assert found["points"] == 6
    assert found["centre"] == rates[1] == rates[4]

    points = out / "points.jsonl"
    lines = points.read_text().splitlines(keepends=True)
    assert len(lines) == 6
    points.write_text("".join(lines[:3]) + lines[3][:10])
    judged = []
    scores = WordGuard.score
    monkeypatch.setattr(WordGuard, "score", lambda self, c: judged.append(c) or scores(self, c))
    assert run(monkeypatch, *common, "-o", out, "--directions", 2, "--batch-size", 1) == 0
    assert "2 of them known" in capsys.readouterr().out
    assert len(judged) == 3
    assert json.loads((out / "landscape.json").read_text()) == found
    # More points of the same landscape are added; another landscape is refused.
    assert run(monkeypatch, *common, "-o", out, "--directions", 3, "--no-figure") == 0
    assert "5 of them known" in capsys.readouterr().out
    assert run(monkeypatch, *common, "-o", out, "--seed", 1) == 2
    assert "seed was 0 and is now 1" in capsys.readouterr().err
    assert len(points.read_text().splitlines()) == 8


def test_points_of_answers_that_another_token_ends_are_refused(
    monkeypatch, capsys, prompts_file, model_dir, tmp_path
):
    folder = tmp_path / "model"
    shutil.copytree(model_dir, folder)
    words = (folder, "--prompts", prompts_file, "-o", tmp_path / "out", "--no-figure", *SMALL)
    assert run(monkeypatch, *words, "--directions", 1) == 0
    GenerationConfig(eos_token_id=7).save_pretrained(folder)
    assert run(monkeypatch, *words, "--directions", 1) == 2
    assert "ends was" in capsys.readouterr().err


def test_answers_at_a_place_are_those_of_a_model_with_these_weights(
    monkeypatch, prompts_file, model_dir, tmp_path
):
    """Compared with a model that was saved with the weights of that place."""
    out = tmp_path / "out"
    seen = []
    scores = WordGuard.score

    def score(self, conversations):
        seen.append([conversation[-1]["content"] for conversation in conversations])
        return scores(self, conversations)

    monkeypatch.setattr(WordGuard, "score", score)
    common = ("--prompts", prompts_file, "--judge", JUDGE, *SMALL, "--no-figure")
    assert run(monkeypatch, model_dir, *common, "-o", out, "--directions", 1) == 0
    model, tokenizer = load_whole_model(str(model_dir))
    weights = MovedWeights(model)
    weights.move((("random 1", 0.5),))
    model.save_pretrained(tmp_path / "moved")
    tokenizer.save_pretrained(tmp_path / "moved")
    last = seen[2]
    seen.clear()
    args = (tmp_path / "moved", *common, "-o", tmp_path / "other", "--directions", 1)
    assert run(monkeypatch, *args) == 0
    assert seen[1] == last
    assert seen[0] != last


def test_landscape_measures_the_line_toward_another_model(
    monkeypatch, capsys, prompts_file, model_dir, tokenizer, tmp_path
):
    pytest.importorskip("matplotlib")
    other = tmp_path / "other"
    tiny_llama(len(tokenizer), seed=1).save_pretrained(other)
    tokenizer.save_pretrained(other)
    common = (model_dir, "--prompts", prompts_file, "--judge", JUDGE, *SMALL, "--toward", other)
    assert run(monkeypatch, *common, "-o", tmp_path / "line", "--beyond", 0.5) == 0
    out = capsys.readouterr().out
    assert "+1.500" in out
    assert "VISAGE" not in out
    found = json.loads((tmp_path / "line" / "landscape.json").read_text())
    assert [p["at"] for p in found["curves"][0]["points"]] == [[-0.5], [0], [0.5], [1], [1.5]]
    assert found["visage"] is None
    assert run(monkeypatch, *common, "-o", tmp_path / "plane", "--grid") == 0
    found = json.loads((tmp_path / "plane" / "landscape.json").read_text())
    assert len(found["curves"][0]["points"]) == 9
    assert (tmp_path / "plane" / "landscape.png").stat().st_size > 5000


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"--steps": 3}, "even number"),
        ({"--beyond": 1}, "Name it with --toward"),
        ({"--judge": "test-wordz"}, "Did you mean 'test-words'"),
        ({"--prompts": "none.jsonl"}, "cannot be read"),
        ({"--prompts": "rows.jsonl"}, "The harmful prompts: Row 0: the row has the columns"),
        ({"--dtype": "int8"}, "dtype is 'int8'"),
        ({"--device": "abacus"}, "device is 'abacus'"),
        ({"-o": "rows.jsonl"}, "is a file"),
        ({"model": "no/such-model"}, "'no/such-model' cannot be loaded"),
        ({"--toward": "wider"}, "no line between these models"),
    ],
)
def test_landscape_refuses_wrong_options(
    monkeypatch, capsys, prompts_file, model_dir, tmp_path, changes, message
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").write_text('{"text": "x"}\n')
    if "--toward" in changes:
        tiny_llama(400, hidden_size=64).save_pretrained("wider")
        load_whole_model(str(model_dir))[1].save_pretrained("wider")
    options = {
        "model": model_dir,
        "--prompts": prompts_file,
        "--no-figure": None,
        "-q": None,
        **changes,
    }
    model = options.pop("model")
    argv = [x for pair in options.items() for x in pair if x is not None]
    assert run(monkeypatch, model, *argv) == 2
    err = " ".join(capsys.readouterr().err.split())
    assert message in err
    assert "Traceback" not in err


def test_figures_of_several_models(tmp_path):
    pytest.importorskip("matplotlib")
    samples = random_lines(directions=2, steps=2)
    one = assemble_landscape(samples, {s.place: [True, False] for s in samples})
    write_landscape({"start $x$": one, "sft": one}, tmp_path / "new" / "both.png")
    assert (tmp_path / "new" / "both.png").read_bytes()[:4] == b"\x89PNG"
    plane = grid(steps=2)
    flat = assemble_landscape(plane, {s.place: [True] for s in plane})
    with pytest.raises(ConfigError, match="one landscape at a time"):
        write_landscape({"a": flat, "b": one}, tmp_path / "no.png")
