"""Packed and padding-free batches have the loss and gradients of the same rows unpacked."""

import copy
from collections import Counter

import pytest
import torch
from datasets import Dataset

pytest.importorskip("trl")

from support.models import tiny_llama
from support.run_differences import history
from support.trl_runs import arguments, lora_config, prompt_completion, tiny_trainer
from transformers import DataCollatorForSeq2Seq, DataCollatorWithFlattening, Trainer
from trl import SFTTrainer

from star_dss_plugin import ConfigError, DataError, attach
from star_dss_plugin.data.columns import REF_COLUMN, SCORES_COLUMN
from star_dss_plugin.training.rows.collation import document_starts

LENGTH = 64


def texts():
    """Return rows without prompts: each first token is trained, but not from the previous row."""
    words = ["the dog is bad and lazy", "hello world", "good words keep it safe", "is it bad?"]
    return Dataset.from_dict({"text": words * 4})


def model(tokenizer, attention):
    made = tiny_llama(len(tokenizer))
    made.set_attn_implementation(attention)
    return made


def documents(row, columns=("input_ids", "labels", SCORES_COLUMN, REF_COLUMN)):
    """Return the documents of a packed row, as rows."""
    starts = document_starts(row)
    for start, end in zip(starts, [*starts[1:], len(row["input_ids"])], strict=True):
        document = {name: list(row[name])[start:end] for name in columns if name in row}
        yield {**document, "labels": [-100, *document["labels"][1:]]}


def gradients(trainer, batch):
    trainer.model.zero_grad()
    trainer.model.eval()
    batch = trainer._prepare_inputs(batch)
    trained = int((batch["labels"][:, 1:] != -100).sum())
    loss = trainer.compute_loss(trainer.model, batch, num_items_in_batch=trained)
    loss.backward()
    found = {n: p.grad.clone() for n, p in trainer.model.named_parameters() if p.grad is not None}
    return loss.detach(), found, trained


def same(tokenizer, joined, rows, features):
    """Check that a batch of joined rows has the loss and gradients of a padded batch."""
    joined.data_collator.known = None  # these documents were never rows by themselves
    batch = joined.data_collator(features)
    assert "position_ids" in batch
    loss, found, trained = gradients(joined, batch)
    padded = joined.data_collator.inner
    joined.data_collator.inner = DataCollatorForSeq2Seq(tokenizer)
    apart = joined.data_collator(rows)
    joined.data_collator.inner = padded
    assert len(apart["input_ids"]) == len(rows) > 1
    expected, wanted, count = gradients(joined, apart)
    assert trained == count
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-7)
    for name, gradient in wanted.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6)


def start_from_elsewhere(trainer):
    """Change the policy's weights, so that its KL from the reference is not 0."""
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            if parameter.requires_grad:
                parameter += 0.02 * torch.randn_like(parameter)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("data", [prompt_completion, texts])
@pytest.mark.parametrize(
    ("reference", "estimator"), [("precomputed", "k2"), ("copy", "k3"), ("copy", "full")]
)
def test_packed_documents_are_as_if_alone(
    tmp_path, tokenizer, attention, data, reference, estimator
):
    trainer = tiny_trainer(
        tmp_path,
        tokenizer,
        data(),
        model(tokenizer, attention),
        packing=True,
        max_length=LENGTH,
        reference=reference,
        kl_estimator=estimator,
    )
    rows = list(trainer.train_dataset)
    assert any(len(row["seq_lengths"]) > 1 for row in rows)
    assert len(rows) > 1
    start_from_elsewhere(trainer)
    same(tokenizer, trainer, [d for row in rows for d in documents(row)], rows)


