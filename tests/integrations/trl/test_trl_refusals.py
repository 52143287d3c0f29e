"""TRL: a run whose loss would not be that of STAR-DSS stops before the first step."""

import pytest
import torch

pytest.importorskip("trl")
from star_dss_trl import StarDSSTrainer
from support.models import tiny_llama
from support.scoring import unbound
from support.trl_runs import arguments, prompt_completion, tiny_trainer
from transformers import default_data_collator
from trl import SFTConfig, SFTTrainer

from star_dss_plugin import ConfigError, DataError, StarDSSError, attach
from star_dss_plugin.data.columns import SCORES_COLUMN
from star_dss_plugin.training.run_record import startup_line


def test_wrong_options_are_refused(tmp_path, tokenizer):
    with pytest.raises(ConfigError, match=r"(?s)No guard was given.*qwen3guard-gen-0.6b"):
        tiny_trainer(tmp_path, tokenizer, guard=None)
    with pytest.raises(
        ConfigError, match=r"Unknown guard 'qwen3guard-gen-0.6'.*qwen3guard-gen-0.6b"
    ):
        tiny_trainer(tmp_path, tokenizer, guard="qwen3guard-gen-0.6")
    with pytest.raises(ConfigError, match="Did you mean 'star_dss'"):
        tiny_trainer(tmp_path, tokenizer, loss_type="star-dss")
    with pytest.raises(ConfigError, match="Did you mean 'words'"):
        tiny_trainer(tmp_path, tokenizer, segmenter="word")
    with pytest.raises(ConfigError, match="reference is 'adapter', but the model"):
        tiny_trainer(tmp_path, tokenizer, reference="adapter")
    with pytest.raises(ConfigError, match="reference is 'none'"):
        tiny_trainer(tmp_path, tokenizer, reference="none")
    with pytest.raises(ConfigError, match="Did you mean 'adapter'"):
        tiny_trainer(tmp_path, tokenizer, reference="adaptor")
    with pytest.raises(ConfigError, match="chunk_size is 0"):
        tiny_trainer(tmp_path, tokenizer, chunk_size=0)
    with pytest.raises(ConfigError, match="StarDSSConfig"):
        StarDSSTrainer(
            tiny_llama(len(tokenizer)),
            args=arguments(tmp_path, SFTConfig),
            train_dataset=prompt_completion(),
            processing_class=tokenizer,
        )


@pytest.mark.parametrize(
    ("score", "loss_type", "said"),
    [
        (1.0, "star_dss", True),
        (1.0, "rejection", True),
        (0.999, "star_dss", False),
        (1.0, "kl_only", False),
    ],
)
def test_the_startup_line_says_if_scores_make_it_plain_finetuning(
    tmp_path, tokenizer, score, loss_type, said
):
    scored = tiny_trainer(tmp_path, tokenizer).train_dataset.remove_columns("ref_logps")
    safe = unbound(scored.map(lambda r: {SCORES_COLUMN: [score] * len(r[SCORES_COLUMN])}))
    trainer = tiny_trainer(tmp_path, tokenizer, safe, guard=None, loss_type=loss_type)
    assert ("this is plain finetuning" in startup_line(trainer.star_dss_state)) is said


def test_invalid_star_scores_are_refused(tmp_path, tokenizer):
    scored = tiny_trainer(tmp_path, tokenizer).train_dataset.remove_columns("ref_logps")
    short = scored.map(lambda r: {SCORES_COLUMN: r[SCORES_COLUMN][:-1]})
    with pytest.raises(DataError, match="The train data set: Row 0: the row has .* star_scores"):
        tiny_trainer(tmp_path, tokenizer, short, guard=None)
    wild = unbound(scored.map(lambda r: {SCORES_COLUMN: [1.5] * len(r[SCORES_COLUMN])}))
    with pytest.raises(DataError, match=r"star_score of 1.5"):
        tiny_trainer(tmp_path, tokenizer, wild, guard=None)


class Overridden(SFTTrainer):
    def compute_loss(self, *args, **kwargs):
        loss = super().compute_loss(*args, **kwargs)
        return (loss[0] * 2, loss[1]) if isinstance(loss, tuple) else loss * 2


