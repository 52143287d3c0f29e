"""Changes that users make to a trainer: the loss stays that of STAR-DSS, or the run stops."""

import logging
import os

import pytest
import torch
from datasets import Dataset

pytest.importorskip("trl")

from accelerate.state import AcceleratorState
from peft import get_peft_model
from star_dss_trl import StarDSSTrainer
from support.models import tiny_llama
from support.run_differences import history
from support.trl_runs import (
    ANSWERS,
    PROMPTS,
    arguments,
    conversations,
    lora_config,
    prompt_completion,
    tiny_trainer,
)
from trl import SFTConfig, SFTTrainer

from star_dss_plugin import ConfigError, StarDSSError, attach
from star_dss_plugin.data.columns import REF_COLUMN, SCORES_COLUMN


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("compute_loss_func", lambda outputs, labels: outputs.logits.sum(), "compute_loss_func is"),
        ("args.label_smoothing_factor", 0.1, "label_smoothing_factor is 0.1"),
    ],
)
def test_a_setting_that_changes_after_setup_is_refused(tmp_path, tokenizer, name, value, message):
    trainer = tiny_trainer(tmp_path, tokenizer)
    owner, _, attribute = name.rpartition(".")
    setattr(getattr(trainer, owner) if owner else trainer, attribute, value)
    with pytest.raises(ConfigError, match=message):
        trainer.train()


@pytest.mark.parametrize("options", [{"reference": "adapter"}, {"kl_estimator": "full"}])
def test_frozen_parameters_of_an_adapter_stay_frozen(tmp_path, tokenizer, options):
    model = get_peft_model(tiny_llama(len(tokenizer)), lora_config())
    for name, parameter in model.named_parameters():
        if "layers.0." in name or "lora_A" in name:
            parameter.requires_grad_(False)
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    before = {n: p.detach().clone() for n, p in model.named_parameters() if n not in trained}
    assert trained
    assert any("lora" in name for name in before)
    trainer = tiny_trainer(tmp_path, tokenizer, model=model, **options)
    trainer.train()
    after = dict(trainer.model.named_parameters())
    assert {name for name, p in after.items() if p.requires_grad} == trained
    assert all(torch.equal(after[name], values) for name, values in before.items())


@pytest.mark.parametrize("strategy", ["bfd", "wrapped"])
def test_packed_data_is_evaluated_during_training(tmp_path, tokenizer, strategy):
    trainer = StarDSSTrainer(
        tiny_llama(len(tokenizer)),
        args=arguments(
            tmp_path,
            packing=True,
            packing_strategy=strategy,
            max_length=48,
            eval_strategy="steps",
            eval_steps=1,
        ),
        train_dataset=prompt_completion(),
        eval_dataset=conversations(),
        processing_class=tokenizer,
    )
    trainer.train()
    losses = [h["eval_loss"] for h in trainer.state.log_history if "eval_loss" in h]
    assert len(losses) == 3
    assert trainer.evaluate(trainer.train_dataset)["eval_loss"] > 0


