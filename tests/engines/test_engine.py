"""The local engine equals one forward pass per sequence, whatever the sequences share."""

from __future__ import annotations

import gc
import re
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.models import real_model
from torch import nn
from torch.profiler import profile
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoConfig,
    GraniteConfig,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    Phi3Config,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2MoeConfig,
    Qwen3Config,
    T5Config,
    T5ForConditionalGeneration,
)

from star_dss_plugin.engines.base import Engine
from star_dss_plugin.engines.local import LocalEngine
from star_dss_plugin.engines.shared_prefix import dense, flex, savings
from star_dss_plugin.engines.shared_prefix.flex import BlockSparse
from star_dss_plugin.engines.shared_prefix.savings import OneDnnLinear
from star_dss_plugin.errors import GuardError

MODULE = LocalEngine.__module__
VOCABULARY = 61
LABELS = [3, 60, 17]
# Large weights: with the usual small ones a wrong mask would hardly move the result.
COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.4,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GEMMA: dict[str, Any] = {
    **COMMON,
    "head_dim": 8,
    "query_pre_attn_scalar": 8,
    "sliding_window": 8,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
}
SERVED: dict[str, Callable[[], PreTrainedConfig]] = {
    "llama": lambda: LlamaConfig(**COMMON),
    "llama-eager": lambda: LlamaConfig(**COMMON, attn_implementation="eager"),
    "qwen3": lambda: Qwen3Config(**COMMON, head_dim=8),
    "gemma3": lambda: Gemma3TextConfig(**GEMMA),
    "gemma2": lambda: Gemma2Config(
        **GEMMA,
        attn_logit_softcapping=3.0,
        final_logit_softcapping=4.0,
        attn_implementation="eager",
    ),
    "mistral": lambda: MistralConfig(**COMMON, sliding_window=8),
    "granite": lambda: GraniteConfig(
        **COMMON, logits_scaling=3.0, attention_multiplier=0.3, residual_multiplier=0.7
    ),
    "gpt2": lambda: GPT2Config(
        vocab_size=VOCABULARY,
        n_embd=32,
        n_layer=3,
        n_head=4,
        n_positions=40,
        initializer_range=0.4,
    ),
}
NOT_SERVED: dict[str, tuple[Callable[[], PreTrainedConfig], str]] = {
    "bloom": (
        lambda: BloomConfig(
            vocab_size=VOCABULARY, hidden_size=32, n_layer=2, n_head=4, initializer_range=0.4
        ),
        "takes no position_ids",
    ),
    "mamba": (
        lambda: MambaConfig(
            vocab_size=VOCABULARY,
            hidden_size=32,
            num_hidden_layers=2,
            state_size=8,
            initializer_range=0.4,
        ),
        "layers other than full and sliding attention",
    ),
    # Its local layers mask by column instead of position, which only the trial can find out.
    "gpt-neo": (
        lambda: GPTNeoConfig(
            vocab_size=VOCABULARY,
            hidden_size=32,
            num_layers=2,
            attention_types=[[["global", "local"], 1]],
            num_heads=4,
            window_size=8,
            max_position_embeddings=128,
            initializer_range=0.4,
        ),
        "cannot be replaced",
    ),
}


def make(config: PreTrainedConfig) -> PreTrainedModel:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    return model.eval()


@cache
def served(name: str) -> PreTrainedModel:
    return make(SERVED[name]())


def one_pass_per_sequence(
    model: PreTrainedModel, sequences: Sequence[Sequence[int]], label_ids: Sequence[int]
) -> torch.Tensor:
    """The slow, obvious twin of the engine."""
    rows = []
    with torch.no_grad():
        for sequence in sequences:
            logits = model(torch.tensor([list(sequence)])).logits[0, -1].float()
            rows.append(logits.log_softmax(dim=-1)[list(label_ids)])
    return torch.stack(rows)


