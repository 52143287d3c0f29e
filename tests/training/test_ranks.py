"""Agreement between the ranks of a run, tested in one process."""

import copy

import pytest

pytest.importorskip("trl")
pytest.importorskip("peft")

import torch
from peft import get_peft_model
from support.models import tiny_llama
from support.trl_runs import lora_config, tiny_trainer

from star_dss_plugin import StarDSSError
from star_dss_plugin.training import trainer_data
from star_dss_plugin.training.sharding import Ranks, _has_weights


def zeros(model):
    """Set a model's weights to 0, as transformers 5.16 does on ranks that do not load them."""
    for parameter in model.parameters():
        torch.nn.init.zeros_(parameter)
    return model


@pytest.mark.parametrize("adapted", [False, True])
def test_a_rank_with_zeros_or_shapes_only_has_no_weights(adapted):
    def adapt(model):
        return get_peft_model(model, lora_config()) if adapted else model

    model = tiny_llama(32)
    assert _has_weights(adapt(copy.deepcopy(model)))
    assert not _has_weights(adapt(zeros(copy.deepcopy(model))))
    assert not _has_weights(adapt(copy.deepcopy(model)).to("meta"))


@pytest.mark.parametrize(("other", "apart"), [([-1.0, -2.04], False), ([-1.0, -2.06], True)])
def test_numbers_may_be_a_little_apart(other, apart):
    ranks = Ranks(gather=lambda value: [value, other])
    if not apart:
        ranks.check_close("reference", [-1.0, -2.0], within=0.05)
        return
    with pytest.raises(StarDSSError, match="rank 1 .* the same reference as rank 0"):
        ranks.check_close("reference", [-1.0, -2.0], within=0.05)


@pytest.mark.parametrize("has", [True, False])
def test_a_rank_that_has_the_reference_computes_it_with_one_that_has_not(
    tmp_path, tokenizer, monkeypatch, has
):
    """Otherwise the other rank would wait for its collectives for ever."""
    trainer = tiny_trainer(tmp_path, tokenizer)
    state = trainer.star_dss_state
    computed = []
    monkeypatch.setattr(
        trainer_data, "add_reference_logps", lambda dataset, *_, **__: computed.append(0) or dataset
    )
    trainer_data.prepare_rows(
        trainer,
        state.options,
        tokenizer,
        state.shaping,
        state.reference,
        Ranks(gather=lambda value: [value, has]),
        trainer.train_dataset,
        "train",
    )
    assert bool(computed) is not has
