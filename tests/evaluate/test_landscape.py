"""The safety landscape: how weights move and come back, VISAGE, resuming, the command."""

import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.commands import run_command
from support.guards import WordGuard
from support.models import tiny_llama
from support.paths import ROOT
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel
from typer.main import get_command

from star_dss_plugin import ConfigError, DataError
from star_dss_plugin.cli import app as cli
from star_dss_plugin.cli import landscape as landscape_command
from star_dss_plugin.evaluate.landscape import (
    attack_success,
    grid,
    measure,
    random_lines,
    toward_line,
    visage,
)
from star_dss_plugin.evaluate.landscape_figure import write_landscape
from star_dss_plugin.evaluate.landscape_points import PointsFile, put_together
from star_dss_plugin.evaluate.models import load_whole_model
from star_dss_plugin.evaluate.moved_weights import MovedWeights, direction
from star_dss_plugin.models import weights_digest

PROMPTS = [[{"role": "user", "content": text}] for text in ("is this bad?", "hello world")]
OUT = (("random 1", 0.25),)


def bits(model):
    return {
        name: w.detach().contiguous().view(torch.uint8).numpy().tobytes()
        for name, w in model.named_parameters()
    }


# The slow twins: one number at a time, with exact sums.


def slow_norm(tensor):
    return math.sqrt(math.fsum(x * x for x in tensor.double().reshape(-1).tolist()))


def slow_visage(rates):
    total, count = 0.0, 0
    for rate in rates:
        if rate < 100:
            total, count = total + (100 - rate), count + 1
    return total / count if count else 0.0


@settings(deadline=None, max_examples=40)
@given(
    shape=st.lists(st.integers(1, 7), max_size=3),
    seed=st.integers(0, 2**63),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16]),
    scale=st.floats(1e-3, 1e3),
)
def test_a_direction_is_as_long_as_its_weight(shape, seed, dtype, scale):
    torch.manual_seed(seed % 1000)
    weight = (torch.randn(shape) * scale).to(dtype)
    found = direction("w", weight, seed=seed, which="random 1")
    assert found.shape == weight.shape
    assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert slow_norm(found) == pytest.approx(slow_norm(weight), rel=1e-6, abs=1e-12)


def test_a_direction_is_gaussian_and_its_own():
    weight = torch.ones(100, 100, dtype=torch.float64)
    found = direction("w", weight, seed=0, which="random 1").reshape(-1)
    assert found.mean().abs() < 0.05
    kurtosis = (found**4).mean() / (found**2).mean() ** 2
    assert kurtosis == pytest.approx(3, abs=0.2)
    assert torch.equal(found, direction("w", weight, seed=0, which="random 1").reshape(-1))
    for name, seed, which in (("v", 0, "random 1"), ("w", 1, "random 1"), ("w", 0, "random 2")):
        other = direction(name, weight, seed=seed, which=which).reshape(-1)
        assert abs(torch.nn.functional.cosine_similarity(found, other, dim=0)) < 0.05
    # The same direction in every precision, so that models of two precisions can be compared.
    half = direction("w", weight.bfloat16(), seed=0, which="random 1").reshape(-1)
    assert torch.allclose(found.float(), half, rtol=1e-6)
    assert not direction("w", torch.zeros(3), seed=0, which="random 1").any()


def test_weights_move_by_the_share_of_their_norm_and_norm_layers_stay():
    model = tiny_llama(attention_bias=True).double()
    torch.nn.init.normal_(model.model.layers[0].self_attn.q_proj.bias)
    before = {name: w.detach().clone() for name, w in model.named_parameters()}
    with MovedWeights(model, seed=3) as weights:
        weights.move((("random 1", -0.5), ("random 2", 0.2)))
        for name, w in model.named_parameters():
            start = before[name]
            if "norm" in name:
                assert torch.equal(w, start)
                continue
            one = direction(name, start, seed=3, which="random 1")
            two = direction(name, start, seed=3, which="random 2")
            assert torch.allclose(w, start - 0.5 * one + 0.2 * two, rtol=1e-12, atol=1e-13)
        weights.move(OUT)  # from the original weights, not from where they are
        for name in ("model.embed_tokens.weight", "model.layers.0.self_attn.q_proj.bias"):
            moved = model.get_parameter(name) - before[name]
            assert slow_norm(moved) == pytest.approx(0.25 * slow_norm(before[name]), rel=1e-9)