def draw(*counts: int, seed: int = 0) -> Iterator[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    for count in counts:
        yield torch.randint(3, VOCABULARY, (count,), generator=generator).tolist()


def prompts(length: int = 32) -> list[list[int]]:
    """Prompts about one growing response: a fixed head, k tokens of it, a fixed tail."""
    head, response, tail = draw(10, length - 10, 5, seed=1)
    return [head + response[:k] + tail for k in range(0, length - 14, 3)]


def shapes() -> dict[str, list[list[int]]]:
    trunk, other, third = draw(36, 30, 25)
    return {
        "prompts": prompts(),
        "nothing shared": [[5, *trunk[:20]], [6, *other], [7, *third[:9]]],
        "identical": [trunk, trunk, other, trunk],
        "prefixes of one another": [trunk[:k] for k in (1, 36, 2, 35, 20)],
        "length one": [[4], [9]],
        "one sequence": [other],
        "merges near the end": [trunk, [*trunk[:-1], 4], [*trunk[:-2], 7], [*trunk[:-3], 7, 8, 9]],
        "deep and shallow": [trunk, trunk[:2] + other[:28], trunk[:33] + third[:2], other[:3], [5]],
    }


@pytest.mark.parametrize("batch_tokens", [1, 100, 16384])
@pytest.mark.parametrize("name", SERVED)
def test_equals_one_pass_per_sequence(
    name: str, batch_tokens: int, caplog: pytest.LogCaptureFixture
) -> None:
    model = served(name)
    engine: Engine = LocalEngine(model, batch_tokens)
    for shape, sequences in shapes().items():
        got = engine.label_logprobs([sequences], LABELS)[0]
        expected = one_pass_per_sequence(model, sequences, LABELS)
        assert got.shape == expected.shape, shape
        assert (got - expected).abs().max() <= 1e-4, shape
    assert not [record for record in caplog.records if record.name == MODULE]


@st.composite
def tries(draw: st.DrawFn) -> list[list[int]]:
    """Sequences that each continue some prefix of an earlier one, in any order."""
    sequences: list[list[int]] = []
    for _ in range(draw(st.integers(1, 10))):
        stem = draw(st.sampled_from(sequences)) if sequences else []
        stem = stem[: draw(st.integers(0, len(stem)))]
        fresh = draw(st.lists(st.integers(3, 6), min_size=0 if stem else 1, max_size=12))
        sequences.append(stem + fresh)
    return draw(st.permutations(sequences))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    groups=st.lists(tries(), min_size=1, max_size=4), batch_tokens=st.sampled_from([1, 40, 16384])
)
def test_any_tries_equal_one_pass_per_prompt(
    groups: list[list[list[int]]], batch_tokens: int
) -> None:
    model = served("llama")
    engine = LocalEngine(model, batch_tokens)
    for group, got in zip(groups, engine.label_logprobs(groups, LABELS), strict=True):
        assert (got - one_pass_per_sequence(model, group, LABELS)).abs().max() <= 1e-4
    assert engine.computed_tokens >= engine.distinct_tokens


def test_counts_tokens_over_calls() -> None:
    engine = LocalEngine(served("llama"))
    engine.label_logprobs([[[4, 5, 6, 7, 8], [4, 5, 6, 9]]], LABELS)
    assert (engine.computed_tokens, engine.distinct_tokens) == (3 + 2 * 2, 6)
    # What all groups begin with is counted, and computed, once.
    groups = [[[4, 5, 6, 7, 8], [4, 5, 6, 9, 9]], [[4, 5, 3, 7, 8], [4, 5, 3, 9, 9]]]
    engine.label_logprobs(groups, LABELS)
    assert (engine.computed_tokens, engine.distinct_tokens) == (7 + 2 + 2 + 8, 6 + 2 + 2 + 8)


def test_the_head_is_computed_once_per_run() -> None:
    engine = LocalEngine(served("llama"))
    groups = [[[4, 5, 6, 7, 8], [4, 5, 6, 9, 9]], [[4, 5, 3, 7, 8], [4, 5, 3, 9, 9]]]
    first = engine.label_logprobs(groups, LABELS)
    computed = engine.computed_tokens
    again = engine.label_logprobs(groups, LABELS)
    assert engine.computed_tokens == 2 * computed - 2
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_computes_little_more_than_the_distinct_tokens_of_prompts() -> None:
    engine = LocalEngine(served("llama"))
    sequences = prompts(120)
    engine.label_logprobs([sequences], LABELS)
    assert engine.computed_tokens <= 1.1 * engine.distinct_tokens
    assert engine.distinct_tokens < sum(map(len, sequences)) / 5


def test_passes_stay_within_the_budget() -> None:
    shapes_seen: list[torch.Size] = []
    model = make(SERVED["llama"]())
    engine = LocalEngine(model, batch_tokens=120)
    engine.label_logprobs([[[4]]], LABELS)
    model.register_forward_pre_hook(lambda _, args: shapes_seen.append(args[0].shape))
    for sequences in shapes().values():
        engine.label_logprobs([sequences, sequences[:2]], LABELS)
    assert max(shape[0] for shape in shapes_seen) > 1
    assert all(shape[0] == 1 or shape.numel() <= 120 for shape in shapes_seen)


