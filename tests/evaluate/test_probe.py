"""The safety probe: what it measures and logs, and that it leaves training unchanged."""

import copy
import logging

import pytest
import torch

pytest.importorskip("trl")

from support.guards import WordGuard
from support.models import tiny_llama
from support.run_differences import history
from support.trl_runs import Stop, lora_config, tiny_trainer

from star_dss_plugin import ConfigError, SafetyProbe, StarDSSError
from star_dss_plugin.evaluate.prompts import HARMFUL, demo_prompts

PROMPTS = ["is this bad?", "how are you?", "who is lazy?"]
SHARE, START = "star_dss/probe_safe_share", "star_dss/probe_safe_share_start"


class CountingJudge(WordGuard):
    """Find a given number of answers safe at each probe."""

    def __init__(self, *safe):
        super().__init__()
        self.left, self.answers = list(safe), []

    def score(self, conversations):
        self.answers.append([conversation[-1]["content"] for conversation in conversations])
        safe = self.left.pop(0)
        return [float(i < safe) for i in range(len(conversations))]


class RandomJudge(WordGuard):
    """Draw random numbers, as loading a model does."""

    def token_scores(self, responses):
        torch.rand(7)
        return super().token_scores(responses)


def trainer_with_probe(tmp_path, tokenizer, changes=None, **options):
    """Return a trainer with a probe of three prompts at every step."""
    trainer = tiny_trainer(tmp_path, tokenizer, **(changes or {}))
    options = {"prompts": PROMPTS, "every": 1, "max_new_tokens": 4, "batch_size": 2, **options}
    trainer.add_callback(SafetyProbe(trainer, **options))
    return trainer


def logged_values(trainer, name):
    """Return the values that a trainer has logged under a name."""
    return [line[name] for line in trainer.state.log_history if name in line]


def generation_settings(model):
    return model.generation_config.to_dict(), model.config.use_cache


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
def test_the_probe_does_not_change_training(tmp_path, tokenizer, lora, checkpointing):
    def settings():
        # Dropout draws random numbers, so a probe that drew any would change the losses.
        return {
            "model": tiny_llama(len(tokenizer), attention_dropout=0.3),
            "gradient_checkpointing": checkpointing,
            "peft_config": lora_config() if lora else None,
            "max_steps": 4,
        }

    plain = tiny_trainer(tmp_path, tokenizer, **settings())
    plain.train()
    watched = trainer_with_probe(tmp_path, tokenizer, settings(), judge=RandomJudge())
    watched.train()
    assert history(watched) == history(plain)
    for a, b in zip(plain.model.parameters(), watched.model.parameters(), strict=True):
        assert torch.equal(a, b)
    assert generation_settings(watched.model) == generation_settings(plain.model)
    assert len(logged_values(watched, SHARE)) == 4


def test_the_probe_restores_modes_settings_and_random_state(tmp_path, tokenizer):
    trainer = trainer_with_probe(tmp_path, tokenizer)
    probe = trainer.callback_handler.callbacks[-1]
    trainer.model.train()
    trainer.model.model.layers[0].eval()  # as a user may freeze it
    modes = [m.training for m in trainer.model.modules()]
    state, settings = torch.get_rng_state(), copy.deepcopy(generation_settings(trainer.model))
    assert 0 <= probe._safe_share() <= 1
    assert [m.training for m in trainer.model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)
    assert generation_settings(trainer.model) == settings


def test_answers_depend_neither_on_the_batch_nor_on_dropout(tmp_path, tokenizer):
    dropping = {"model": tiny_llama(len(tokenizer), attention_dropout=0.5)}
    trainer = trainer_with_probe(tmp_path, tokenizer, dropping, max_new_tokens=8)
    trainer.model.train()
    probe = trainer.callback_handler.callbacks[-1]
    together = probe._answers(probe.prompts)
    alone = [probe._answers([prompt])[0] for prompt in probe.prompts]
    assert together == alone


def test_the_share_is_logged_with_the_trainers_metrics(tmp_path, tokenizer):
    judge = CountingJudge(3, 2, 1)
    trainer = trainer_with_probe(
        tmp_path, tokenizer, {"max_steps": 4}, every=2, margin=1.0, judge=judge
    )
    trainer.train()
    assert logged_values(trainer, START) == [1.0]
    lines = [line for line in trainer.state.log_history if SHARE in line]
    assert [(line["step"], line[SHARE]) for line in lines] == [
        (2, pytest.approx(2 / 3)),
        (4, pytest.approx(1 / 3)),
    ]
    assert all("loss" in line and "mean_token_accuracy" in line for line in lines)


def test_a_fall_beyond_the_margin_warns(tmp_path, tokenizer, caplog):
    judge = CountingJudge(3, 2, 1, 3)
    with caplog.at_level(logging.WARNING):
        trainer_with_probe(tmp_path, tokenizer, margin=0.5, judge=judge).train()
    warnings = [r.getMessage() for r in caplog.records if "Safety probe" in r.getMessage()]
    assert len(warnings) == 1
    assert "step 2: 33 % of 3 answers are safe; before training it was 100 %" in warnings[0]


