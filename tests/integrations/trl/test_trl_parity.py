"""StarDSSTrainer takes arguments and logs metrics as stock SFTTrainer does."""

import pytest

pytest.importorskip("trl")
from star_dss_trl import StarDSSTrainer
from support.models import tiny_llama
from support.trl_runs import arguments, conversations


def build(tmp_path, tokenizer, *, eval_dataset, **changes):
    return StarDSSTrainer(
        tiny_llama(len(tokenizer)),
        args=arguments(tmp_path, **changes),
        train_dataset=conversations(),
        eval_dataset=eval_dataset,
        processing_class=tokenizer,
    )


def test_evaluate_returns_the_metrics_that_are_logged(tmp_path, tokenizer):
    found = build(tmp_path, tokenizer, eval_dataset=conversations()).evaluate()
    assert found["eval_star_dss/kl"] >= 0
    assert {f"eval_star_dss/{name}" for name in ("mean_score", "ce", "kl")} <= found.keys()


def test_the_best_model_may_be_chosen_by_a_metric_of_star_dss(tmp_path, tokenizer):
    trainer = build(
        tmp_path,
        tokenizer,
        eval_dataset=conversations(),
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="eval_star_dss/kl",
        greater_is_better=False,
        max_steps=2,
    )
    trainer.train()
    assert trainer.state.best_metric is not None


def test_arguments_may_be_given_in_the_order_of_sfttrainer(tmp_path, tokenizer):
    trainer = StarDSSTrainer(
        tiny_llama(len(tokenizer)),
        arguments(tmp_path),
        None,
        conversations(),
        processing_class=tokenizer,
    )
    assert "star_scores" in trainer.train_dataset.column_names
