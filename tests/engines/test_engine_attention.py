"""The local engine: windows, the last layer, and block-sparse attention."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.engine_models import (
    COMMON,
    LABELS,
    MODULE,
    SERVED,
    make,
    one_pass_per_sequence,
    prompts,
    served,
    shapes,
)
from torch.nn.attention import flex_attention
from transformers import LlamaConfig, Qwen2MoeConfig

from star_dss_plugin.engines.local import LocalEngine
from star_dss_plugin.engines.shared_prefix import dense, flex
from star_dss_plugin.engines.shared_prefix.flex import BlockSparse


@pytest.mark.parametrize("name", SERVED)
def test_rows_attend_only_to_the_part_of_a_trunk_that_they_share(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dense, "_SLICE_QUERIES", 1)
    attended: list[int] = []
    attend_shared = dense._attend_shared

    def watched(query: torch.Tensor, key: torch.Tensor, *others: Any) -> Any:
        attended.append(key.shape[2])
        return attend_shared(query, key, *others)

    monkeypatch.setattr(dense, "_attend_shared", watched)
    model = served(name)
    engine = LocalEngine(model)
    engine.label_logprobs([[[4]]], LABELS)
    for shape, sequences in shapes().items():
        attended.clear()
        got = engine.label_logprobs([sequences], LABELS)[0]
        assert (got - one_pass_per_sequence(model, sequences, LABELS)).abs().max() <= 1e-4, shape
        if shape == "prompts" and name == "llama":
            # Each prompt's head and its prefix of the response, without the tail.
            assert set(attended) == {10, 13, 16, 19, 22}


def test_the_last_layer_runs_only_where_it_is_read() -> None:
    model = make(SERVED["llama"]())
    engine = LocalEngine(model)
    engine.label_logprobs([[[4]]], LABELS)
    seen: dict[str, list[int]] = {"first": [], "last": [], "projection": []}
    layers = model.model.layers
    for name, part in (
        ("first", layers[0].mlp),
        ("last", layers[-1].mlp),
        ("projection", layers[-1].self_attn.o_proj),
    ):
        part.register_forward_hook(
            lambda _, inputs, output, name=name: seen[name].append(output.shape[:-1].numel())
        )
    before = engine.computed_tokens
    engine.label_logprobs([prompts()], LABELS)
    assert sum(seen["first"]) == engine.computed_tokens - before
    assert sum(seen["last"]) == sum(seen["projection"]) == len(prompts()) + 1


def test_a_last_layer_that_needs_all_columns_gets_them(caplog: pytest.LogCaptureFixture) -> None:
    class Whole(torch.nn.Module):
        """An MLP whose result depends on all columns of a row."""

        def __init__(self, mlp: torch.nn.Module) -> None:
            super().__init__()
            self.mlp = mlp
            self.length = 0

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if x.shape[1] != self.length:
                raise ValueError("columns are missing")
            found: torch.Tensor = self.mlp(x)
            return found

    model = make(SERVED["llama"]())
    last = model.model.layers[-1]
    last.mlp = Whole(last.mlp)
    last.register_forward_pre_hook(
        lambda layer, inputs: setattr(layer.mlp, "length", inputs[0].shape[1])
    )
    engine = LocalEngine(model)
    got = engine.label_logprobs([prompts()], LABELS)[0]
    assert (got - one_pass_per_sequence(model, prompts(), LABELS)).abs().max() <= 1e-4
    assert engine.distinct_tokens < sum(map(len, prompts())) / 2
    assert engine.computed_tokens < sum(map(len, prompts()))
    assert not caplog.records


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Make blocks so small that short prompts fill several; drop compiled code before and after."""
    monkeypatch.setattr(flex, "BLOCK", 16)
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.filterwarnings("ignore:flex_attention called without")
@pytest.mark.parametrize("name", SERVED)
def test_block_sparse_attention_equals_one_pass_per_sequence(
    name: str,
    small_blocks: None,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    if name != "llama":  # without compiling, which takes a trace for each shape
        monkeypatch.setattr(
            flex_attention, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True, raising=False
        )
    model = served(name)
    engine = LocalEngine(model, batch_tokens=100)
    engine._block_sparse = True
    for shape, sequences in shapes().items():
        got = engine.label_logprobs([sequences, prompts()], LABELS)
        expected = one_pass_per_sequence(model, sequences, LABELS)
        assert (got[0] - expected).abs().max() <= 1e-4, shape
        assert (got[1] - one_pass_per_sequence(model, prompts(), LABELS)).abs().max() <= 1e-4
    assert engine._block_sparse
    assert not [record for record in caplog.records if record.name == MODULE]


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    rows=st.lists(st.lists(st.integers(0, 40), min_size=1, max_size=4), max_size=3),
    columns=st.integers(1, 20),
    asked=st.integers(1, 20),
    padding=st.integers(0, 19),
    window=st.sampled_from([None, 1, 7, 100]),
)
def test_no_block_is_missing_and_few_are_too_many(
    rows: list[list[int]], columns: int, asked: int, padding: int, window: int | None
) -> None:
    """Compare the mask with plain loops over `rows`, the depths of each prefix's rows.

    The last row has padding on its left.
    """
    depths = [torch.tensor(of_prefix) for of_prefix in rows]
    count = sum(map(len, rows)) or 2
    asked, padding = min(asked, columns), min(padding, columns - 1)
    real = torch.ones(count, columns, dtype=torch.bool)
    real[-1, :padding] = False
    before = torch.cat(depths) if rows else torch.zeros(count, dtype=torch.long)
    positions = before[:, None] + torch.arange(columns)
    positions[-1] = (positions[-1] - padding).clamp(min=0)
    lengths = [int(depth.max()) + 3 for depth in depths]
    layout = BlockSparse.from_rows(
        positions, real, [len(depth) for depth in depths], depths, lengths
    )
    mask = layout._mask(asked, window)
    seen = mask.mask_mod(
        torch.tensor(0),
        torch.tensor(0),
        torch.arange(count * asked)[:, None],
        torch.arange(len(layout.owner)),
    )
    # The positions that each query may attend to, by plain loops.
    starts = [sum(lengths[:i]) for i in range(len(lengths))]
    shared_by = [i for i, depth in enumerate(depths) for _ in depth]
    expected = torch.zeros_like(seen)
    for row in range(count):
        for column in range(columns - asked, columns):
            query, place = row * asked + column - (columns - asked), int(positions[row, column])
            for key in range(int(before[row])):
                if window is None or key > place - window:
                    expected[query, starts[shared_by[row]] + key] = True
            for key in range(columns):
                near = window is None or positions[row, key] > place - window
                if real[row, key] and positions[row, key] <= place and near:
                    expected[query, sum(lengths) + row * columns + key] = True
    assert torch.equal(seen, expected)
    blocks = mask.to_dense()[0, 0].bool()
    for i, j in (seen.nonzero() // flex.BLOCK).unique(dim=0).tolist():
        assert blocks[i, j]
    # Without a window, every computed block has a position that one of its queries attends to.
    assert window is not None or blocks.sum() <= len((seen.nonzero() // flex.BLOCK).unique(dim=0))


@pytest.mark.filterwarnings("ignore:flex_attention called without")
@pytest.mark.parametrize("passes", [0, 1, 5])
def test_a_kernel_that_fails_is_replaced_by_dense_attention(
    passes: int,
    small_blocks: None,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The kernel fails at once, during the trial, or in a later pass."""
    ready, kernel = 3 * passes, flex._kernel("cpu")  # three layers each

    def fails_after_some_calls(*given: Any, **options: Any) -> Any:
        nonlocal ready
        ready -= 1
        if ready < 0:
            raise RuntimeError("no kernel here")
        return kernel(*given, **options)

    monkeypatch.setattr(flex, "_kernel", lambda device: fails_after_some_calls)
    model = served("llama")
    engine = LocalEngine(model, batch_tokens=40)
    engine._block_sparse = True
    got = engine.label_logprobs([prompts(), prompts(40)], LABELS)
    expected = [one_pass_per_sequence(model, group, LABELS) for group in (prompts(), prompts(40))]
    assert all((a - b).abs().max() <= 1e-4 for a, b in zip(got, expected, strict=True))
    assert not engine._block_sparse
    plain = LocalEngine(model, batch_tokens=40)
    plain.label_logprobs([prompts(), prompts(40)], LABELS)
    assert engine.computed_tokens == plain.computed_tokens
    warnings = [record.getMessage() for record in caplog.records if record.name == MODULE]
    assert all("without FlexAttention" in warning for warning in warnings)
    assert "no kernel here" in warnings[0]
    assert len(warnings) == 1


@pytest.mark.filterwarnings("ignore:flex_attention called without")
def test_a_block_sparse_kernel_that_is_wrong_is_not_used(
    small_blocks: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    kernel = flex._kernel("cpu")
    monkeypatch.setattr(flex, "_kernel", lambda device: lambda *a, **b: 0.9 * kernel(*a, **b))
    model = served("llama")
    engine = LocalEngine(model)
    engine._block_sparse = True
    got = engine.label_logprobs([prompts()], LABELS)[0]
    assert (got - one_pass_per_sequence(model, prompts(), LABELS)).abs().max() <= 1e-4
    assert not engine._block_sparse
    [warning] = [record.getMessage() for record in caplog.records if record.name == MODULE]
    assert "without FlexAttention" in warning
    assert "apart" in warning


@pytest.mark.parametrize("window", [8, 4100])
def test_a_window_that_only_the_mask_knows_is_left_to_the_model(window: int) -> None:
    """The trial's sequences are shorter than the wide window, so it would not find it."""
    config = Qwen2MoeConfig(
        **COMMON,
        moe_intermediate_size=16,
        shared_expert_intermediate_size=16,
        num_experts=4,
        num_experts_per_tok=2,
        use_sliding_window=True,
        sliding_window=window,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    )
    engine = LocalEngine(make(config))
    assert "a sliding window that only the mask knows" in str(engine._plain_path_reason)


@pytest.mark.filterwarnings("ignore:flex_attention called without")
def test_a_last_layer_that_must_be_whole_is_not_blamed_on_the_kernel(
    small_blocks: None, caplog: pytest.LogCaptureFixture
) -> None:
    model = make(LlamaConfig(**COMMON))
    mlp = model.model.layers[-1].mlp
    forward = mlp.forward
    mlp.forward = lambda x: forward(x) + x.mean(1, keepdim=True).cumsum(1) * (x.shape[1] > 1)
    engine = LocalEngine(model)
    engine._block_sparse = True
    assert (
        engine._plain_path_reason is not None
    )  # prefixes cannot be shared if a layer mixes columns
    mlp.forward = lambda x: forward(x) + 0 * x[:, -2:-1] if x.shape[1] == 1 else forward(x)
    engine = LocalEngine(model)
    engine._block_sparse = True
    got = engine.label_logprobs([prompts()], LABELS)[0]
    assert engine._block_sparse
    assert not engine._last_layer.parts
    assert (got - one_pass_per_sequence(model, prompts(), LABELS)).abs().max() <= 1e-4
    assert not [r for r in caplog.records if "FlexAttention" in r.getMessage()]
