"""TRL: `StarDSSTrainer` and `attach`, compared with stock SFT."""

import json

import pytest
import torch
from datasets import concatenate_datasets

pytest.importorskip("trl")
from star_dss_trl import StarDSSTrainer
from support.guards import WordGuard
from support.models import tiny_llama
from support.run_differences import history
from support.trl_runs import (
    arguments,
    conversations,
    lora_config,
    prompt_completion,
    tiny_trainer,
)
from trl import SFTConfig, SFTTrainer

from star_dss_plugin import ConfigError, attach
from star_dss_plugin.data.columns import SCORES_COLUMN
from star_dss_plugin.data.provenance import provenances_of


def test_the_trainer_scores_trains_and_logs(tmp_path, tokenizer, capsys):
    trainer = tiny_trainer(tmp_path, tokenizer)
    trainer.train()
    lines = [h for h in trainer.state.log_history if "grad_norm" in h]
    assert len(lines) == 3
    for name in ("mean_score", "share_below_threshold", "ce", "kl", "kl_weight_mass"):
        assert f"star_dss/{name}" in lines[0]
    for name in ("entropy", "mean_token_accuracy", "num_tokens"):
        assert name in lines[0]
    line = lines[-1]
    assert line["loss"] == pytest.approx(line["star_dss/ce"] + line["star_dss/kl"], abs=2e-4)
    assert 0 < max(h["star_dss/share_below_threshold"] for h in lines) < 1
    out = capsys.readouterr().out
    assert "STAR-DSS is active: loss_type=star_dss" in out
    assert "guard=test-words" in out
    record = json.loads((tmp_path / "out" / "star_dss.json").read_text())
    assert record["options"]["guard"] == "test-words"
    assert record["data"]["train"]["responses"] == 8


@pytest.mark.parametrize("data", [prompt_completion, conversations], ids=["prompt", "messages"])
def test_safe_scores_give_the_run_of_stock_sft(tmp_path, tokenizer, data):
    ours = tiny_trainer(
        tmp_path,
        tokenizer,
        data(),
        guard={"preset": "test-words", "word": "☃", "safe": 1.0},
        completion_only_loss=None,
    )
    ours.train()
    stock = SFTTrainer(
        tiny_llama(len(tokenizer)),
        args=arguments(tmp_path, SFTConfig),
        train_dataset=ours.train_dataset.remove_columns([SCORES_COLUMN, "ref_logps"]),
        processing_class=tokenizer,
    )
    stock.train()
    torch.testing.assert_close(
        torch.tensor(history(ours)), torch.tensor(history(stock)), rtol=1e-6, atol=1e-6
    )
    for key in ("entropy", "mean_token_accuracy", "num_tokens"):
        assert [h[key] for h in ours.state.log_history if key in h] == pytest.approx(
            [h[key] for h in stock.state.log_history if key in h], rel=1e-6
        )


def test_accumulation_does_not_change_the_gradient(tmp_path, tokenizer):
    one = tiny_trainer(tmp_path, tokenizer)
    one.train()
    four = tiny_trainer(
        tmp_path, tokenizer, per_device_train_batch_size=1, gradient_accumulation_steps=4
    )
    four.train()
    torch.testing.assert_close(
        torch.tensor(history(one)), torch.tensor(history(four)), rtol=1e-4, atol=2e-5
    )


def test_only_the_assistants_turns_are_trained(tmp_path, tokenizer):
    trainer = tiny_trainer(tmp_path, tokenizer, conversations())
    row = trainer.train_dataset[0]
    trained = [i for i, label in zip(row["input_ids"], row["labels"]) if label != -100]
    assert tokenizer.decode(trained) == (
        "i am fine, thank you.<|im_end|>i am fine, thank you. yes<|im_end|>"
    )
    assert all(s == 1.0 for s, label in zip(row[SCORES_COLUMN], row["labels"]) if label == -100)


def test_scores_fall_at_the_unsafe_word(tmp_path, tokenizer):
    """With chunk_size 2 the token before the word has the word's score."""
    row = tiny_trainer(tmp_path, tokenizer).train_dataset[1]
    trained = [i for i, label in enumerate(row["labels"]) if label != -100]
    tokens = [tokenizer.decode(row["input_ids"][i]) for i in trained]
    assert tokens[:6] == ["no", "!", " it", " is", " a", " bad"]
    assert [row[SCORES_COLUMN][i] for i in trained] == pytest.approx(
        [0.9] * 4 + [0.1] * (len(trained) - 4)
    )


def test_the_guard_is_not_asked_again_for_cached_scores(tmp_path, tokenizer):
    tiny_trainer(tmp_path, tokenizer)
    before = WordGuard.loads
    tiny_trainer(tmp_path, tokenizer)
    assert WordGuard.loads == before
    tiny_trainer(tmp_path, tokenizer, chunk_size=3)
    assert WordGuard.loads > before


