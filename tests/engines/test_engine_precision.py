"""The local engine in bfloat16 and float64, and its linear layers with oneDNN."""

from __future__ import annotations

import pytest
import torch
from support.engine_models import (
    COMMON,
    LABELS,
    VOCABULARY,
    draw,
    make,
    one_pass_per_sequence,
    prompts,
    served,
    shapes,
)
from support.models import real_model
from torch import nn
from torch.profiler import profile
from transformers import LlamaConfig

from star_dss_plugin.engines.local import LocalEngine
from star_dss_plugin.engines.shared_prefix import savings
from star_dss_plugin.engines.shared_prefix.savings import OneDnnLinear


def test_bfloat16_probabilities_are_near_those_in_float32() -> None:
    config = LlamaConfig(**{**COMMON, "initializer_range": 0.1})
    half = make(config).bfloat16()
    full = make(config)
    full.load_state_dict(half.state_dict())
    engine = LocalEngine(half)
    assert engine._plain_path_reason is None  # the fast path, not the fallback
    for sequences in shapes().values():
        got = engine.label_logprobs([sequences], range(VOCABULARY))[0]
        assert got.dtype == torch.float32
        expected = one_pass_per_sequence(full, sequences, range(VOCABULARY))
        assert (got.exp() - expected.exp()).abs().max() <= 2e-2


def test_a_real_model_in_bfloat16_takes_the_fast_path(tmp_path_factory) -> None:
    """Rounding errors grow with depth and vocabulary, so tiny models would not show them."""
    model = real_model(tmp_path_factory)[0].bfloat16()
    assert LocalEngine(model)._plain_path_reason is None
    model.model.layers[3].self_attn.layer_idx = 2  # two layers that share one cache entry
    assert "apart" in (LocalEngine(model)._plain_path_reason or "")


def test_bfloat16_is_as_near_float32_as_one_pass_is_and_has_no_bias() -> None:
    config = LlamaConfig(**{**COMMON, "initializer_range": 0.1})
    half = make(config).bfloat16()
    full = make(config)
    full.load_state_dict(half.state_dict())
    engine = LocalEngine(half)
    off, off_alone, apart = [], [], []
    for seed in range(36):
        head, response, tail = draw(10, 60, 5, seed=seed)
        sequences = [head + response[:k] + tail for k in range(0, 60, 3)]
        got = engine.label_logprobs([sequences], range(VOCABULARY))[0].exp()
        alone, exact = (
            one_pass_per_sequence(m, sequences, range(VOCABULARY)).exp() for m in (half, full)
        )
        off.append(got - exact)
        off_alone.append(alone - exact)
        apart.append(got - alone)
    error, error_alone = (torch.cat(d).square().mean().sqrt() for d in (off, off_alone))
    assert error <= 1.2 * error_alone
    difference = torch.cat(apart)
    assert difference.abs().max() <= 2e-2
    # A bias would be the same in all prompts; random errors average out over 720 of them.
    assert difference.mean(0).abs().max() <= 0.25 * difference.square().mean().sqrt()


@pytest.mark.skipif(not savings._USABLE, reason="this PyTorch has no oneDNN for linear layers")
@pytest.mark.parametrize("shape", [(5,), (7, 5), (2, 7, 5), (0, 5)])
@pytest.mark.parametrize("bias", [None, torch.randn(3)])
def test_onednn_computes_float32_linear_layers(
    shape: tuple[int, ...], bias: torch.Tensor | None
) -> None:
    x, weight = torch.randn(*shape), torch.randn(5, 3).t()
    expected = torch.nn.functional.linear(x, weight, bias)
    with torch.inference_mode(), OneDnnLinear(), profile() as run:
        got = torch.nn.functional.linear(x, weight, bias)
    assert got.shape == expected.shape
    assert torch.allclose(got, expected, atol=1e-5)
    used = any("mkldnn::_linear" in event.key for event in run.key_averages())
    assert used == (x.numel() > 0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_onednn_leaves_other_linear_layers_alone(dtype: torch.dtype) -> None:
    x, weight = torch.randn(2, 7, 5, dtype=dtype), torch.randn(3, 5, dtype=dtype)
    expected = torch.nn.functional.linear(x, weight)
    with torch.inference_mode(), OneDnnLinear():
        assert torch.equal(torch.nn.functional.linear(x, weight), expected)
    trained = torch.nn.Linear(5, 3)
    with OneDnnLinear():  # must not replace the kernel where a gradient is needed
        trained(torch.randn(2, 5)).sum().backward()
    assert trained.weight.grad is not None


def test_default_dtypes_devices_and_autocast_change_nothing() -> None:
    model = served("llama")
    expected = LocalEngine(model).label_logprobs([prompts()], LABELS)[0]
    for dtype in (torch.float64, torch.bfloat16):
        torch.set_default_dtype(dtype)
        try:
            engine = LocalEngine(model)
            got = engine.label_logprobs([prompts()], LABELS)[0]
        finally:
            torch.set_default_dtype(torch.float32)
        assert engine._plain_path_reason is None
        assert got.dtype == torch.float32
        assert torch.equal(got, expected)
    group = prompts()
    for context in (torch.device("meta"), torch.autocast("cpu", torch.bfloat16)):
        with context:
            got = LocalEngine(model).label_logprobs([group], LABELS)[0]
        assert torch.equal(got, expected)


def test_a_guard_in_float64_takes_the_fast_path() -> None:
    model = make(LlamaConfig(**COMMON)).double()
    engine = LocalEngine(model)
    got = engine.label_logprobs([prompts()], LABELS)[0]
    assert engine._plain_path_reason is None
    assert (got - one_pass_per_sequence(model, prompts(), LABELS)).abs().max() <= 1e-5


def test_linear_layers_that_onednn_lacks_are_left_to_torch() -> None:
    x = torch.randn(2, 3)
    with torch.inference_mode(), OneDnnLinear():
        assert torch.equal(nn.functional.linear(x, x[0]), x @ x[0])
        sparse = torch.eye(3).to_sparse_csr()
        assert torch.equal(nn.functional.linear(x, sparse), x)
        with torch.backends.mkldnn.flags(enabled=False):
            assert torch.allclose(nn.functional.linear(x, x), x @ x.T)
