"""Settings of TRL and of PEFT, several ranks, and model cards."""

import json
import os

import pytest
import torch
from support.paths import TESTS

pytest.importorskip("trl")

from peft import AdaLoraConfig, PromptTuningConfig
from star_dss_trl import StarDSSConfig, StarDSSTrainer
from support.forks import on_ranks
from support.guards import WordGuard
from support.models import tiny_mixtral
from support.run_differences import history
from support.trl_runs import arguments, lora_config, prompt_completion, tiny_trainer
from trl import SFTTrainer

from star_dss_plugin import ConfigError
from star_dss_plugin.data.columns import SCORES_COLUMN


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_nothing(tmp_path, tokenizer, reentrant):
    config = {"reference": "adapter", "kl_coef": 2.0, "peft_config": lora_config()}
    plain = tiny_trainer(tmp_path, tokenizer, **config)
    plain.train()
    saving = tiny_trainer(
        tmp_path,
        tokenizer,
        **config,
        gradient_checkpointing=True,
        gradient_checkpointing_kwargs={"use_reentrant": reentrant},
    )
    saving.train()
    torch.testing.assert_close(
        torch.tensor(history(plain)), torch.tensor(history(saving)), rtol=1e-5, atol=1e-6
    )


def test_a_guard_that_draws_random_numbers_does_not_change_dropout(
    tmp_path, tokenizer, monkeypatch
):
    """The second run finds the scores in the cache, and asks no guard."""
    score = WordGuard.token_scores

    def draw(self, responses):
        torch.rand(len(responses))
        return score(self, responses)

    monkeypatch.setattr(WordGuard, "token_scores", draw)
    runs = []
    for _ in range(2):
        torch.manual_seed(1)  # TRL makes the adapter before it sets the seed
        trainer = tiny_trainer(tmp_path, tokenizer, peft_config=lora_config(dropout=0.5))
        trainer.train()
        runs.append(history(trainer))
    assert runs[0] == runs[1]


def test_neftune_noise_is_not_part_of_the_reference(tmp_path, tokenizer):
    trainer = tiny_trainer(
        tmp_path,
        tokenizer,
        neftune_noise_alpha=5.0,
        reference="copy",
        kl_estimator="full",
        guard={"preset": "test-words", "safe": 0.0, "unsafe": 0.0},
    )
    trainer.train()
    assert trainer.state.log_history[0]["star_dss/kl"] > 1e-4  # the policy's own noise
    quiet = tiny_trainer(
        tmp_path,
        tokenizer,
        reference="copy",
        kl_estimator="full",
        guard={"preset": "test-words", "safe": 0.0, "unsafe": 0.0},
    )
    quiet.train()
    assert quiet.state.log_history[0]["star_dss/kl"] == pytest.approx(0, abs=1e-6)


def test_a_mixture_of_experts_keeps_its_auxiliary_loss(tmp_path, tokenizer):
    data = prompt_completion()
    ours = tiny_trainer(
        tmp_path,
        tokenizer,
        data,
        tiny_mixtral(len(tokenizer)),
        router_aux_loss_coef=0.1,
        guard={"preset": "test-words", "word": "☃", "safe": 1.0},
    )
    ours.train()
    stock = tiny_trainer(
        tmp_path,
        tokenizer,
        data,
        tiny_mixtral(len(tokenizer)),
        SFTTrainer,
        router_aux_loss_coef=0.1,
    )
    stock.train()
    torch.testing.assert_close(
        torch.tensor(history(ours)), torch.tensor(history(stock)), rtol=1e-6, atol=1e-6
    )
    assert "aux_loss" in ours.state.log_history[0]


SEARCHED = [str(TESTS)]
RANKS = """
import json, os, sys
sys.path[:0] = {path!r}
from support import guards, trl_runs
guards.register_guard()
from pathlib import Path
from transformers import AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained({model!r})
out = Path({out!r})
trainer = trl_runs.tiny_trainer(out, tokenizer, per_device_train_batch_size={batch},
                        gradient_accumulation_steps={steps}, max_steps=3)
from star_dss_plugin import SafetyProbe
trainer.add_callback(SafetyProbe(trainer, ["is this bad?", "how are you?", "who is lazy?"], every=1,
                                 judge={{"preset": "test-words", "word": "e"}}, max_new_tokens=4))
trainer.train()
if trainer.is_world_process_zero():
    Path(out, "history.json").write_text(json.dumps(
        [[h["loss"], h["grad_norm"], h["star_dss/mean_score"], h["star_dss/kl"],
          h["star_dss/kl_gradient_share"], h["star_dss/probe_safe_share"]]
         for h in trainer.state.log_history if "grad_norm" in h]))
trainer.accelerator.end_training()
"""


