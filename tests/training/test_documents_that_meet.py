"""Packs of models that read documents together: the reference reads them as the model does."""

import copy
import logging

import pytest
import torch
from transformers import (
    DataCollatorForSeq2Seq,
    DataCollatorWithFlattening,
    GPT2Config,
    GPT2LMHeadModel,
    Lfm2Config,
    Lfm2ForCausalLM,
    Trainer,
    default_data_collator,
)

pytest.importorskip("trl")

from support.models import tiny_jamba, tiny_llama, tiny_qwen3_moe
from support.trl_runs import arguments, lora_config, make
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from star_dss_plugin import ConfigError, attach
from star_dss_plugin.training.reference.packs import documents_meet, joined_batch

PACK = joined_batch(DataCollatorWithFlattening())


def convolution(vocabulary):
    return Lfm2ForCausalLM(
        Lfm2Config(
            vocab_size=vocabulary,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            layer_types=["conv", "full_attention"] * 2,
            conv_L_cache=3,
            max_position_embeddings=1024,
            initializer_range=0.3,
        )
    )


def attention(vocabulary):
    return tiny_llama(vocabulary, initializer_range=0.3)


def learned_positions(vocabulary):
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=vocabulary, n_embd=32, n_layer=2, n_head=4, initializer_range=0.3)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["eager", "sdpa"])
@pytest.mark.parametrize("make_model", [attention, tiny_qwen3_moe, learned_positions])
def test_attention_keeps_documents_apart(make_model, kind, dtype):
    torch.manual_seed(0)
    model = make_model(96).to(dtype)
    model.set_attn_implementation(kind)
    model.train()
    assert not documents_meet(model, PACK)
    assert model.training


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("make_model", [convolution, tiny_jamba])
def test_convolutions_and_states_do_not(make_model, dtype):
    torch.manual_seed(0)
    assert documents_meet(make_model(96).to(dtype), PACK)


def kl_at_start(trainer):
    trainer.train()
    return next(log["star_dss/kl"] for log in trainer.state.log_history if "star_dss/kl" in log)


@pytest.mark.parametrize("lora", [None, lora_config()], ids=["full", "lora"])
@pytest.mark.parametrize("make_model", [attention, tiny_jamba])
@pytest.mark.parametrize("joined", ["packing", "padding_free"])
def test_the_model_starts_as_its_reference(tmp_path, tokenizer, make_model, lora, joined, caplog):
    torch.manual_seed(0)
    if lora is not None and make_model is not attention:
        lora = copy.copy(lora)
        lora.target_modules = {"q_proj", "v_proj"}
    options = {"packing": True, "max_length": 64} if joined == "packing" else {"max_length": None}
    with caplog.at_level(logging.WARNING):
        trainer = make(
            tmp_path,
            tokenizer,
            model=make_model(len(tokenizer)),
            peft_config=lora,
            learning_rate=1e-9,
            logging_steps=1,
            **(options | {joined: True}),
        )
    kind = trainer.star_dss_state.reference.kind
    alone = make_model is attention
    assert kind == ("precomputed" if alone else "adapter" if lora else "copy")
    assert ("reads the documents of a pack together" in caplog.text) is not alone
    assert abs(kl_at_start(trainer)) < 1e-7


def test_rows_by_themselves_are_precomputed(tmp_path, tokenizer):
    trainer = make(tmp_path, tokenizer, model=convolution(len(tokenizer)))
    assert trainer.star_dss_state.reference.kind == "precomputed"


def test_a_reference_of_rows_by_themselves_is_refused(tmp_path, tokenizer):
    with pytest.raises(ConfigError, match=r"reads together\. Set reference='auto'"):
        make(
            tmp_path,
            tokenizer,
            model=tiny_jamba(len(tokenizer)),
            packing=True,
            max_length=64,
            reference="precomputed",
        )


@pytest.mark.parametrize("collator", [DataCollatorWithFlattening, DataCollatorForSeq2Seq])
def test_a_plain_trainer_that_flattens(tmp_path, tokenizer, collator):
    flattens = collator is DataCollatorWithFlattening
    plain = Trainer(
        convolution(len(tokenizer)),
        args=copy.copy(arguments(tmp_path, learning_rate=1e-9, logging_steps=1)),
        train_dataset=make(tmp_path, tokenizer).train_dataset,
        processing_class=tokenizer,
        data_collator=collator() if flattens else collator(tokenizer),
    )
    attach(plain, guard="test-words", chunk_size=2)
    assert abs(kl_at_start(plain)) < 1e-7
    assert plain.star_dss_state.reference.kind == ("copy" if flattens else "precomputed")


def test_collators_that_join_nothing(tokenizer):
    assert joined_batch(DataCollatorForSeq2Seq(tokenizer)) is None
    assert joined_batch(default_data_collator) is None
    assert joined_batch(lambda rows: 1 / 0) is None
    of_trl = DataCollatorForLanguageModeling(pad_token_id=0)
    if hasattr(of_trl, "return_position_ids"):  # with which TRL trains parts of rows
        of_trl.return_position_ids = True
    assert joined_batch(of_trl) is None