def test_projects_the_vocabulary_once_per_sequence() -> None:
    projected: list[int] = []
    model = make(SERVED["llama"]())
    engine = LocalEngine(model)
    engine.label_logprobs([[[4]]], LABELS)
    model.lm_head.register_forward_hook(
        lambda _, inputs, output: projected.append(output.shape[:-1].numel())
    )
    engine.label_logprobs([prompts()], LABELS)[0]
    # Once for each prompt, and once for the trunk.
    assert sum(projected) == len(prompts()) + 1


def test_out_of_memory_halves_the_batches_until_they_fit() -> None:
    model = make(SERVED["llama"]())
    most_rows = 16

    def allocate(_: torch.nn.Module, args: tuple[Any, ...]) -> None:
        if args[0].shape[0] > most_rows:
            raise torch.OutOfMemoryError("out of memory")

    model.register_forward_pre_hook(allocate)
    engine = LocalEngine(model)
    expected = one_pass_per_sequence(model, prompts(), LABELS)
    engine.label_logprobs([[[4]]], LABELS)
    most_rows = 2
    assert (engine.label_logprobs([prompts()], LABELS)[0] - expected).abs().max() <= 1e-4
    assert engine.batch_tokens <= 16384 // 2
    most_rows = 0
    with pytest.raises(torch.OutOfMemoryError):
        engine.label_logprobs([prompts()], LABELS)[0]


def test_bfloat16_probabilities_are_near_those_in_float32() -> None:
    config = LlamaConfig(**{**COMMON, "initializer_range": 0.1})
    half = make(config).bfloat16()
    full = make(config)
    full.load_state_dict(half.state_dict())
    engine = LocalEngine(half)
    assert engine._plain_path_reason is None  # the fast path itself, not what stands in for it
    for sequences in shapes().values():
        got = engine.label_logprobs([sequences], range(VOCABULARY))[0]
        assert got.dtype == torch.float32
        expected = one_pass_per_sequence(full, sequences, range(VOCABULARY))
        assert (got.exp() - expected.exp()).abs().max() <= 2e-2


def test_a_real_model_in_bfloat16_takes_the_fast_path() -> None:
    """Rounding grows with depth and with the vocabulary: tiny models do not show how much."""
    model = real_model()[0].bfloat16()
    assert LocalEngine(model)._plain_path_reason is None
    model.model.layers[3].self_attn.layer_idx = 2  # two layers that write to one cache
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
    # A bias would be the same in all prompts; what is random averages out over 720 of them.
    assert difference.mean(0).abs().max() <= 0.25 * difference.square().mean().sqrt()


@pytest.mark.parametrize("batch_tokens", [1, 100, 16384])
@pytest.mark.parametrize("name", NOT_SERVED)
def test_other_models_run_whole_and_one_warning_says_why(
    name: str, batch_tokens: int, caplog: pytest.LogCaptureFixture
) -> None:
    config, reason = NOT_SERVED[name]
    model = make(config())
    engine = LocalEngine(model, batch_tokens)
    for sequences in shapes().values():
        expected = one_pass_per_sequence(model, sequences, LABELS)
        got = engine.label_logprobs([sequences], LABELS)[0]
        assert (got - expected).abs().max() <= 1e-4
    [warning] = [record.getMessage() for record in caplog.records if record.name == MODULE]
    assert re.search(reason, warning)


def test_rotary_frequencies_that_depend_on_length_do_not_leak_between_sequences(
    caplog: pytest.LogCaptureFixture,
) -> None:
    rope: dict[str, Any] = {"rope_type": "longrope", "rope_theta": 10000.0}
    rope |= {"short_factor": [1.0] * 4, "long_factor": [3.0] * 4}
    config = Phi3Config(**COMMON, original_max_position_embeddings=24, rope_parameters=rope)
    model = make(config)
    engine = LocalEngine(model)
    short = [sequence for sequence in prompts() if len(sequence) <= 24]
    for sequences in (short, prompts(), prompts(), short):
        got = engine.label_logprobs([sequences], LABELS)[0]
        assert (got - one_pass_per_sequence(model, sequences, LABELS)).abs().max() <= 1e-4
    [warning] = [record.getMessage() for record in caplog.records if record.name == MODULE]
    assert "beyond 24 tokens" in warning