def run_ranks(count, program, out, model, steps):
    """Run a program of RANKS in processes of its own; return exit status and output."""
    script = out / "run.py"
    script.write_text(
        program.format(path=SEARCHED, model=model, out=str(out), batch=2, steps=steps)
    )
    settings = {"ACCELERATE_USE_CPU": "1", "STAR_DSS_CACHE": str(out / "cache")}
    return on_ranks(count, script, [], {**os.environ, **settings}, out / "log")


@pytest.mark.slow
def test_two_ranks_equal_one_process_with_twice_the_accumulation(tmp_path, model_dir):
    found = {}
    for ranks, steps in ((1, 2), (2, 1)):
        out = tmp_path / str(ranks)
        out.mkdir()
        done = run_ranks(ranks, RANKS, out, str(model_dir), steps)
        assert done.returncode == 0, done.stderr[-4000:]
        # Each process writes its scores and its reference values once, and reads those of all.
        folders = [f for f in (out / "cache").iterdir() if f.is_dir()]
        assert [len(list(folder.glob("*.shard"))) for folder in folders] == [ranks, ranks]
        found[ranks] = torch.tensor(json.loads((out / "history.json").read_text()))
    torch.testing.assert_close(found[1], found[2], rtol=1e-5, atol=2e-5)


@pytest.mark.slow
def test_an_error_on_one_rank_stops_all_ranks(tmp_path, model_dir):
    """Rank 1 fails while it scores its rows."""
    fault = "if os.environ['RANK'] == '1': guards.WordGuard.token_scores = None"
    broken = RANKS.replace("trainer = ", f"{fault}\ntrainer = ")
    done = run_ranks(2, broken, tmp_path, str(model_dir), 1)
    assert done.returncode != 0
    assert "'NoneType' object is not callable" in done.stderr
    assert not (tmp_path / "history.json").exists()


def test_scores_stay_with_their_rows_when_the_data_is_shuffled(tmp_path, tokenizer):
    trainer = StarDSSTrainer(
        tiny_trainer(tmp_path, tokenizer).model,
        args=arguments(tmp_path, StarDSSConfig, shuffle_dataset=True),
        train_dataset=prompt_completion(),
        processing_class=tokenizer,
    )
    for batch in trainer.get_train_dataloader():
        for ids, labels, scores in zip(
            batch["input_ids"], batch["labels"], batch[SCORES_COLUMN], strict=True
        ):
            text = tokenizer.decode(ids[labels != -100])
            assert (scores[labels != -100].min() < 0.5) == ("bad" in text)


def test_the_model_card_says_how_the_loss_was_shaped(tmp_path, tokenizer):
    trainer = tiny_trainer(
        tmp_path, tokenizer, save_strategy="steps", save_steps=1, save_total_limit=1
    )
    trainer.train()
    trainer.create_model_card()
    card = (tmp_path / "out" / "README.md").read_text()
    assert card.count("## STAR-DSS") == 1
    assert "`test-words" in card
    assert "λ = 0.5, estimator `k2`" in card
    record = json.loads((tmp_path / "out" / "star_dss.json").read_text())
    assert record["versions"]["trl"]
    assert record["data"]["train"]["provenance"]["guard_identity"]
    assert [p.name for p in (tmp_path / "out").glob("checkpoint-*")] == ["checkpoint-3"]


def test_the_model_card_describes_the_loss_type(tmp_path, tokenizer):
    trainer = tiny_trainer(tmp_path, tokenizer, loss_type="rejection", max_steps=1)
    trainer.train()
    trainer.create_model_card()
    card = (tmp_path / "out" / "README.md").read_text()
    assert "With `rejection`, responses whose last score is below τ were not learned" in card


def test_dora_has_the_same_reference_by_adapter_and_precomputed(tmp_path, tokenizer):
    found = []
    for reference in ("adapter", "precomputed"):
        lora = lora_config()
        lora.use_dora = True
        trainer = tiny_trainer(
            tmp_path, tokenizer, reference=reference, peft_config=lora, kl_coef=2.0
        )
        trainer.train()
        assert any("magnitude" in name for name, _ in trainer.model.named_parameters())
        found.append(history(trainer))
    torch.testing.assert_close(torch.tensor(found[0]), torch.tensor(found[1]), rtol=1e-4, atol=1e-5)


def test_unsupported_adapters_and_label_smoothing_are_refused(tmp_path, tokenizer):
    tuning = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    with pytest.raises(ConfigError, match="prompt-learning adapter"):
        tiny_trainer(tmp_path, tokenizer, peft_config=tuning)
    adaptive = AdaLoraConfig(
        task_type="CAUSAL_LM", init_r=4, target_r=2, total_step=3, target_modules=["q_proj"]
    )
    with pytest.raises(ConfigError, match="AdaLoRA, which adds a term of its own"):
        tiny_trainer(tmp_path, tokenizer, peft_config=adaptive)
    with pytest.raises(ConfigError, match="label_smoothing_factor is 0.1"):
        tiny_trainer(tmp_path, tokenizer, label_smoothing_factor=0.1)
