"""Models that do not separate packed documents: the reference packs them as the model does."""

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
    Trainer,
    default_data_collator,
)

pytest.importorskip("trl")

from support.models import tiny, tiny_jamba, tiny_llama, tiny_qwen3_moe
from support.trl_runs import arguments, lora_config, tiny_trainer
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from star_dss_plugin import ConfigError, attach
from star_dss_plugin.training.reference.packs import (
    joined_batch,
    packs_read_together,
    reads_documents_together,
)
from star_dss_plugin.training.sharding import Ranks

PACK = joined_batch(DataCollatorWithFlattening(), {})
PACK_COLUMNS = ("input_ids", "labels")


def convolution(vocabulary):
    kinds = {"layer_types": ["conv", "full_attention"] * 2, "conv_L_cache": 3}
    return tiny(Lfm2Config, vocabulary, num_hidden_layers=4, initializer_range=0.3, **kinds)


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
    assert not reads_documents_together(model, PACK)
    assert model.training


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("make_model", [convolution, tiny_jamba])
def test_convolutions_and_states_do_not(make_model, dtype):
    torch.manual_seed(0)
    assert reads_documents_together(make_model(96).to(dtype), PACK)


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
        trainer = tiny_trainer(
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
    trainer = tiny_trainer(tmp_path, tokenizer, model=convolution(len(tokenizer)))
    assert trainer.star_dss_state.reference.kind == "precomputed"


def test_a_reference_of_rows_by_themselves_is_refused(tmp_path, tokenizer):
    with pytest.raises(ConfigError, match=r"reads together\. Set reference='auto'"):
        tiny_trainer(
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
        train_dataset=tiny_trainer(tmp_path, tokenizer).train_dataset,
        processing_class=tokenizer,
        data_collator=collator() if flattens else collator(tokenizer),
    )
    attach(plain, guard="test-words", chunk_size=2)
    assert abs(kl_at_start(plain)) < 1e-7
    assert plain.star_dss_state.reference.kind == ("copy" if flattens else "precomputed")


def test_collators_that_join_nothing(tokenizer):
    assert joined_batch(DataCollatorForSeq2Seq(tokenizer), {}) is None
    assert joined_batch(default_data_collator, {}) is None
    assert joined_batch(lambda rows: 1 / 0, {}) is None
    of_trl = DataCollatorForLanguageModeling(pad_token_id=0)
    if hasattr(of_trl, "return_position_ids"):  # TRL sets it for sequence parallelism
        of_trl.return_position_ids = True
    assert joined_batch(of_trl, {}) is None


def test_collators_that_use_rows_up_or_want_a_mask():
    def using_up(rows):
        ids, labels = ([token for row in rows for token in row.pop(n)] for n in PACK_COLUMNS)
        positions = [place for row in rows for place in row.pop("position_ids")]
        made = {"input_ids": [ids], "labels": [labels], "position_ids": [positions]}
        return {name: torch.tensor(value) for name, value in made.items()}

    def masked(rows):
        assert all(row.pop("attention_mask") for row in rows)
        return using_up(rows)

    for collator in (using_up, masked):
        batch = joined_batch(collator, {})
        assert all(torch.equal(batch[n], PACK[n]) for n in ("input_ids", "position_ids"))


class WithColumns(DataCollatorWithFlattening):
    """Join rows, and need columns that only the user's data have."""

    def __call__(self, features, *args, **kwargs):
        assert all(row["source"] and len(row["kinds"]) == len(row["labels"]) for row in features)
        tokens = [{name: row[name] for name in PACK_COLUMNS} for row in features]
        return super().__call__(tokens, *args, **kwargs)


@pytest.mark.parametrize("kind", [None, "torch", "numpy"])
@pytest.mark.parametrize("make_model", [attention, convolution])
def test_collators_that_want_columns_of_the_users_own(tmp_path, tokenizer, make_model, kind):
    dataset = tiny_trainer(tmp_path, tokenizer).train_dataset.select_columns(PACK_COLUMNS)
    dataset = dataset.map(lambda row: {"source": "chat", "kinds": [3] * len(row["labels"])})
    plain = Trainer(
        make_model(len(tokenizer)),
        args=copy.copy(arguments(tmp_path, remove_unused_columns=False)),
        train_dataset=dataset.with_format(kind),
        processing_class=tokenizer,
        data_collator=WithColumns(),
    )
    attach(plain, guard="test-words", chunk_size=2)
    meet = make_model is convolution
    assert plain.star_dss_state.reference.kind == ("copy" if meet else "precomputed")


def test_padding_to_the_longest_row_costs_nothing():
    """The trial's batch is cut to its tokens, or it would compute logits of a whole context."""

    def padding(rows):
        batch = DataCollatorWithFlattening()(rows)
        return {name: torch.nn.functional.pad(value, (0, 952)) for name, value in batch.items()}

    batch = joined_batch(padding, {})
    assert {value.shape for value in batch.values()} == {PACK["input_ids"].shape}
    assert reads_documents_together(convolution(96), batch)
    assert not reads_documents_together(attention(96), batch)


class Uneven(torch.nn.Module):
    """A model whose logits change a little with the rest of the batch."""

    def __init__(self, inner, size):
        super().__init__()
        self.inner, self.size, self.config = inner, size, inner.config

    def forward(self, input_ids, **given):
        output = self.inner(input_ids=input_ids, **given)
        drawn = torch.Generator().manual_seed(int((input_ids**2)[0, :30].sum() + input_ids.sum()))
        output.logits += self.size * torch.randn(output.logits.shape, generator=drawn)
        return output


def test_experts_that_round_otherwise_read_nothing_together():
    torch.manual_seed(0)
    assert not reads_documents_together(Uneven(attention(96), 0.05).to(torch.bfloat16), PACK)
    assert reads_documents_together(Uneven(convolution(96), 0.05).to(torch.bfloat16), PACK)


@pytest.mark.parametrize("found", [[True, False], [False, True], [False, False]])
def test_ranks_choose_alike(found):
    model = convolution(96) if found[0] else attention(96)
    ranks = Ranks(gather=lambda own: [own, found[1]])
    assert bool(packs_read_together(model, DataCollatorWithFlattening(), None, ranks)) is any(found)
