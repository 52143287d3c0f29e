"""Moving a model's weights, and restoring them to the last bit."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.landscape import PLACE, PROMPTS
from support.models import tiny_llama
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from star_dss_plugin import ConfigError
from star_dss_plugin.evaluate.landscape import (
    measure,
)
from star_dss_plugin.evaluate.moved_weights import MovedWeights, direction


def bits(model):
    """Return the bytes of each parameter."""
    return {
        name: w.detach().contiguous().view(torch.uint8).numpy().tobytes()
        for name, w in model.named_parameters()
    }


def slow_norm(tensor):
    """Return the norm, computed one number at a time with an exact sum."""
    return math.sqrt(math.fsum(x * x for x in tensor.double().reshape(-1).tolist()))


@settings(deadline=None, max_examples=40)
@given(
    shape=st.lists(st.integers(1, 7), max_size=3),
    seed=st.integers(0, 2**63),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16]),
    scale=st.floats(1e-3, 1e3),
)
def test_a_direction_has_the_norm_of_its_weight(shape, seed, dtype, scale):
    torch.manual_seed(seed % 1000)
    weight = (torch.randn(shape) * scale).to(dtype)
    found = direction("w", weight, seed=seed, direction_name="random 1")
    assert found.shape == weight.shape
    assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert slow_norm(found) == pytest.approx(slow_norm(weight), rel=1e-6, abs=1e-12)


def test_directions_are_gaussian_and_independent():
    weight = torch.ones(100, 100, dtype=torch.float64)
    found = direction("w", weight, seed=0, direction_name="random 1").reshape(-1)
    assert found.mean().abs() < 0.05
    kurtosis = (found**4).mean() / (found**2).mean() ** 2
    assert kurtosis == pytest.approx(3, abs=0.2)
    assert torch.equal(found, direction("w", weight, seed=0, direction_name="random 1").reshape(-1))
    for name, seed, which in (("v", 0, "random 1"), ("w", 1, "random 1"), ("w", 0, "random 2")):
        other = direction(name, weight, seed=seed, direction_name=which).reshape(-1)
        assert abs(torch.nn.functional.cosine_similarity(found, other, dim=0)) < 0.05
    # The same direction in every precision, so that models of two precisions can be compared.
    half = direction("w", weight.bfloat16(), seed=0, direction_name="random 1").reshape(-1)
    assert torch.allclose(found.float(), half, rtol=1e-6)
    assert not direction("w", torch.zeros(3), seed=0, direction_name="random 1").any()


def test_weights_move_by_a_share_of_their_norm_and_norm_layers_do_not():
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
            one = direction(name, start, seed=3, direction_name="random 1")
            two = direction(name, start, seed=3, direction_name="random 2")
            assert torch.allclose(w, start - 0.5 * one + 0.2 * two, rtol=1e-12, atol=1e-13)
        weights.move(PLACE)  # from the original weights, not from the moved ones
        for name in ("model.embed_tokens.weight", "model.layers.0.self_attn.q_proj.bias"):
            moved = model.get_parameter(name) - before[name]
            assert slow_norm(moved) == pytest.approx(0.25 * slow_norm(before[name]), rel=1e-9)


def test_norm_layers_are_recognized_by_their_class():
    model = GPT2LMHeadModel(GPT2Config(vocab_size=50, n_embd=16, n_layer=1, n_head=2))
    torch.nn.init.normal_(model.transformer.h[0].attn.c_attn.bias)
    before = bits(model)
    with MovedWeights(model) as weights:
        weights.move(PLACE)
        stay = {name for name, now in bits(model).items() if now == before[name]}
    zeros = {n for n, w in model.named_parameters() if not w.any()}
    assert stay == {n for n in before if ".ln_" in n} | zeros
    assert "transformer.h.0.attn.c_attn.bias" not in stay


def test_tied_weights_are_moved_once():
    model = tiny_llama()
    tied = model.lm_head.weight
    assert tied.data_ptr() == model.model.embed_tokens.weight.data_ptr()
    start = tied.detach().clone()
    with MovedWeights(model) as weights:
        weights.move(PLACE)
        assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
        assert slow_norm(tied - start) == pytest.approx(0.25 * slow_norm(start), rel=1e-5)
    # Two parameters in one memory, which named_parameters lists twice.
    pair = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    pair[1].weight = nn.Parameter(pair[0].weight.data)
    start = pair[0].weight.detach().clone()
    with MovedWeights(pair) as weights:
        weights.move(PLACE)
        assert slow_norm(pair[1].weight - start) == pytest.approx(0.25 * slow_norm(start), rel=1e-5)
    assert torch.equal(pair[0].weight, start)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("end", [None, RuntimeError, KeyboardInterrupt])
def test_weights_are_restored_to_the_last_bit(dtype, end):
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

    places = [(), PLACE, (("random 2", -0.5),)]

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


def test_weights_are_restored_despite_a_second_interrupt(monkeypatch):
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
        weights.move(PLACE)
    assert bits(model) == before


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_line_toward_another_model_ends_at_its_weights(dtype):
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


def test_weights_that_cannot_move_are_refused():
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


def test_an_unmerged_adapter_is_refused():
    peft = pytest.importorskip("peft")
    adapted = peft.get_peft_model(tiny_llama(), peft.LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ConfigError, match="merge_and_unload"):
        MovedWeights(adapted)