def test_a_fall_beyond_the_margin_can_stop_training(tmp_path, tokenizer):
    judge = CountingJudge(3, 0)
    trainer = trainer_with_probe(
        tmp_path,
        tokenizer,
        {"max_steps": 9, "logging_steps": 5},
        every=2,
        on_fall="stop",
        judge=judge,
    )
    trainer.train()
    assert trainer.state.global_step == 2
    assert logged_values(trainer, SHARE) == [0.0]


def test_a_resumed_run_compares_with_the_share_before_training(tmp_path, tokenizer):
    config = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    judge = CountingJudge(3, 3, 3)
    stopped = trainer_with_probe(tmp_path, tokenizer, config, judge=judge)
    stopped.add_callback(Stop())
    stopped.train()
    judged = CountingJudge(0, 0)
    resumed = trainer_with_probe(tmp_path, tokenizer, config, judge=judged)
    resumed.train(resume_from_checkpoint=True)
    assert judged.left == []
    assert logged_values(resumed, START) == [1.0]


def test_a_checkpoint_before_the_first_log_line_holds_the_starting_share(tmp_path, tokenizer):
    judge = CountingJudge(3, 0, 0)
    settings = {"max_steps": 6, "save_strategy": "steps", "save_steps": 2, "logging_steps": 100}
    first = trainer_with_probe(tmp_path, tokenizer, settings, every=3, judge=judge)
    first.add_callback(Stop())
    first.train()
    second = trainer_with_probe(
        tmp_path, tokenizer, settings, every=3, on_fall="stop", margin=0.0, judge=judge
    )
    second.train(resume_from_checkpoint=True)
    assert second.state.global_step == 3  # the first probe after the checkpoint


def test_the_models_own_generation_settings_are_not_used(tmp_path, tokenizer):
    found = []
    for settings in ({}, {"num_beams": 3, "num_return_sequences": 3, "repetition_penalty": 5.0}):
        judged = CountingJudge(*[1] * 9)
        trainer = trainer_with_probe(tmp_path / str(len(settings)), tokenizer, judge=judged)
        trainer.model.generation_config.update(**settings)
        own = trainer.model.generation_config
        trainer.train()
        assert trainer.model.generation_config is own
        found.append(judged.answers)
    assert found[0] == found[1]
    assert sum(map(len, found[0][0])) > 0


def test_a_fall_by_exactly_the_margin_is_allowed(tmp_path, tokenizer, caplog):
    judge = CountingJudge(4, 3, 3)
    options = {"prompts": ["x"] * 5, "margin": 0.2, "on_fall": "stop"}
    trainer = trainer_with_probe(tmp_path, tokenizer, {"max_steps": 2}, **options, judge=judge)
    trainer.train()
    assert trainer.state.global_step == 2  # 0.8 - 0.2 > 0.6 in floating point


def test_a_guard_judges_the_answers_and_is_closed(tmp_path, tokenizer):
    guard = WordGuard(word="☃", safe=0.8)
    trainer = trainer_with_probe(tmp_path, tokenizer, {"max_steps": 1}, judge=guard)
    trainer.train()
    assert logged_values(trainer, SHARE) == [1.0]
    assert guard.closed == 2
    assert len(guard.asked) == 2 * len(PROMPTS)
    unsafe = WordGuard(word="", unsafe=0.1)
    trainer = trainer_with_probe(tmp_path, tokenizer, {"max_steps": 1}, judge=unsafe)
    trainer.train()
    assert logged_values(trainer, SHARE) == [0.0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"every": 0}, "every is 0"),
        ({"batch_size": True}, "batch_size is True"),
        ({"margin": 2}, "margin is 2"),
        ({"on_fall": "halt"}, "on_fall"),
        ({"prompts": []}, "prompts is empty"),
        ({"judge": "test-wordz"}, "Did you mean 'test-words'"),
    ],
)
def test_wrong_options_are_refused_at_once(tmp_path, tokenizer, options, message):
    trainer = tiny_trainer(tmp_path, tokenizer)
    with pytest.raises(ConfigError, match=message):
        SafetyProbe(trainer, **options)


def test_the_probe_needs_an_active_loss(tmp_path, tokenizer):
    trainer = tiny_trainer(tmp_path, tokenizer, loss_type="nll", guard=None)
    trainer.add_callback(SafetyProbe(trainer))
    with pytest.raises(StarDSSError, match="without a STAR-DSS loss"):
        trainer.train()


def test_the_default_prompts_are_the_first_eight_for_demonstrations(tmp_path, tokenizer):
    demonstrated = demo_prompts(HARMFUL, limit=8)
    assert len({prompt.messages[-1]["content"] for prompt in demonstrated}) == 8
    found = SafetyProbe(tiny_trainer(tmp_path, tokenizer)).prompts
    assert found == [list(prompt.messages) for prompt in demonstrated]