def test_leaves_the_model_and_the_random_state_as_they_were() -> None:
    model = make(LlamaConfig(**COMMON, attention_dropout=0.5))
    expected = one_pass_per_sequence(model, prompts(), LABELS)
    model.train()
    model.lm_head.eval()
    flags = [module.training for module in model.modules()]
    config = model.config.to_dict()
    random_state = torch.get_rng_state()
    got = LocalEngine(model).label_logprobs([prompts()], LABELS)[0]
    assert (got - expected).abs().max() <= 1e-4
    assert [module.training for module in model.modules()] == flags
    assert model.config.to_dict() == config
    assert torch.equal(torch.get_rng_state(), random_state)


def test_results_can_be_used_in_a_loss() -> None:
    got = LocalEngine(served("llama")).label_logprobs([prompts()], LABELS)[0]
    weight = torch.ones(len(LABELS), requires_grad=True)
    (got * weight).sum().backward()
    assert weight.grad is not None


def test_no_sequences_give_no_rows() -> None:
    assert LocalEngine(served("llama")).label_logprobs([[]], LABELS)[0].shape == (0, len(LABELS))


def test_an_empty_sequence_is_named() -> None:
    with pytest.raises(ValueError, match="Prompt 1 of group 0 is empty"):
        LocalEngine(served("llama")).label_logprobs([[[4], [], [5]]], LABELS)


def test_an_encoder_decoder_is_refused() -> None:
    config = T5Config(vocab_size=VOCABULARY, d_model=16, d_ff=16, num_layers=1, num_heads=2, d_kv=8)
    with pytest.raises(GuardError, match="T5ForConditionalGeneration"):
        LocalEngine(T5ForConditionalGeneration(config))


def test_memory_does_not_grow_with_the_number_of_responses() -> None:
    """Keys and values are kept for the head and one batch of trunks, never for all of them."""
    alive: list[int] = []
    model = make(SERVED["llama"]())
    engine = LocalEngine(model, batch_tokens=64)
    engine.label_logprobs([[[4]]], LABELS)
    run_trunks = engine._run_trunks

    def watched(*args: Any) -> Any:
        gc.collect()
        # `isinstance` would ask lazy modules for their class, which warns for torch.distributed.
        alive.append(sum(issubclass(type(x), torch.Tensor) for x in gc.get_objects()))
        return run_trunks(*args)

    engine._run_trunks = watched  # type: ignore[method-assign]
    head = list(range(3, 20))
    groups = [[[*head, 30 + i, *range(20, 40), j] for j in range(4)] for i in range(24)]
    engine.label_logprobs(groups, LABELS)
    assert len(alive) >= 8
    assert max(alive[2:]) <= alive[1] + 8