def test_norm_layers_are_known_by_their_class_too():
    model = GPT2LMHeadModel(GPT2Config(vocab_size=50, n_embd=16, n_layer=1, n_head=2))
    torch.nn.init.normal_(model.transformer.h[0].attn.c_attn.bias)
    before = bits(model)
    with MovedWeights(model) as weights:
        weights.move(OUT)
        stay = {name for name, now in bits(model).items() if now == before[name]}
    zeros = {n for n, w in model.named_parameters() if not w.any()}
    assert stay == {n for n in before if ".ln_" in n} | zeros
    assert "transformer.h.0.attn.c_attn.bias" not in stay


def test_tied_weights_are_one_weight():
    model = tiny_llama()
    tied = model.lm_head.weight
    assert tied.data_ptr() == model.model.embed_tokens.weight.data_ptr()
    start = tied.detach().clone()
    with MovedWeights(model) as weights:
        weights.move(OUT)
        assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
        assert slow_norm(tied - start) == pytest.approx(0.25 * slow_norm(start), rel=1e-5)
    # Two parameters in one memory, which named_parameters lists twice.
    pair = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    pair[1].weight = nn.Parameter(pair[0].weight.data)
    start = pair[0].weight.detach().clone()
    with MovedWeights(pair) as weights:
        weights.move(OUT)
        assert slow_norm(pair[1].weight - start) == pytest.approx(0.25 * slow_norm(start), rel=1e-5)
    assert torch.equal(pair[0].weight, start)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("end", [None, RuntimeError, KeyboardInterrupt])
def test_weights_come_back_to_the_last_bit(dtype, end):
    model = tiny_llama(tie_word_embeddings=dtype == torch.bfloat16).to(dtype)
    with torch.no_grad():  # bits that arithmetic would lose
        model.model.norm.weight[:2] = torch.tensor([-0.0, float("nan")])
        model.lm_head.weight[0, 0] = -0.0
    before = bits(model)
    kept = []

    def answer(moved):
        assert (bits(moved) == before) == (not kept)  # the first place is the model itself
        if end is not None and len(kept) == 2:
            raise end("stop")
        return ["no"] * len(PROMPTS)

    def judge(prompts, answers):
        return [True] * len(answers)

    def keep(place, safe):
        kept.append(place)

    places = [(), OUT, (("random 2", -0.5),)]

    def run():
        with MovedWeights(model) as weights:
            measure(weights, model, places, PROMPTS, answer, judge, keep)

    if end is None:
        run()
        assert kept == places
    else:
        with pytest.raises(end, match="stop"):
            run()
        assert kept == places[:2]
    assert bits(model) == before


def test_a_second_interrupt_while_weights_come_back(monkeypatch):
    model = tiny_llama()
    before = bits(model)
    move, calls = MovedWeights.move, []

    def interrupted(self, place):
        calls.append(place)
        if place == () and calls.count(()) == 1:
            raise KeyboardInterrupt
        move(self, place)

    monkeypatch.setattr(MovedWeights, "move", interrupted)
    with pytest.raises(KeyboardInterrupt), MovedWeights(model) as weights:
        weights.move(OUT)
    assert bits(model) == before


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_way_to_another_model_ends_there(dtype):
    model, other = tiny_llama().to(dtype), tiny_llama(seed=1).to(dtype)
    torch.nn.init.normal_(other.model.norm.weight)
    start = {name: w.detach().clone() for name, w in model.named_parameters()}
    ends = bits(other)
    with MovedWeights(model, other=other) as weights:
        weights.move((("toward", 1.0),))
        assert bits(model) == ends  # norm layers too
        weights.move((("toward", -0.5),))
        for name, w in other.named_parameters():
            expected = 1.5 * start[name].double() - 0.5 * w.double()
            found = model.get_parameter(name).double()
            assert torch.allclose(found, expected, rtol=1e-2, atol=1e-2)
        weights.move((("toward", 1.0), ("random 1", 0.5)))
        moved = model.lm_head.weight.double() - other.lm_head.weight.double()
        wanted = 0.5 * slow_norm(start["model.embed_tokens.weight"])
        assert slow_norm(moved) == pytest.approx(wanted, rel=1e-2)
    assert bits(other) == ends
    assert all(torch.equal(w, start[name]) for name, w in model.named_parameters())


