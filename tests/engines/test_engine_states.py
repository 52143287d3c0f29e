"""Hidden states from the engine equal those of a plain pass, for all kinds of shared prefixes."""

import pytest
import torch
from support.engine_models import NOT_SERVED, SERVED, draw, make, served
from support.probed import slow_states

from star_dss_plugin.engines.local import LocalEngine
from star_dss_plugin.errors import GuardError


def sequences():
    head, *rests = draw(20, 9, 30, 17, 12, seed=4)
    found = [head + rest for rest in rests]
    # One position lies in the shared prefix.
    return found, [[22, 23, 28], [19, 40, 49], [21], [20, 31]]


@pytest.mark.parametrize("batch_tokens", [1, 60, 16384])
@pytest.mark.parametrize("name", [name for name in SERVED if not name.startswith("gpt")])
def test_states_are_those_of_a_plain_pass(name, batch_tokens):
    model = served(name)
    engine = LocalEngine(model, batch_tokens)
    rows, positions = sequences()
    blocks = [0, 1]
    for where in (positions, [[22, 23], [30, 49], [21], [20, 31]]):
        found = engine.states(rows, where, blocks)
        for ids, read, got in zip(rows, where, found, strict=True):
            assert got.dtype == torch.float32
            expected = slow_states(model, ids, blocks)[read]
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def test_shared_prefixes_and_later_blocks_are_not_computed_again():
    model = served("llama")
    blocks, ran = len(model.model.layers), []
    hooks = [
        layer.register_forward_hook(lambda *_, index=index: ran.append(index))
        for index, layer in enumerate(model.model.layers)
    ]
    engine = LocalEngine(model)
    _ = engine._plain_path_reason
    ran.clear()
    rows, _ = sequences()
    engine.states(rows, [[len(row) - 1] for row in rows], [1])
    for hook in hooks:
        hook.remove()
    # Only the head runs through all blocks, because verdicts use its keys; the rest stops earlier.
    assert ran.count(blocks - 1) == 1
    assert ran.count(1) > 1
    assert len(model.model.layers) == blocks
    distinct = 20 + sum(len(row) - 20 for row in rows)
    assert distinct <= engine.computed_tokens < sum(map(len, rows))


def test_a_model_without_shared_prefixes_runs_whole():
    config, _ = NOT_SERVED["mamba"]
    model = make(config())
    rows, positions = sequences()
    engine = LocalEngine(model)
    assert engine._plain_path_reason
    with pytest.raises(GuardError, match="keeps its blocks elsewhere"):
        LocalEngine(served("gpt2")).states(rows, positions, [0])
    found = engine.states(rows, positions, [0])
    for ids, read, got in zip(rows, positions, found, strict=True):
        # This model's hidden states do not begin with the embeddings.
        torch.testing.assert_close(got, slow_states(model, ids, [-1])[read], rtol=1e-4, atol=1e-4)


def test_reading_states_does_not_change_verdicts():
    model, (rows, positions) = served("qwen3"), sequences()
    engine = LocalEngine(model)
    groups, labels = [[row, row[:-2]] for row in rows], [3, 4]
    before = engine.label_logprobs(groups, labels)
    engine.states(rows, positions, [0, 1])
    after = engine.label_logprobs(groups, labels)
    for one, other in zip(before, after, strict=True):
        torch.testing.assert_close(one, other)