def test_data_of_several_guards_names_them_all(tmp_path, tokenizer):
    one = tiny_trainer(tmp_path, tokenizer).train_dataset
    other = tiny_trainer(
        tmp_path, tokenizer, guard={"preset": "test-words", "word": "lazy"}, chunk_size=3
    )
    joined = concatenate_datasets([one, other.train_dataset])
    assert len(provenances_of(joined)) == 2
    assert (
        tiny_trainer(tmp_path, tokenizer, joined).star_dss_state.summaries["train"].guard
        == "test-words"
    )


def test_evaluation_uses_the_same_loss(tmp_path, tokenizer):
    trainer = StarDSSTrainer(
        tiny_llama(len(tokenizer)),
        args=arguments(tmp_path, eval_strategy="steps", eval_steps=2),
        train_dataset=prompt_completion(),
        eval_dataset=conversations(),
        processing_class=tokenizer,
    )
    metrics = trainer.evaluate()
    assert metrics["eval_loss"] > 0
    trainer.train()
    logged = [h for h in trainer.state.log_history if "eval_loss" in h][-1]
    assert "eval_star_dss/ce" in logged
    assert "eval_mean_token_accuracy" in logged


def test_evaluation_data_may_stay_unscored(tmp_path, tokenizer):
    trainer = tiny_trainer(tmp_path, tokenizer, score_eval=False)
    found = trainer.evaluate(prompt_completion())
    stock = tiny_trainer(tmp_path, tokenizer, cls=SFTTrainer).evaluate(prompt_completion())
    assert found["eval_loss"] == pytest.approx(stock["eval_loss"], rel=1e-6)
    assert trainer.star_dss_state.summaries["eval"].guard == "none (score_eval is off)"
    scored = tiny_trainer(tmp_path, tokenizer).evaluate(prompt_completion())
    assert scored["eval_loss"] != pytest.approx(stock["eval_loss"], rel=1e-3)


def test_evaluation_data_given_after_training(tmp_path, tokenizer):
    trainer = tiny_trainer(tmp_path, tokenizer, peft_config=lora_config(), reference="adapter")
    trainer.train()
    assert trainer.evaluate(eval_dataset=conversations())["eval_loss"] > 0
    precomputed = tiny_trainer(tmp_path, tokenizer)
    precomputed.train()
    with pytest.raises(ConfigError, match="came after training had started"):
        precomputed.evaluate(eval_dataset=conversations())


@pytest.mark.parametrize("loss_type", ["nll", "dft"])
def test_loss_types_of_trl_are_unchanged(tmp_path, tokenizer, loss_type):
    ours = tiny_trainer(tmp_path, tokenizer, loss_type=loss_type, guard=None)
    ours.train()
    stock = tiny_trainer(tmp_path, tokenizer, cls=SFTTrainer, loss_type=loss_type)
    stock.train()
    assert history(ours) == history(stock)
    assert not any("star_dss" in key for h in ours.state.log_history for key in h)


def test_attach_gives_the_run_of_the_trainer(tmp_path, tokenizer):
    ours = tiny_trainer(tmp_path, tokenizer)
    ours.train()
    stock = tiny_trainer(tmp_path, tokenizer, cls=SFTTrainer)
    assert attach(stock, guard="test-words", chunk_size=2) is stock
    assert isinstance(stock, SFTTrainer)
    stock.train()
    torch.testing.assert_close(torch.tensor(history(stock)), torch.tensor(history(ours)))
    with pytest.raises(ConfigError, match="already"):
        attach(stock, guard="test-words")


def test_a_scored_data_set_is_not_scored_again(tmp_path, tokenizer):
    scored = tiny_trainer(tmp_path, tokenizer).train_dataset.remove_columns("ref_logps")
    before = WordGuard.loads
    cut = len(scored[0]["input_ids"]) - 2
    trainer = tiny_trainer(tmp_path, tokenizer, scored, guard=None, max_length=cut)
    assert WordGuard.loads == before
    row, full = trainer.train_dataset[0], scored[0]
    assert len(row["input_ids"]) == cut
    assert row[SCORES_COLUMN] == full[SCORES_COLUMN][:cut]
    trainer.train()
    assert trainer.star_dss_state.summaries["train"].guard == "test-words"


def test_the_check_before_the_first_step_does_not_change_the_run(tmp_path, tokenizer):
    """The check draws no random numbers and logs no metrics."""
    checked = tiny_trainer(tmp_path, tokenizer)
    checked.train()
    unchecked = tiny_trainer(tmp_path, tokenizer)
    kept = [
        c for c in unchecked.callback_handler.callbacks if type(c).__name__ != "StarDSSCallback"
    ]
    unchecked.callback_handler.callbacks = kept
    unchecked.train()
    drop = ("train_runtime", "train_samples_per_second", "train_steps_per_second")
    plain = [
        [{k: v for k, v in h.items() if k not in drop} for h in t.state.log_history]
        for t in (checked, unchecked)
    ]
    assert plain[0] == plain[1]


def test_scores_without_labels_train_no_user_turns(tmp_path, tokenizer):
    scored = tiny_trainer(tmp_path, tokenizer, conversations()).train_dataset
    bare = scored.remove_columns(["labels", "ref_logps"])
    again = tiny_trainer(tmp_path, tokenizer, bare, guard=None).train_dataset
    assert again["labels"] == scored["labels"]
