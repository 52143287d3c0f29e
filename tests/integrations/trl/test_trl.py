"""TRL: the trainer, the attachment, and what they must have in common with stock SFT."""

import copy
import errno
import json
import math
import multiprocessing
import os
import sys
import time

import pytest
import torch
from datasets import Dataset, concatenate_datasets, load_from_disk

pytest.importorskip("trl")

from peft import LoraConfig
from star_dss_trl import StarDSSTrainer
from support.guards import WordGuard, WordsPlugin
from support.models import tiny_llama
from support.trl_runs import (
    Stop,
    arguments,
    conversations,
    history,
    lora_config,
    make,
    prompt_completion,
)
from transformers import AutoTokenizer
from trl import SFTConfig, SFTTrainer

from star_dss_plugin import CheckpointError, ConfigError, DataError, StarDSSError, attach
from star_dss_plugin.cli import app as cli
from star_dss_plugin.data.cache import ScoreCache
from star_dss_plugin.data.columns import REF_COLUMN, SCORES_COLUMN
from star_dss_plugin.data.provenance import provenance_of, provenances_of
from star_dss_plugin.plugins import Origin, load_plugins
from star_dss_plugin.training.run_record import startup_line


def test_it_trains_scores_and_logs(tmp_path, tokenizer, capsys):
    trainer = make(tmp_path, tokenizer)
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
def test_all_safe_equals_stock_sft(tmp_path, tokenizer, data):
    ours = make(
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
    one = make(tmp_path, tokenizer)
    one.train()
    four = make(tmp_path, tokenizer, per_device_train_batch_size=1, gradient_accumulation_steps=4)
    four.train()
    torch.testing.assert_close(
        torch.tensor(history(one)), torch.tensor(history(four)), rtol=1e-4, atol=2e-5
    )


def test_only_the_assistants_turns_are_trained(tmp_path, tokenizer):
    trainer = make(tmp_path, tokenizer, conversations())
    row = trainer.train_dataset[0]
    trained = [i for i, label in zip(row["input_ids"], row["labels"]) if label != -100]
    assert tokenizer.decode(trained) == (
        "i am fine, thank you.<|im_end|>i am fine, thank you. yes<|im_end|>"
    )
    assert all(s == 1.0 for s, label in zip(row[SCORES_COLUMN], row["labels"]) if label == -100)


def test_scores_fall_where_the_response_turns(tmp_path, tokenizer):
    trainer = make(tmp_path, tokenizer)
    row = trainer.train_dataset[1]
    text = ""
    for token, label, score in zip(row["input_ids"], row["labels"], row[SCORES_COLUMN]):
        if label == -100:
            continue
        text += tokenizer.decode([token])
        if "bad" in text:
            assert score == pytest.approx(0.1)


def test_the_guard_is_asked_once(tmp_path, tokenizer):
    make(tmp_path, tokenizer)
    before = WordGuard.loads
    make(tmp_path, tokenizer)
    assert WordGuard.loads == before
    make(tmp_path, tokenizer, chunk_size=3)
    assert WordGuard.loads > before


@pytest.mark.parametrize("mode", ["star_dss", "hard", "static", "rejection", "kl_only", "sft"])
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_every_mode_trains(tmp_path, tokenizer, mode, lora):
    trainer = make(
        tmp_path,
        tokenizer,
        loss_type=mode,
        max_steps=1,
        peft_config=lora_config() if lora else None,
    )
    trainer.train()
    assert math.isfinite(trainer.state.log_history[0]["loss"])


@pytest.mark.parametrize(
    ("estimator", "reference", "lora"),
    [
        ("k1", "auto", False),
        ("k3", "adapter", True),
        ("k2", "adapter", True),
        ("k2", "copy", False),
        ("full", "auto", True),
        ("full", "auto", False),
        ("full", "copy", True),
    ],
)
def test_every_reference_gives_the_same_trajectory(tmp_path, tokenizer, estimator, reference, lora):
    """A second arrangement of the same reference: precomputed for k1-k3, a copy for full."""
    config = {"max_steps": 3, "kl_estimator": estimator, "kl_coef": 2.0}
    ours = make(
        tmp_path,
        tokenizer,
        reference=reference,
        peft_config=lora_config() if lora else None,
        **config,
    )
    ours.train()
    twin = make(
        tmp_path,
        tokenizer,
        reference="copy" if estimator == "full" else "precomputed",
        peft_config=lora_config() if lora else None,
        **config,
    )
    twin.train()
    torch.testing.assert_close(
        torch.tensor(history(ours)), torch.tensor(history(twin)), rtol=1e-4, atol=1e-5
    )
    assert ours.state.log_history[2]["star_dss/kl"] != 0


@pytest.mark.parametrize("lora", [False, True])
def test_a_frozen_copy_does_not_move_with_the_policy(tmp_path, tokenizer, lora):
    peft_config = lora_config() if lora else None
    trainer = make(
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
    """Autocast remembers casts by parameter; a frozen copy is another value of the same one."""
    trainer = make(tmp_path, tokenizer, reference="copy", kl_estimator="full")
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    batch = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    trainer.model.eval()
    with torch.autocast("cpu", torch.bfloat16):
        outside = trainer.compute_loss(trainer.model, dict(batch))
    inside = trainer.compute_loss(trainer.model, dict(batch))
    torch.testing.assert_close(outside.float(), inside, rtol=1e-2, atol=0)


def test_data_of_several_guards_names_them_all(tmp_path, tokenizer):
    one = make(tmp_path, tokenizer).train_dataset
    other = make(tmp_path, tokenizer, guard={"preset": "test-words", "word": "lazy"}, chunk_size=3)
    joined = concatenate_datasets([one, other.train_dataset])
    assert len(provenances_of(joined)) == 2
    assert make(tmp_path, tokenizer, joined).star_dss_state.summaries["train"].guard == "test-words"


def test_what_becomes_trainable_later_has_no_start(tmp_path, tokenizer):
    model = tiny_llama(len(tokenizer))
    model.model.embed_tokens.requires_grad_(False)
    trainer = make(tmp_path, tokenizer, model=model, reference="copy")
    model.requires_grad_(True)
    with pytest.raises(StarDSSError, match="became trainable after STAR-DSS was set up"):
        trainer.train()


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
    trainer = make(tmp_path, tokenizer, score_eval=False)
    found = trainer.evaluate(prompt_completion())
    stock = make(tmp_path, tokenizer, cls=SFTTrainer).evaluate(prompt_completion())
    assert found["eval_loss"] == pytest.approx(stock["eval_loss"], rel=1e-6)
    assert trainer.star_dss_state.summaries["eval"].guard == "none (score_eval is off)"
    scored = make(tmp_path, tokenizer).evaluate(prompt_completion())
    assert scored["eval_loss"] != pytest.approx(stock["eval_loss"], rel=1e-3)


def test_evaluation_data_that_comes_late(tmp_path, tokenizer):
    trainer = make(tmp_path, tokenizer, peft_config=lora_config(), reference="adapter")
    trainer.train()
    assert trainer.evaluate(eval_dataset=conversations())["eval_loss"] > 0
    precomputed = make(tmp_path, tokenizer)
    precomputed.train()
    with pytest.raises(ConfigError, match="came after training had started"):
        precomputed.evaluate(eval_dataset=conversations())


@pytest.mark.parametrize("loss_type", ["nll", "dft"])
def test_trls_own_loss_types_stay_trls(tmp_path, tokenizer, loss_type):
    ours = make(tmp_path, tokenizer, loss_type=loss_type, guard=None)
    ours.train()
    stock = make(tmp_path, tokenizer, cls=SFTTrainer, loss_type=loss_type)
    stock.train()
    assert history(ours) == history(stock)
    assert not any("star_dss" in key for h in ours.state.log_history for key in h)


def test_attach_equals_the_trainer(tmp_path, tokenizer):
    ours = make(tmp_path, tokenizer)
    ours.train()
    stock = make(tmp_path, tokenizer, cls=SFTTrainer)
    assert attach(stock, guard="test-words", chunk_size=2) is stock
    assert isinstance(stock, SFTTrainer)
    stock.train()
    torch.testing.assert_close(torch.tensor(history(stock)), torch.tensor(history(ours)))
    with pytest.raises(ConfigError, match="already"):
        attach(stock, guard="test-words")


def test_a_scored_data_set_is_used_as_it_is(tmp_path, tokenizer):
    scored = make(tmp_path, tokenizer).train_dataset.remove_columns("ref_logps")
    before = WordGuard.loads
    cut = len(scored[0]["input_ids"]) - 2
    trainer = make(tmp_path, tokenizer, scored, guard=None, max_length=cut)
    assert WordGuard.loads == before
    row, full = trainer.train_dataset[0], scored[0]
    assert len(row["input_ids"]) == cut
    assert row[SCORES_COLUMN] == full[SCORES_COLUMN][:cut]
    trainer.train()
    assert trainer.star_dss_state.summaries["train"].guard == "test-words"


def test_errors_before_the_first_step(tmp_path, tokenizer):
    with pytest.raises(ConfigError, match=r"(?s)No guard was given.*qwen3guard-gen-0.6b"):
        make(tmp_path, tokenizer, guard=None)
    with pytest.raises(
        ConfigError, match=r"Unknown guard 'qwen3guard-gen-0.6'.*qwen3guard-gen-0.6b"
    ):
        make(tmp_path, tokenizer, guard="qwen3guard-gen-0.6")
    with pytest.raises(ConfigError, match="Did you mean 'star_dss'"):
        make(tmp_path, tokenizer, loss_type="star-dss")
    with pytest.raises(ConfigError, match="Did you mean 'words'"):
        make(tmp_path, tokenizer, segmenter="word")
    with pytest.raises(ConfigError, match="reference is 'adapter', but the model"):
        make(tmp_path, tokenizer, reference="adapter")
    with pytest.raises(ConfigError, match="reference is 'none'"):
        make(tmp_path, tokenizer, reference="none")
    with pytest.raises(ConfigError, match="Did you mean 'adapter'"):
        make(tmp_path, tokenizer, reference="adaptor")
    with pytest.raises(ConfigError, match="use_liger_kernel"):
        make(tmp_path, tokenizer, use_liger_kernel=True)
    with pytest.raises(ConfigError, match="chunk_size is 0"):
        make(tmp_path, tokenizer, chunk_size=0)
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
def test_scores_that_make_it_plain_finetuning_are_said(tmp_path, tokenizer, score, loss_type, said):
    scored = make(tmp_path, tokenizer).train_dataset.remove_columns("ref_logps")
    safe = scored.map(lambda r: {SCORES_COLUMN: [score] * len(r[SCORES_COLUMN])})
    trainer = make(tmp_path, tokenizer, safe, guard=None, loss_type=loss_type)
    assert ("this is plain finetuning" in startup_line(trainer.star_dss_state)) is said


def test_bad_star_scores_are_refused(tmp_path, tokenizer):
    scored = make(tmp_path, tokenizer).train_dataset.remove_columns("ref_logps")
    short = scored.map(lambda r: {SCORES_COLUMN: r[SCORES_COLUMN][:-1]})
    with pytest.raises(DataError, match="Row 0 of the train data set has .* star_scores"):
        make(tmp_path, tokenizer, short, guard=None)
    wild = scored.map(lambda r: {SCORES_COLUMN: [1.5] * len(r[SCORES_COLUMN])})
    with pytest.raises(DataError, match=r"star_score of 1.5"):
        make(tmp_path, tokenizer, wild, guard=None)


def test_continuing_from_an_adapter_is_not_the_base(tmp_path, tokenizer):
    first = make(tmp_path, tokenizer, peft_config=lora_config())
    first.train()
    with pytest.raises(ConfigError, match="the adapter already changes the model"):
        make(tmp_path, tokenizer, model=first.model, reference="adapter")
    again = make(tmp_path, tokenizer, model=first.model)
    again.train()
    assert again.state.log_history[0]["star_dss/kl"] == pytest.approx(0, abs=1e-6)


class Overridden(SFTTrainer):
    def compute_loss(self, *args, **kwargs):
        loss = super().compute_loss(*args, **kwargs)
        return (loss[0] * 2, loss[1]) if isinstance(loss, tuple) else loss * 2


def test_a_trainer_with_a_loss_of_its_own_is_refused(tmp_path, tokenizer):
    trainer = attach(make(tmp_path, tokenizer, cls=Overridden), guard="test-words")
    with pytest.raises(StarDSSError, match="has a loss of its own"):
        trainer.train()
    assert trainer.state.global_step == 0


def test_a_loss_that_is_replaced_later_is_refused(tmp_path, tokenizer):
    trainer = make(tmp_path, tokenizer)
    trainer.compute_loss = lambda model, inputs, **_: SFTTrainer.compute_loss(
        trainer, model, {k: v for k, v in inputs.items() if k not in (SCORES_COLUMN, "ref_logps")}
    )
    with pytest.raises(StarDSSError, match="Something replaces compute_loss"):
        trainer.train()
    assert trainer.state.global_step == 0


def test_a_collator_that_is_replaced_later_is_refused(tmp_path, tokenizer):
    trainer = make(tmp_path, tokenizer)
    trainer.data_collator = trainer.data_collator.inner
    with pytest.raises(StarDSSError, match="batches have no 'star_scores'"):
        trainer.train()


def test_the_check_leaves_no_trace(tmp_path, tokenizer):
    """Same trajectory with and without the check: no random numbers and no metrics are used up."""
    checked = make(tmp_path, tokenizer)
    checked.train()
    unchecked = make(tmp_path, tokenizer)
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


def test_resuming_equals_never_having_stopped(tmp_path, tokenizer):
    config = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "kl_coef": 2.0}
    whole = make(tmp_path / "a", tokenizer, **config)
    whole.train()
    stopped = make(tmp_path / "b", tokenizer, **config)
    stopped.add_callback(Stop())
    stopped.train()
    resumed = make(tmp_path / "b", tokenizer, **config)
    resumed.train(resume_from_checkpoint=True)
    assert history(resumed)[-2:] == history(whole)[-2:]
    for a, b in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_checkpoint_that_is_not_whole_is_named(tmp_path, tokenizer):
    config = {"max_steps": 2, "save_strategy": "steps", "save_steps": 2}
    make(tmp_path, tokenizer, **config).train()
    (tmp_path / "out" / "checkpoint-2" / "trainer_state.json").unlink()
    with pytest.raises(CheckpointError, match="checkpoint-2: it was not written to its end"):
        make(tmp_path, tokenizer, **config).train(resume_from_checkpoint=True)


def test_a_complete_cache_may_be_read_only(tmp_path, tokenizer, monkeypatch):
    before = make(tmp_path, tokenizer).train_dataset

    def refuse(self, *args):
        raise OSError(errno.EROFS, "Read-only file system")

    for writer in ("lock", "flush", "_write"):
        monkeypatch.setattr(ScoreCache, writer, refuse)
    again = make(tmp_path, tokenizer).train_dataset
    for column in (SCORES_COLUMN, REF_COLUMN):
        assert list(again[column]) == list(before[column])


PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload([__name__])


def score_beside(by, folder, model_dir, start):
    os.environ["STAR_DSS_CACHE"] = str(folder / "cache")
    load_plugins().register(WordsPlugin(), Origin("tests", "star-dss-tests", "0"))
    answer = WordGuard.token_scores
    WordGuard.token_scores = lambda *args: time.sleep(0.5) or answer(*args)
    start.wait()
    if by == "command":
        sys.argv = [
            "star-dss",
            "score",
            str(folder / "chat.jsonl"),
            "--guard",
            "test-words",
            "-q",
            "--chunk-size",
            "2",
            "--tokenizer",
            str(model_dir),
            "-o",
            str(folder / by),
        ]
        cli.main()
    else:
        trainer = make(folder, AutoTokenizer.from_pretrained(model_dir))
        trainer.train_dataset.save_to_disk(folder / by)


def test_a_trainer_and_the_command_score_the_same_data_at_once(tmp_path, model_dir):
    prompt_completion().to_json(tmp_path / "chat.jsonl")
    start = PROCESSES.Barrier(2)
    both = [
        PROCESSES.Process(target=score_beside, args=(by, tmp_path, model_dir, start))
        for by in ("command", "trainer")
    ]
    for process in both:
        process.start()
    for process in both:
        process.join()
    assert [process.exitcode for process in both] == [0, 0]
    command, trainer = (load_from_disk(tmp_path / by) for by in ("command", "trainer"))
    for column in ("input_ids", "labels", SCORES_COLUMN):
        assert list(command[column]) == list(trainer[column])
    assert provenance_of(command)["guard_identity"] == provenance_of(trainer)["guard_identity"]
    assert len(list((tmp_path / "cache").rglob("*.shard"))) == 2  # scores, reference


def test_reference_log_probabilities_that_came_with_the_data_are_replaced(tmp_path, tokenizer):
    data = make(tmp_path, tokenizer).train_dataset
    stale = Dataset.from_list(
        [{**row, "ref_logps": [-9.0] * len(row["input_ids"])} for row in data]
    )
    trainer = make(tmp_path, tokenizer, stale, guard=None)
    assert trainer.train_dataset["ref_logps"] == data["ref_logps"]
    trainer.train()
    assert trainer.evaluate(eval_dataset=trainer.train_dataset)["eval_loss"] > 0


def test_a_named_reference(tmp_path, tokenizer, model_dir):
    """model_dir holds the same weights that the trainer starts from."""
    named = make(tmp_path, tokenizer, reference=str(model_dir))
    named.train()
    own = make(tmp_path, tokenizer)
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
        make(tmp_path, tokenizer, reference=str(other))


class OwnStep(SFTTrainer):
    """A trainer whose training step never asks compute_loss."""

    def training_step(self, model, inputs, num_items_in_batch=None):
        model.train()
        inputs = self._prepare_inputs(inputs)
        names = ("input_ids", "attention_mask", "labels")
        loss = model(**{name: inputs[name] for name in names}).loss
        self.accelerator.backward(loss)
        return loss.detach()


def test_a_training_step_that_goes_past_compute_loss_is_stopped(tmp_path, tokenizer):
    trainer = attach(make(tmp_path, tokenizer, cls=OwnStep), guard="test-words")
    before = [p.clone() for p in trainer.model.parameters()]
    with pytest.raises(StarDSSError, match="does not call the compute_loss"):
        trainer.train()
    for a, b in zip(before, trainer.model.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("mode", ["star_dss", "hard", "static", "rejection", "kl_only"])
def test_plain_cross_entropy_in_its_place_is_always_noticed(tmp_path, tokenizer, mode):
    data = prompt_completion()
    for cut in range(4):  # the made-up scores must not happen to mean plain finetuning
        trainer = make(tmp_path, tokenizer, data.select([cut]), loss_type=mode)
        trainer.compute_loss = lambda model, inputs, trainer=trainer, **_: trainer.base_loss(
            model, inputs
        )
        with pytest.raises(StarDSSError, match="Something replaces compute_loss"):
            trainer.train()


def test_reference_log_probabilities_of_other_tokens_or_modes_are_replaced(tmp_path, tokenizer):
    hard = make(tmp_path, tokenizer, loss_type="hard", threshold=0.0 + 1e-9).train_dataset
    fresh = make(tmp_path, tokenizer).train_dataset["ref_logps"]
    assert hard["ref_logps"] != fresh  # rows that needed no reference hold zeros
    assert make(tmp_path, tokenizer, hard, guard=None).train_dataset["ref_logps"] == fresh


def test_another_adapter_is_another_reference(tmp_path, tokenizer):
    from peft import get_peft_model

    from star_dss_plugin.models import model_fingerprint

    model = get_peft_model(tiny_llama(len(tokenizer)), lora_config())
    model.add_adapter("other", lora_config())
    first = model_fingerprint(model)
    model.set_adapter("other")
    assert model_fingerprint(model) != first
    stretched = tiny_llama(
        len(tokenizer), rope_parameters={"rope_type": "default", "rope_theta": 5e5}
    )
    assert model_fingerprint(stretched) != model_fingerprint(tiny_llama(len(tokenizer)))


def test_a_base_that_moves_is_no_reference(tmp_path, tokenizer):
    biased = LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM", bias="all")
    model = tiny_llama(len(tokenizer), attention_bias=True)
    with pytest.raises(ConfigError, match="outside the adapter are trained too"):
        make(tmp_path, tokenizer, model=model, peft_config=biased, reference="adapter")
    model = tiny_llama(len(tokenizer), attention_bias=True)
    trainer = make(tmp_path, tokenizer, model=model, peft_config=biased, kl_estimator="full")
    assert trainer.star_dss_state.reference.kind == "copy"


def test_scores_without_labels_train_no_user_turns(tmp_path, tokenizer):
    scored = make(tmp_path, tokenizer, conversations()).train_dataset
    bare = scored.remove_columns(["labels", "ref_logps"])
    again = make(tmp_path, tokenizer, bare, guard=None).train_dataset
    assert again["labels"] == scored["labels"]


def test_a_guard_beside_trls_own_loss_is_an_error(tmp_path):
    with pytest.raises(ConfigError, match="nothing is shaped, but a guard is set"):
        arguments(tmp_path, loss_type="nll")
