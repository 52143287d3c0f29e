"""TRL: every loss type, and every kind of reference."""

import copy
import math

import pytest
import torch
from datasets import Dataset

pytest.importorskip("trl")
from peft import LoraConfig
from support.models import tiny_llama
from support.run_differences import history
from support.trl_runs import conversations, lora_config, tiny_trainer

from star_dss_plugin import ConfigError, StarDSSError


@pytest.mark.parametrize("mode", ["star_dss", "hard", "static", "rejection", "kl_only", "sft"])
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_every_loss_type_trains(tmp_path, tokenizer, mode, lora):
    trainer = tiny_trainer(
        tmp_path,
        tokenizer,
        loss_type=mode,
        max_steps=1,
        peft_config=lora_config() if lora else None,
    )
    trainer.train()
    assert math.isfinite(trainer.state.log_history[0]["loss"])


@pytest.mark.parametrize(
    ("estimator", "lora", "references"),
    [
        ("k2", True, ("adapter", "precomputed", "copy")),
        ("k3", True, ("adapter", "precomputed")),
        ("k1", False, ("precomputed", "copy")),
        ("k2", False, ("precomputed", "copy")),
        ("full", True, ("adapter", "copy")),
    ],
)
def test_every_reference_gives_the_same_trajectory(
    tmp_path, tokenizer, estimator, lora, references
):
    runs = []
    for reference in references:
        trainer = tiny_trainer(
            tmp_path,
            tokenizer,
            reference=reference,
            peft_config=lora_config() if lora else None,
            max_steps=3,
            kl_estimator=estimator,
            kl_coef=2.0,
        )
        assert trainer.star_dss_state.reference.kind == reference
        trainer.train()
        runs.append(trainer)
    for other in runs[1:]:
        torch.testing.assert_close(
            torch.tensor(history(runs[0])), torch.tensor(history(other)), rtol=1e-4, atol=1e-5
        )
    assert runs[0].state.log_history[2]["star_dss/kl"] != 0


@pytest.mark.parametrize(
    ("estimator", "lora", "kind"),
    [("k1", False, "precomputed"), ("full", False, "copy"), ("full", True, "adapter")],
)
def test_auto_chooses_the_reference_by_estimator_and_adapter(
    tmp_path, tokenizer, estimator, lora, kind
):
    trainer = tiny_trainer(
        tmp_path,
        tokenizer,
        reference="auto",
        kl_estimator=estimator,
        peft_config=lora_config() if lora else None,
    )
    assert trainer.star_dss_state.reference.kind == kind


@pytest.mark.parametrize("lora", [False, True])
def test_a_frozen_copy_does_not_move_with_the_policy(tmp_path, tokenizer, lora):
    peft_config = lora_config() if lora else None
    trainer = tiny_trainer(
        tmp_path, tokenizer, reference="copy", kl_estimator="full", peft_config=peft_config
    )
    reference, batch = trainer.star_dss_state.reference, {"input_ids": torch.tensor([[5, 6, 7]])}
    assert sum(v.numel() for v in reference.starting.values()) == sum(
        p.numel() for p in trainer.model.parameters() if p.requires_grad
    )

    def logits():
        return reference.run(trainer.model, batch, lambda rows, project: project(rows))

    before = logits()
    policy = trainer.model(**batch).logits.detach()
    torch.testing.assert_close(before, policy)
    trainer.train()
    assert torch.equal(before, logits())
    assert not torch.allclose(policy, trainer.model(**batch).logits)


def test_an_outer_autocast_does_not_keep_the_references_weights(tmp_path, tokenizer):
    """Autocast caches casts by parameter; a frozen copy is another value of the same parameter."""
    trainer = tiny_trainer(tmp_path, tokenizer, reference="copy", kl_estimator="full")
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    batch = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    trainer.model.eval()
    with torch.autocast("cpu", torch.bfloat16):
        outside = trainer.compute_loss(trainer.model, dict(batch))
    inside = trainer.compute_loss(trainer.model, dict(batch))
    torch.testing.assert_close(outside.float(), inside, rtol=1e-2, atol=0)


def test_a_parameter_that_becomes_trainable_after_setup_is_refused(tmp_path, tokenizer):
    model = tiny_llama(len(tokenizer))
    model.model.embed_tokens.requires_grad_(False)
    trainer = tiny_trainer(tmp_path, tokenizer, model=model, reference="copy")
    model.requires_grad_(True)
    with pytest.raises(StarDSSError, match="became trainable after STAR-DSS was set up"):
        trainer.train()