def test_weights_that_cannot_move():
    with pytest.raises(ConfigError, match=r"lm_head.weight is missing in the first"):
        MovedWeights(tiny_llama(), other=tiny_llama(tie_word_embeddings=False))
    with pytest.raises(ConfigError, match=r"of shape \(400, 32\) in the first"):
        MovedWeights(tiny_llama(), other=tiny_llama(vocab=300))
    with torch.device("meta"):
        model = nn.Linear(2, 2)
    with pytest.raises(ConfigError, match="weight is not in memory"):
        MovedWeights(model)
    quantized = nn.Linear(2, 2)
    quantized.weight = nn.Parameter(torch.ones(2, 2, dtype=torch.int8), requires_grad=False)
    with pytest.raises(ConfigError, match=r"torch.int8.*not quantized"):
        MovedWeights(quantized)
    with pytest.raises(ConfigError, match="no weights"):
        MovedWeights(nn.ReLU())
    with MovedWeights(nn.Linear(2, 2)) as weights, pytest.raises(ConfigError, match="none was"):
        weights.move((("toward", 1.0),))


def test_an_adapter_must_be_merged():
    peft = pytest.importorskip("peft")
    adapted = peft.get_peft_model(tiny_llama(), peft.LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ConfigError, match="merge_and_unload"):
        MovedWeights(adapted)


@settings(deadline=None, max_examples=200)
@given(st.lists(st.one_of(st.just(100.0), st.floats(0, 100)), max_size=30))
def test_visage_is_the_mean_margin(rates):
    found = visage(rates)
    assert found == pytest.approx(slow_visage(rates), rel=1e-12, abs=1e-300)
    assert 0 <= found <= 100
    assert visage([*rates, 100.0]) == found  # where every attack succeeds nothing is added


def test_visage_of_known_curves():
    assert visage([100, 0, 0, 0, 100]) == 100
    assert visage([100, 75, 25, 75, 100]) == pytest.approx((25 + 75 + 25) / 3)
    assert visage([100, 100]) == 0
    assert visage([]) == 0
    for wrong in (-0.1, 100.1, float("nan")):
        with pytest.raises(ConfigError, match="0 to 100"):
            visage([wrong])
    assert attack_success([True, False, False, True, True]) == 40


def test_the_points():
    lines = random_lines()
    assert len(lines) == 3 * 21
    assert len({s.place for s in lines}) == 61  # the model itself is on each line
    alphas = [s.at[0] for s in lines if s.curve == "direction 2"]
    assert alphas == pytest.approx([-0.5 + 0.05 * i for i in range(21)])
    assert alphas[10] == 0
    assert lines[21 + 10].place == ()
    assert lines[20].place == (("random 1", 0.5),)

    toward = toward_line(steps=4, beyond=0.5)
    assert [s.at[0] for s in toward] == [-0.5, -0.25, 0, 0.25, 0.5, 0.75, 1, 1.25, 1.5]
    assert [s.place for s in toward_line(steps=1)] == [(), (("toward", 1.0),)]
    plane = grid(steps=20)
    assert len(plane) == 441
    assert {s.place for s in plane if s.at == (0, 0.5)} == {(("random 2", 0.5),)}
    mixed = grid(steps=2, toward=True)
    assert {name for s in mixed for name, _ in s.place} == {"toward", "random 1"}
    assert {s.at[0] for s in mixed} == {0, 0.5, 1}
    for make, message in (
        (lambda: random_lines(steps=3), "even number"),
        (lambda: random_lines(directions=0), "directions is 0"),
        (lambda: random_lines(radius=0), "radius is 0"),
        (lambda: toward_line(steps=0), "steps is 0"),
        (lambda: toward_line(beyond=-1), "beyond is -1"),
        (lambda: grid(steps=3, radius=math.inf), "even number"),
    ):
        with pytest.raises(ConfigError, match=message):
            make()


def test_answers_and_verdicts_are_counted():
    model = tiny_llama()
    for answers, verdicts in ((["a"], [True]), (["a", "b"], [True])):
        with (
            MovedWeights(model) as weights,
            pytest.raises(ConfigError, match=f"got {len(answers)} answers and 1 verdicts"),
        ):
            measure(
                weights,
                model,
                [()],
                PROMPTS,
                lambda m, a=answers: a,
                lambda p, a, v=verdicts: v,
                lambda *_: pytest.fail("kept"),
            )