def test_a_trainer_with_a_loss_of_its_own_is_refused(tmp_path, tokenizer):
    trainer = attach(tiny_trainer(tmp_path, tokenizer, cls=Overridden), guard="test-words")
    with pytest.raises(StarDSSError, match="has a loss of its own"):
        trainer.train()
    assert trainer.state.global_step == 0


def test_a_loss_that_is_replaced_after_setup_is_refused(tmp_path, tokenizer):
    trainer = tiny_trainer(tmp_path, tokenizer)
    trainer.compute_loss = lambda model, inputs, **_: SFTTrainer.compute_loss(
        trainer, model, {k: v for k, v in inputs.items() if k not in (SCORES_COLUMN, "ref_logps")}
    )
    with pytest.raises(StarDSSError, match="Something replaces compute_loss"):
        trainer.train()
    assert trainer.state.global_step == 0


def test_a_collator_that_is_replaced_after_setup_is_refused(tmp_path, tokenizer):
    trainer = tiny_trainer(tmp_path, tokenizer)
    trainer.data_collator = trainer.data_collator.inner
    with pytest.raises(StarDSSError, match="batches have no 'star_scores'"):
        trainer.train()


def test_a_collator_that_makes_no_batch_of_scored_rows_is_refused(tmp_path, tokenizer):
    trainer = tiny_trainer(tmp_path, tokenizer)
    trainer.args.remove_unused_columns = False
    trainer.data_collator = default_data_collator
    with pytest.raises(StarDSSError, match="was replaced after STAR-DSS was set up") as error:
        trainer.train()
    assert "its data collator makes no batch of a row that was prepared (" in str(error.value)
    assert trainer.state.global_step == 0


@pytest.mark.parametrize(
    ("made", "name", "value"),
    [
        ({"loss_type": "sft", "guard": None}, "loss_type", "star_dss"),
        ({"loss_type": "nll", "guard": None}, "loss_type", "star_dss"),
        ({}, "kl_coef", 9.0),
    ],
    ids=["sft", "nll", "kl_coef"],
)
def test_options_that_are_changed_later_are_refused(tmp_path, tokenizer, made, name, value):
    trainer = tiny_trainer(tmp_path, tokenizer, **made)
    setattr(trainer.args, name, value)
    with pytest.raises(ConfigError, match=f"changed since it was made: {name} to {value!r}"):
        trainer.train()
    assert trainer.state.global_step == 0


class OwnStep(SFTTrainer):
    """A trainer whose training step does not call compute_loss."""

    def training_step(self, model, inputs, num_items_in_batch=None):
        model.train()
        inputs = self._prepare_inputs(inputs)
        names = ("input_ids", "attention_mask", "labels")
        loss = model(**{name: inputs[name] for name in names}).loss
        self.accelerator.backward(loss)
        return loss.detach()


def test_a_training_step_that_does_not_call_compute_loss_is_stopped(tmp_path, tokenizer):
    trainer = attach(tiny_trainer(tmp_path, tokenizer, cls=OwnStep), guard="test-words")
    before = [p.clone() for p in trainer.model.parameters()]
    with pytest.raises(
        StarDSSError, match="called the compute_loss that was checked for 0 of 1 micro-batches"
    ):
        trainer.train()
    for a, b in zip(before, trainer.model.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("mode", ["star_dss", "hard", "static", "rejection", "kl_only"])
def test_plain_cross_entropy_in_place_of_the_loss_is_refused(tmp_path, tokenizer, mode):
    data = prompt_completion()
    for cut in (0, 2):  # the check's made-up scores must not give plain finetuning by chance
        trainer = tiny_trainer(tmp_path, tokenizer, data.select([cut]), loss_type=mode)
        trainer.compute_loss = lambda model, inputs, trainer=trainer, **_: trainer.base_loss(
            model, inputs
        )
        with pytest.raises(StarDSSError, match="Something replaces compute_loss"):
            trainer.train()


def test_a_guard_with_a_loss_type_of_trl_is_an_error(tmp_path):
    with pytest.raises(ConfigError, match="nothing is shaped, but a guard is set"):
        arguments(tmp_path, loss_type="nll")