class Unshaped(StarDSSTrainer):
    """A subclass that returns the loss of SFTTrainer."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        super().compute_loss(model, dict(inputs), num_items_in_batch=num_items_in_batch)
        bare = {k: v for k, v in inputs.items() if k not in (SCORES_COLUMN, REF_COLUMN)}
        return SFTTrainer.compute_loss(self, model, bare, return_outputs, num_items_in_batch)


def test_the_check_of_the_loss_needs_rows_with_trained_tokens(tmp_path, tokenizer):
    ids = tokenizer("no! it is a bad word")["input_ids"]
    rows = [{"input_ids": ids, "labels": [-100] * len(ids)}] * 33
    rows += [{"input_ids": ids, "labels": [-100, -100, *ids[2:]]}] * 8
    settings = {"dataset_kwargs": {"skip_prepare_dataset": True}}
    data = Dataset.from_list(rows)
    tiny_trainer(tmp_path, tokenizer, data, **settings).train()
    wrong = Unshaped(
        tiny_llama(len(tokenizer)),
        args=arguments(tmp_path, **settings),
        train_dataset=data,
        processing_class=tokenizer,
    )
    with pytest.raises(StarDSSError, match="the STAR-DSS loss is not the one"):
        wrong.train()


def test_a_model_that_changes_after_setup_is_refused(tmp_path, tokenizer):
    trainer = tiny_trainer(tmp_path, tokenizer)
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            parameter.mul_(3.0)
    with pytest.raises(StarDSSError, match="not the one that the reference was made of"):
        trainer.train()


def scored_rows(tokenizer):
    """Return short rows with safe scores, and longer rows with unsafe scores."""
    rows = []
    for text, score in (("yes", 1.0), ("no! it is a bad word", 0.25)) * 4:
        ids = tokenizer("hello " + text)["input_ids"]
        rows.append({"input_ids": ids, "labels": ids, "star_scores": [score] * len(ids)})
    return Dataset.from_list(rows)


@pytest.mark.parametrize(("factor", "stopped"), [(1.0, False), (1.1, True)])
def test_a_model_that_changes_slightly_after_setup_is_refused(tmp_path, tokenizer, factor, stopped):
    """A briefly trained adapter makes such a change; safe rows have no reference to compare."""
    settings = {"dataset_kwargs": {"skip_prepare_dataset": True}}
    trainer = tiny_trainer(tmp_path, tokenizer, scored_rows(tokenizer), **settings)
    with torch.no_grad():
        trainer.model.lm_head.weight.mul_(factor)
    if not stopped:
        trainer.train()
        return
    with pytest.raises(StarDSSError, match=r"log-probabilities of one row are 0\.[0-4]\d apart"):
        trainer.train()


def test_train_may_be_called_again(tmp_path, tokenizer):
    trainer = tiny_trainer(tmp_path, tokenizer, learning_rate=0.3)
    trainer.train()
    trainer.train()


@pytest.mark.parametrize(("reference", "warned"), [("auto", True), ("copy", True), ("NAME", False)])
def test_attach_warns_if_the_reference_is_a_trained_model(
    tmp_path, tokenizer, model_dir, caplog, reference, warned
):
    trainer = tiny_trainer(tmp_path, tokenizer, cls=SFTTrainer)
    trainer.train()
    reference = str(model_dir) if reference == "NAME" else reference
    attach(trainer, guard="test-words", reference=reference)
    said = "has trained 3 steps without the STAR-DSS loss" in caplog.text
    assert said == warned
    trainer.train()


def test_attach_refuses_a_model_init(tmp_path, tokenizer):
    trainer = SFTTrainer(
        tiny_llama(len(tokenizer)),
        args=arguments(tmp_path, SFTConfig),
        train_dataset=prompt_completion(),
        processing_class=tokenizer,
    )
    trainer.model_init = lambda: tiny_llama(len(tokenizer))
    with pytest.raises(ConfigError, match="model_init is given"):
        attach(trainer, guard="test-words")


def test_evaluation_data_that_is_set_later_is_scored(tmp_path, tokenizer):
    trainer = tiny_trainer(tmp_path, tokenizer)
    trainer.eval_dataset = trainer.train_dataset.remove_columns([SCORES_COLUMN, REF_COLUMN])
    assert trainer.evaluate()["eval_loss"] == trainer.evaluate(trainer.train_dataset)["eval_loss"]


def test_a_text_prompt_is_not_trained(tmp_path, tokenizer, caplog):
    rows = [{"prompt": p, "completion": a} for p, a in zip(PROMPTS, ANSWERS, strict=True)]
    usual = tiny_trainer(tmp_path, tokenizer, Dataset.from_list(rows))
    with caplog.at_level(logging.WARNING):
        all_tokens = tiny_trainer(
            tmp_path, tokenizer, Dataset.from_list(rows), completion_only_loss=False
        )
    assert f"In {len(rows)} of {len(rows)} conversations what the user says" in caplog.text
    for column in ("labels", SCORES_COLUMN):
        assert all_tokens.train_dataset[:][column] == usual.train_dataset[:][column]


def test_a_users_call_of_log_adds_no_metrics(tmp_path, tokenizer):
    trainer = tiny_trainer(tmp_path, tokenizer)
    trainer.train()
    trainer.log({"mine": 1.0})
    assert set(trainer.state.log_history[-1]) == {"mine", "epoch", "step"}


# The warning comes from tracing TRL's fused head.
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_a_compiled_model_trains_the_same(tmp_path, tokenizer, monkeypatch):
    found = []
    for more in ({}, {"torch_compile": True, "torch_compile_backend": "eager"}):
        trainer = tiny_trainer(tmp_path, tokenizer, **more)
        trainer.train()
        found.append(torch.tensor(history(trainer)))
    # accelerate keeps these settings for all trainers of the process.
    for name in [name for name in os.environ if name.startswith("ACCELERATE_DYNAMO")]:
        monkeypatch.delenv(name)
    AcceleratorState._reset_state(reset_partial_state=True)
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)


def test_attach_refuses_a_loss_type_of_trl(tmp_path, tokenizer):
    trainer = tiny_trainer(tmp_path, tokenizer, cls=SFTTrainer)
    with pytest.raises(ConfigError, match="with which nothing is shaped"):
        attach(trainer, guard="test-words", loss_type="nll")
    assert type(trainer) is SFTTrainer


def test_a_guard_that_scored_data_does_not_need_is_reported(tmp_path, tokenizer, caplog):
    scored = tiny_trainer(tmp_path, tokenizer).train_dataset
    with caplog.at_level(logging.WARNING):
        tiny_trainer(tmp_path, tokenizer, scored)
    assert "brings its scores" not in caplog.text
    with caplog.at_level(logging.WARNING):
        tiny_trainer(tmp_path, tokenizer, scored, chunk_size=9)
    assert "The train data set brings its scores" in caplog.text


def test_a_data_set_that_lost_its_reference_values_is_refused(tmp_path, tokenizer):
    trainer = tiny_trainer(tmp_path, tokenizer)
    trainer.train_dataset = trainer.train_dataset.remove_columns(REF_COLUMN)
    with pytest.raises(StarDSSError, match="scores or reference values were changed since"):
        trainer.train()


def test_a_users_column_ref_logps_is_not_read(tmp_path, tokenizer):
    data = prompt_completion()
    data = data.add_column(REF_COLUMN, [-1.5] * len(data))
    trainer = tiny_trainer(tmp_path, tokenizer, data, loss_type="rejection")
    trainer.train()
    assert REF_COLUMN not in trainer.train_dataset.column_names


@pytest.mark.filterwarnings("ignore:`return_outputs=True`:FutureWarning")  # of predict in TRL
def test_predict_does_not_change_the_metrics_of_the_next_evaluation(tmp_path, tokenizer):
    trainer = tiny_trainer(tmp_path, tokenizer)
    one, other = (trainer.train_dataset.select([i]) for i in (0, 1))
    trainer.evaluate(other)
    alone = trainer.state.log_history[-1]["eval_star_dss/mean_score"]
    trainer.predict(one)
    trainer.evaluate(other)
    assert trainer.state.log_history[-1]["eval_star_dss/mean_score"] == alone


def test_each_of_several_evaluation_sets_has_its_own_metrics(tmp_path, tokenizer):
    trainer = StarDSSTrainer(
        tiny_llama(len(tokenizer)),
        args=arguments(tmp_path, eval_strategy="steps", eval_steps=3),
        train_dataset=prompt_completion(),
        processing_class=tokenizer,
        eval_dataset={"a": prompt_completion(), "b": conversations()},
    )
    trainer.train()
    logged = {name for line in trainer.state.log_history for name in line}
    assert {"eval_a_star_dss/mean_score", "eval_b_star_dss/mean_score"} <= logged
    assert "eval_star_dss/mean_score" not in logged
