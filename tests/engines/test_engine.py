"""The local engine equals one forward pass per sequence, for all kinds of shared prefixes."""

from __future__ import annotations

import gc
import re
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.engine_models import (
    COMMON,
    LABELS,
    MODULE,
    NOT_SERVED,
    SERVED,
    VOCABULARY,
    make,
    one_pass_per_sequence,
    prompts,
    served,
    shapes,
)
from transformers import LlamaConfig, Phi3Config, T5Config, T5ForConditionalGeneration

from star_dss_plugin.engines.base import Engine
from star_dss_plugin.engines.local import LocalEngine
from star_dss_plugin.engines.shared_prefix import dense
from star_dss_plugin.errors import GuardError


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
def prefix_trees(draw: st.DrawFn) -> list[list[int]]:
    """Draw sequences, each of which continues a prefix of an earlier one, in any order."""
    sequences: list[list[int]] = []
    for _ in range(draw(st.integers(1, 10))):
        stem = draw(st.sampled_from(sequences)) if sequences else []
        stem = stem[: draw(st.integers(0, len(stem)))]
        fresh = draw(st.lists(st.integers(3, 6), min_size=0 if stem else 1, max_size=12))
        sequences.append(stem + fresh)
    return draw(st.permutations(sequences))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    groups=st.lists(prefix_trees(), min_size=1, max_size=4),
    batch_tokens=st.sampled_from([1, 40, 16384]),
)
def test_any_trees_of_prefixes_equal_one_pass_per_prompt(
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
    # The common prefix of all groups is counted, and computed, once.
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
    # One row per prompt, and one for the trunk.
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
        # Not `isinstance`: it loads the lazy modules of torch.distributed, which warn.
        alive.append(sum(issubclass(type(x), torch.Tensor) for x in gc.get_objects()))
        return run_trunks(*args)

    engine._run_trunks = watched  # type: ignore[method-assign]
    head = list(range(3, 20))
    groups = [[[*head, 30 + i, *range(20, 40), j] for j in range(4)] for i in range(24)]
    engine.label_logprobs(groups, LABELS)
    assert len(alive) >= 8
    assert max(alive[2:]) <= alive[1] + 8


def test_threads_wait_for_each_other() -> None:
    model = make(LlamaConfig(**COMMON))
    own = model.config._attn_implementation
    engine = LocalEngine(model)
    expected = engine.label_logprobs([prompts(60)], LABELS)[0]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: engine.label_logprobs([prompts(60)], LABELS)[0], range(16)))
    assert all(torch.equal(got, expected) for got in found)
    assert model.config._attn_implementation == own


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


def test_distinct_tokens_are_those_of_the_trie_on_either_path() -> None:
    counts = []
    for whole in (False, True):
        engine = LocalEngine(served("llama"))
        engine._compute([prompts(), prompts(40)], LABELS, whole)
        counts.append(engine.distinct_tokens)
    assert counts[0] == counts[1]