@pytest.mark.parametrize("data", [prompt_completion, texts])
@pytest.mark.parametrize("lora", [False, True])
def test_padding_free_batches_are_as_if_padded(tmp_path, tokenizer, data, lora):
    trainer = tiny_trainer(
        tmp_path,
        tokenizer,
        data(),
        padding_free=True,
        max_length=None,
        peft_config=lora_config() if lora else None,
    )
    rows = list(trainer.train_dataset)[:5]
    start_from_elsewhere(trainer)
    same(tokenizer, trainer, [d for row in rows for d in documents(row)], rows)
    one = trainer.data_collator(rows[:1])
    assert torch.equal(one[SCORES_COLUMN][0], torch.tensor(rows[0][SCORES_COLUMN]))


def scored_tokens(rows):
    """Return every token with its score, which must not depend on the packing."""
    return Counter(
        (token, round(score, 6))
        for row in rows
        for token, score in zip(row["input_ids"], row[SCORES_COLUMN], strict=True)
    )


@pytest.mark.parametrize("strategy", ["bfd", "bfd_split", "wrapped"])
def test_scores_are_those_of_whole_rows(tmp_path, tokenizer, strategy):
    """Also if packing cuts a response in two."""
    plain = tiny_trainer(tmp_path, tokenizer, max_length=None)
    assert any(len(row["input_ids"]) > 28 for row in plain.train_dataset)
    packed = tiny_trainer(
        tmp_path, tokenizer, packing=True, packing_strategy=strategy, max_length=28, kl_coef=0.0
    )
    assert all(len(row["input_ids"]) <= 28 for row in packed.train_dataset)
    assert ("seq_lengths" in packed.train_dataset.column_names) == (strategy != "wrapped")
    found, all_of_them = (scored_tokens(t.train_dataset) for t in (packed, plain))
    if strategy == "bfd":  # this strategy truncates long rows
        assert not found - all_of_them
        assert found != all_of_them
    else:
        assert found == all_of_them


@pytest.mark.parametrize("strategy", ["bfd", "bfd_split", "wrapped"])
@pytest.mark.parametrize("data", [prompt_completion, texts])
def test_the_reference_is_the_starting_model_in_every_strategy(tmp_path, tokenizer, strategy, data):
    """The reference reads the policy's context: cut documents, and preceding other documents."""
    trainer = tiny_trainer(
        tmp_path,
        tokenizer,
        data(),
        packing=True,
        packing_strategy=strategy,
        max_length=40,
        loss_type="kl_only",
    )
    loss, _, _ = gradients(trainer, trainer.data_collator(list(trainer.train_dataset)))
    assert loss == pytest.approx(0, abs=1e-9)
    start_from_elsewhere(trainer)
    loss, _, _ = gradients(trainer, trainer.data_collator(list(trainer.train_dataset)))
    assert loss > 1e-4


@pytest.mark.parametrize("strategy", ["bfd", "wrapped"])
def test_all_safe_packed_equals_stock_packed(tmp_path, tokenizer, strategy):
    options = {
        "packing": True,
        "packing_strategy": strategy,
        "max_length": LENGTH,
        "shuffle_dataset": True,
        "per_device_train_batch_size": 2,
    }
    ours = tiny_trainer(
        tmp_path, tokenizer, **options, guard={"preset": "test-words", "word": "☃", "safe": 1.0}
    )
    ours.train()
    stock = tiny_trainer(tmp_path, tokenizer, cls=SFTTrainer, **options)
    stock.train()
    torch.testing.assert_close(
        torch.tensor(history(ours)), torch.tensor(history(stock)), rtol=1e-6, atol=1e-6
    )


def test_evaluation_is_packed_like_training(tmp_path, tokenizer):
    trainer = tiny_trainer(tmp_path, tokenizer, packing=True, max_length=LENGTH)
    late = trainer.evaluate(prompt_completion())
    apart = tiny_trainer(tmp_path, tokenizer).evaluate(prompt_completion())
    assert late["eval_loss"] == pytest.approx(apart["eval_loss"], rel=1e-5)
    again = trainer.evaluate(trainer.train_dataset)  # packed already
    assert again["eval_loss"] == pytest.approx(late["eval_loss"], rel=1e-5)