def test_a_landscape_is_put_together():
    samples = random_lines(directions=2, steps=2)
    safe = {(): [True, True], (("random 1", -0.5),): [False, False]}
    safe[(("random 1", 0.5),)] = safe[(("random 2", 0.5),)] = [True, False]
    safe[(("random 2", -0.5),)] = [True, True]
    found = put_together(samples, safe)
    one, two = ([p.attack_success for p in c.points] for c in found.curves)
    assert (one, two) == ([100, 0, 50], [0, 0, 50])
    assert [c.visage for c in found.curves] == [75, pytest.approx(250 / 3)]
    assert found.visage == pytest.approx((100 + 50 + 100 + 100 + 50) / 5)
    assert (found.points, found.points_below, found.prompts, found.centre) == (6, 5, 2, 0)
    toward = put_together(toward_line(1), {(): [True], (("toward", 1.0),): [False]})
    assert (toward.visage, toward.curves[0].visage, toward.centre) == (None, None, 0)


# The file of points.

BOUND = {"model": "a" * 64, "seed": 0, "judge": {"guard": ("x", 1)}}


def test_points_are_kept_and_half_a_line_is_not(tmp_path):
    path = tmp_path / "new" / "points.jsonl"
    file = PointsFile(path, BOUND, 2)
    assert file.known == {}
    file.add((), [True, False])
    file.add(OUT, [False, False])
    again = PointsFile(path, BOUND, 2)
    assert again.known == {(): [True, False], OUT: [False, False]}
    path.write_bytes(path.read_bytes()[:-7])  # a killed run
    torn = PointsFile(path, BOUND, 2)
    assert torn.known == {(): [True, False]}
    torn.add(OUT, [True, True])
    assert PointsFile(path, BOUND, 2).known == {(): [True, False], OUT: [True, True]}
    path.write_bytes(path.read_bytes()[:9])  # killed while the first line was written
    empty = PointsFile(path, BOUND, 2)
    empty.add((), [True, True])
    assert PointsFile(path, BOUND, 2).known == {(): [True, True]}


def test_points_of_another_landscape_are_refused(tmp_path):
    path = tmp_path / "points.jsonl"
    PointsFile(path, BOUND, 2).add((), [True, False])
    with pytest.raises(ConfigError, match=r"seed was 0 and is now 1.*Name another output folder"):
        PointsFile(path, {**BOUND, "seed": 1}, 2)
    with pytest.raises(ConfigError, match=r"model was \"aaa.*… and is now"):
        PointsFile(path, {**BOUND, "model": "b" * 64}, 2)
    with pytest.raises(DataError, match="2 verdicts for 3 prompts"):
        PointsFile(path, BOUND, 3)
    for text in ("[1]\n", "no json\n", '{"a": 1}\n', path.read_text() + '{"place": 3}\n'):
        path.write_text(text)
        with pytest.raises(DataError, match="not what a landscape writes"):
            PointsFile(path, BOUND, 2)


# The command.


def run(monkeypatch, *argv):
    return run_command(monkeypatch, "landscape", *argv)


@pytest.fixture
def asked(tmp_path):
    path = tmp_path / "prompts.jsonl"
    rows = [{"prompt": "is this bad?"}, {"prompt": "who is lazy?"}, {"prompt": PROMPTS[1]}]
    path.write_text("".join(json.dumps(r) + "\n" for r in rows[:2]))
    return path


SMALL = ("--max-new-tokens", 6, "--steps", 2, "-q", "--device", "cpu")
JUDGE = json.dumps({"preset": "test-words", "word": "e"})


def test_the_command_measures_draws_and_goes_on(monkeypatch, capsys, asked, model_dir, tmp_path):
    pytest.importorskip("matplotlib")
    out = tmp_path / "out"
    common = (model_dir, "--prompts", asked, "--judge", JUDGE, *SMALL)
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
    # More points of the same landscape; then a landscape that is not the same.
    assert run(monkeypatch, *common, "-o", out, "--directions", 3, "--no-figure") == 0
    assert "5 of them known" in capsys.readouterr().out
    assert run(monkeypatch, *common, "-o", out, "--seed", 1) == 2
    assert "seed was 0 and is now 1" in capsys.readouterr().err
    assert len(points.read_text().splitlines()) == 8