@pytest.mark.parametrize("name", SERVED)
def test_rows_that_see_little_of_a_trunk_meet_no_more_of_it(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dense, "_SLICE_QUERIES", 1)
    met: list[int] = []
    attend_shared = dense._attend_shared

    def watched(query: torch.Tensor, key: torch.Tensor, *others: Any) -> Any:
        met.append(key.shape[2])
        return attend_shared(query, key, *others)

    monkeypatch.setattr(dense, "_attend_shared", watched)
    model = served(name)
    engine = LocalEngine(model)
    engine.label_logprobs([[[4]]], LABELS)
    for shape, sequences in shapes().items():
        met.clear()
        got = engine.label_logprobs([sequences], LABELS)[0]
        assert (got - one_pass_per_sequence(model, sequences, LABELS)).abs().max() <= 1e-4, shape
        if shape == "prompts" and name == "llama":
            # Each prompt's head and as much of the response as comes before its own tail.
            assert set(met) == {10, 13, 16, 19, 22}


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
        """An MLP that would notice that columns are missing."""

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
    with OneDnnLinear():  # no kernel that has no gradient
        trained(torch.randn(2, 5)).sum().backward()
    assert trained.weight.grad is not None


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Blocks that these short prompts fill more than one of, and no traces of other tests."""
    monkeypatch.setattr(flex, "BLOCK", 16)
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.filterwarnings("ignore:flex_attention called without")
@pytest.mark.parametrize("name", SERVED)
def test_block_sparse_attention_equals_one_pass_per_sequence(
    name: str, small_blocks: None, caplog: pytest.LogCaptureFixture
) -> None:
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
    """`rows` are the depths of each prefix's rows; the last row has padding on its left."""
    depths = [torch.tensor(of_prefix) for of_prefix in rows]
    count = sum(map(len, rows)) or 2
    asked, padding = min(asked, columns), min(padding, columns - 1)
    real = torch.ones(count, columns, dtype=torch.bool)
    real[-1, :padding] = False
    before = torch.cat(depths) if rows else torch.zeros(count, dtype=torch.long)
    positions = before[:, None] + torch.arange(columns)
    positions[-1] = (positions[-1] - padding).clamp(min=0)
    lengths = [int(depth.max()) + 3 for depth in depths]
    layout = BlockSparse.of(positions, real, [len(depth) for depth in depths], depths, lengths)
    mask = layout._mask(asked, window)
    seen = mask.mask_mod(
        torch.tensor(0),
        torch.tensor(0),
        torch.arange(count * asked)[:, None],
        torch.arange(len(layout.owner)),
    )
    # What the rows see, said plainly.
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
    # Windows aside, a block that is computed holds something that one of its rows sees.
    assert window is not None or blocks.sum() <= len((seen.nonzero() // flex.BLOCK).unique(dim=0))


@pytest.mark.filterwarnings("ignore:flex_attention called without")
@pytest.mark.parametrize("passes", [0, 1, 5])
def test_without_a_block_sparse_kernel_there_is_another_way(
    passes: int,
    small_blocks: None,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """At once, in the trial, or with a pass that nobody tried."""
    ready, kernel = 3 * passes, flex._kernel("cpu")  # three layers each

    def works_a_while(*given: Any, **options: Any) -> Any:
        nonlocal ready
        ready -= 1
        if ready < 0:
            raise RuntimeError("no kernel here")
        return kernel(*given, **options)

    monkeypatch.setattr(flex, "_kernel", lambda device: works_a_while)
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


def test_the_callers_defaults_change_nothing() -> None:
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


def test_threads_wait_for_each_other() -> None:
    model = make(LlamaConfig(**COMMON))
    own = model.config._attn_implementation
    engine = LocalEngine(model)
    expected = engine.label_logprobs([prompts(60)], LABELS)[0]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: engine.label_logprobs([prompts(60)], LABELS)[0], range(16)))
    assert all(torch.equal(got, expected) for got in found)
    assert model.config._attn_implementation == own


@pytest.mark.parametrize("window", [8, 4100])
def test_a_window_that_only_the_mask_knows_is_left_to_the_model(window: int) -> None:
    """A trial would not see the wide one."""
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
    assert engine._plain_path_reason is not None  # it reads other columns
    mlp.forward = lambda x: forward(x) + 0 * x[:, -2:-1] if x.shape[1] == 1 else forward(x)
    engine = LocalEngine(model)
    engine._block_sparse = True
    got = engine.label_logprobs([prompts()], LABELS)[0]
    assert engine._block_sparse
    assert not engine._last_layer.parts
    assert (got - one_pass_per_sequence(model, prompts(), LABELS)).abs().max() <= 1e-4
    assert not [r for r in caplog.records if "FlexAttention" in r.getMessage()]


def test_few_scores_are_held_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model, held = served("gemma2"), []
    softmax = torch.Tensor.logsumexp

    def watched(scores: torch.Tensor, *given: Any) -> torch.Tensor:
        held.append(scores.numel())
        return softmax(scores, *given)

    monkeypatch.setattr(torch.Tensor, "logsumexp", watched)
    expected = LocalEngine(model).label_logprobs([prompts(60)], LABELS)[0]
    most = max(held)
    bound = 4 * 60 * 7  # heads, keys, and some of the queries
    monkeypatch.setattr(dense, "_MATH_ELEMENTS", bound)
    held.clear()
    got = LocalEngine(model).label_logprobs([prompts(60)], LABELS)[0]
    assert max(held) <= bound < most
    assert (got - expected).abs().max() <= 1e-5


def test_linear_layers_that_onednn_does_not_take_go_their_way() -> None:
    x = torch.randn(2, 3)
    with torch.inference_mode(), OneDnnLinear():
        assert torch.equal(nn.functional.linear(x, x[0]), x @ x[0])
        sparse = torch.eye(3).to_sparse_csr()
        assert torch.equal(nn.functional.linear(x, sparse), x)
        with torch.backends.mkldnn.flags(enabled=False):
            assert torch.allclose(nn.functional.linear(x, x), x @ x.T)


def test_distinct_tokens_are_those_of_the_trie_on_either_path() -> None:
    counts = []
    for whole in (False, True):
        engine = LocalEngine(served("llama"))
        engine._compute([prompts(), prompts(40)], LABELS, whole)
        counts.append(engine.distinct_tokens)
    assert counts[0] == counts[1]