def test_a_frozen_copy_is_refused_for_another_model(tmp_path, tokenizer):
    trainer = tiny_trainer(tmp_path, tokenizer, reference="copy")
    other = tiny_llama(len(tokenizer), num_hidden_layers=1)
    reference = trainer.star_dss_state.reference
    with (
        pytest.raises(StarDSSError, match=r"another one .* lacks model\.layers\.1"),
        reference.active(other),
    ):
        pass


def test_a_trained_adapter_is_not_switched_off_for_the_reference(tmp_path, tokenizer):
    first = tiny_trainer(tmp_path, tokenizer, peft_config=lora_config())
    first.train()
    with pytest.raises(ConfigError, match="the adapter already changes the model"):
        tiny_trainer(tmp_path, tokenizer, model=first.model, reference="adapter")
    again = tiny_trainer(tmp_path, tokenizer, model=first.model)
    again.train()
    assert again.state.log_history[0]["star_dss/kl"] == pytest.approx(0, abs=1e-6)


def test_reference_log_probabilities_that_came_with_the_data_are_replaced(tmp_path, tokenizer):
    data = tiny_trainer(tmp_path, tokenizer).train_dataset
    stale = Dataset.from_list(
        [{**row, "ref_logps": [-9.0] * len(row["input_ids"])} for row in data]
    )
    trainer = tiny_trainer(tmp_path, tokenizer, stale, guard=None)
    assert trainer.train_dataset["ref_logps"] == data["ref_logps"]
    trainer.train()
    assert trainer.evaluate(eval_dataset=trainer.train_dataset)["eval_loss"] > 0


def test_a_named_reference_gives_the_run_of_the_own_start(tmp_path, tokenizer, model_dir):
    """model_dir holds the same weights that the trainer starts from."""
    named = tiny_trainer(tmp_path, tokenizer, reference=str(model_dir))
    named.train()
    own = tiny_trainer(tmp_path, tokenizer)
    own.train()
    assert history(named) == history(own)
    with pytest.raises(ConfigError, match="or a named one"):
        named.evaluate(eval_dataset=conversations())


def test_a_named_reference_with_another_tokenizer_is_refused(tmp_path, tokenizer, model_dir):
    other = tmp_path / "other"
    tiny_llama(len(tokenizer) + 1).save_pretrained(other)
    changed = copy.deepcopy(tokenizer)
    changed.add_tokens(["<extra>"])
    changed.save_pretrained(other)
    with pytest.raises(ConfigError, match="another tokenizer"):
        tiny_trainer(tmp_path, tokenizer, reference=str(other))


def test_reference_log_probabilities_of_other_tokens_or_modes_are_replaced(tmp_path, tokenizer):
    hard = tiny_trainer(tmp_path, tokenizer, loss_type="hard", threshold=0.0 + 1e-9).train_dataset
    fresh = tiny_trainer(tmp_path, tokenizer).train_dataset["ref_logps"]
    assert hard["ref_logps"] != fresh  # rows that needed no reference hold zeros
    assert tiny_trainer(tmp_path, tokenizer, hard, guard=None).train_dataset["ref_logps"] == fresh


def test_another_adapter_is_another_reference(tmp_path, tokenizer):
    from peft import get_peft_model

    from star_dss_plugin.models.fingerprints import model_fingerprint

    model = get_peft_model(tiny_llama(len(tokenizer)), lora_config())
    model.add_adapter("other", lora_config())
    first = model_fingerprint(model)
    model.set_adapter("other")
    assert model_fingerprint(model) != first
    stretched = tiny_llama(
        len(tokenizer), rope_parameters={"rope_type": "default", "rope_theta": 5e5}
    )
    assert model_fingerprint(stretched) != model_fingerprint(tiny_llama(len(tokenizer)))


def test_a_base_model_that_trains_too_is_no_reference(tmp_path, tokenizer):
    biased = LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM", bias="all")
    model = tiny_llama(len(tokenizer), attention_bias=True)
    with pytest.raises(ConfigError, match="outside the adapter are trained too"):
        tiny_trainer(tmp_path, tokenizer, model=model, peft_config=biased, reference="adapter")
    model = tiny_llama(len(tokenizer), attention_bias=True)
    trainer = tiny_trainer(
        tmp_path, tokenizer, model=model, peft_config=biased, kl_estimator="full"
    )
    assert trainer.star_dss_state.reference.kind == "copy"