def test_evaluation_may_stay_unpacked(tmp_path, tokenizer):
    trainer = tiny_trainer(tmp_path, tokenizer, packing=True, eval_packing=False, max_length=LENGTH)
    apart = tiny_trainer(tmp_path, tokenizer).evaluate(prompt_completion())
    late = trainer.evaluate(prompt_completion())
    assert late["eval_loss"] == pytest.approx(apart["eval_loss"], rel=1e-5)


@pytest.mark.parametrize("strategy", ["bfd_split", "wrapped"])
@pytest.mark.parametrize("mode", ["static", "rejection"])
def test_a_cut_response_has_no_last_score(tmp_path, tokenizer, strategy, mode):
    with pytest.raises(ConfigError, match="reads the score at the end"):
        tiny_trainer(tmp_path, tokenizer, packing=True, packing_strategy=strategy, loss_type=mode)
    tiny_trainer(tmp_path, tokenizer, packing=True, loss_type=mode, max_length=LENGTH).train()


def test_rows_that_are_packed_already_are_refused(tmp_path, tokenizer):
    stock = tiny_trainer(tmp_path, tokenizer, cls=SFTTrainer, packing=True, max_length=LENGTH)
    with pytest.raises(ConfigError, match="packed its rows already"):
        attach(stock, guard="test-words")
    with pytest.raises(DataError, match="packed already"):
        tiny_trainer(tmp_path, tokenizer, stock.train_dataset, max_length=LENGTH)
    with pytest.raises(ConfigError, match="eval_packing is on and packing is off"):
        tiny_trainer(tmp_path, tokenizer, eval_packing=True)


def test_attaching_to_a_padding_free_trainer(tmp_path, tokenizer):
    ours = tiny_trainer(tmp_path, tokenizer, padding_free=True, max_length=None)
    ours.train()
    stock = tiny_trainer(tmp_path, tokenizer, cls=SFTTrainer, padding_free=True, max_length=None)
    attach(stock, guard="test-words", chunk_size=2).train()
    assert history(ours) == history(stock)


def test_a_plain_trainer_with_a_flattening_collator(tmp_path, tokenizer):
    rows = tiny_trainer(tmp_path, tokenizer).train_dataset
    found = []
    for collator in (DataCollatorWithFlattening(), DataCollatorForSeq2Seq(tokenizer)):
        args = arguments(tmp_path)
        plain = Trainer(
            tiny_llama(len(tokenizer)),
            args=copy.copy(args),
            train_dataset=rows,
            processing_class=tokenizer,
            data_collator=collator,
        )
        attach(plain, guard="test-words", chunk_size=2).train()
        found.append(history(plain))
    torch.testing.assert_close(torch.tensor(found[0]), torch.tensor(found[1]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("strategy", ["bfd", "bfd_split", "wrapped"])
def test_many_rows(tmp_path, tokenizer, strategy):
    """TRL packs a thousand rows at a time, and assumes that all columns have the same chunks."""
    words = ["the dog is bad", "hello world", "good words keep it safe, yes"]
    data = Dataset.from_dict({"text": [f"{i} {words[i % 3]}" for i in range(1100)]})
    plain = tiny_trainer(tmp_path, tokenizer, data, kl_coef=0.0, max_length=None)
    packed = tiny_trainer(
        tmp_path,
        tokenizer,
        data,
        packing=True,
        packing_strategy=strategy,
        max_length=LENGTH,
        kl_coef=0.0,
    )
    assert scored_tokens(packed.train_dataset) == scored_tokens(plain.train_dataset)


def test_a_mode_that_packing_ignores_is_refused(tmp_path, tokenizer):
    with pytest.raises(ConfigError, match="which TRL ignores when it packs"):
        tiny_trainer(tmp_path, tokenizer, packing=True, truncation_mode="keep_end")