def test_the_answers_are_those_of_the_moved_model(monkeypatch, asked, model_dir, tmp_path):
    """What the command measures at a place is what a model saved with those weights answers."""
    out = tmp_path / "out"
    seen = {}

    def judge(name, threshold, device):
        def verdicts(prompts, answers):
            seen[len(seen)] = answers
            return [True, False]

        return landscape_command._Judged(verdicts, name, name)

    monkeypatch.setattr(landscape_command, "_judge", judge)
    common = ("--prompts", asked, *SMALL, "--no-figure")
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


def test_the_way_to_another_model(monkeypatch, capsys, asked, model_dir, tokenizer, tmp_path):
    pytest.importorskip("matplotlib")
    other = tmp_path / "other"
    tiny_llama(len(tokenizer), seed=1).save_pretrained(other)
    tokenizer.save_pretrained(other)
    common = (model_dir, "--prompts", asked, "--judge", JUDGE, *SMALL, "--toward", other)
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
def test_it_fails_in_words(monkeypatch, capsys, asked, model_dir, tmp_path, changes, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").write_text('{"text": "x"}\n')
    if "--toward" in changes:
        tiny_llama(400, hidden_size=64).save_pretrained("wider")
        load_whole_model(str(model_dir))[1].save_pretrained("wider")
    options = {"model": model_dir, "--prompts": asked, "--no-figure": None, "-q": None, **changes}
    model = options.pop("model")
    argv = [x for pair in options.items() for x in pair if x is not None]
    assert run(monkeypatch, model, *argv) == 2
    err = " ".join(capsys.readouterr().err.split())
    assert message in err
    assert "Traceback" not in err


def test_an_adapter_is_merged(model_dir, tmp_path):
    peft = pytest.importorskip("peft")
    base, tokenizer = load_whole_model(str(model_dir))
    plain = weights_digest(base)
    config = peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False)
    adapted = peft.get_peft_model(base, config)
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        expected = adapted.eval()(ids).logits
    adapted.peft_config["default"].base_model_name_or_path = str(model_dir)
    adapted.save_pretrained(tmp_path / "adapter")
    tokenizer.save_pretrained(tmp_path / "adapter")
    merged, _ = load_whole_model(str(tmp_path / "adapter"))
    assert not any("lora" in name for name, _ in merged.named_parameters())
    with torch.no_grad():
        assert torch.allclose(merged(ids).logits, expected, atol=1e-5)
    assert weights_digest(merged) != plain
    assert weights_digest(load_whole_model(str(model_dir))[0]) == plain
    with MovedWeights(merged) as weights:
        weights.move(OUT)


def test_weights_that_are_missing_are_not_made_up(model_dir, tmp_path):
    from safetensors.torch import load_file, save_file

    model, tokenizer = load_whole_model(str(model_dir))
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    held = load_file(tmp_path / "model.safetensors")
    del held["model.layers.0.mlp.up_proj.weight"]
    save_file(held, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=r"lack the weights.*up_proj"):
        load_whole_model(str(tmp_path))


def test_figures_of_several_models(tmp_path):
    pytest.importorskip("matplotlib")
    samples = random_lines(directions=2, steps=2)
    one = put_together(samples, {s.place: [True, False] for s in samples})
    write_landscape({"start $x$": one, "sft": one}, tmp_path / "new" / "both.png")
    assert (tmp_path / "new" / "both.png").read_bytes()[:4] == b"\x89PNG"
    plane = grid(steps=2)
    flat = put_together(plane, {s.place: [True] for s in plane})
    with pytest.raises(ConfigError, match="one landscape at a time"):
        write_landscape({"a": flat, "b": one}, tmp_path / "no.png")


def test_every_option_is_documented():

    docs = ROOT / "docs"
    for command in ("evaluate", "landscape", "capability"):
        text = (docs / f"{command}.md").read_text()
        rows = [line for line in text.splitlines() if line.startswith("| `-")]
        for param in get_command(cli.app).commands[command].params:
            for name in (o for o in param.opts if o.startswith("-") and o != "--help"):
                default = "none" if param.default is None else str(param.default)
                default = "required" if param.required else default
                row = next(r for r in rows if f"`{name}`" in r.split("|")[1])
                assert row.split("|")[2].strip().strip("`") == default, name
