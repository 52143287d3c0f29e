"""Axolotl's trainer with the STAR-DSS loss, compared with stock Axolotl and with TRL."""

import json

import pytest

pytest.importorskip("axolotl", reason="needs Axolotl: make test-axolotl")

import axolotl.utils.schemas.config
import torch
from axolotl_runs import (
    LORA,
    _light_runs,  # noqa: F401
    chat,
    configuration,
    multi_turn,
    trained,
    trainer_of,
    write_rows,
)
from datasets import Dataset
from star_dss_axolotl.trainer import StarDSSAxolotlTrainer
from star_dss_trl import StarDSSConfig, StarDSSTrainer
from support.guards import WordGuard
from support.models import tiny_llama
from support.run_differences import history
from transformers import AutoModelForCausalLM, AutoTokenizer

from star_dss_plugin import CheckpointError, DataError, load_scored, star_dss_loss
from star_dss_plugin.data.columns import SCORES_COLUMN
from star_dss_plugin.data.writing import write_dataset
from star_dss_plugin.scoring import jobs, shards
from star_dss_plugin.training.rows.collation import TokenColumnsCollator

SAFE = {"preset": "test-words", "word": "☃", "safe": 1.0}


def assert_same(a, b, tolerance=1e-5):
    assert len(a) == len(b) > 0
    torch.testing.assert_close(
        torch.tensor(a, dtype=torch.float64),
        torch.tensor(b, dtype=torch.float64),
        rtol=tolerance,
        atol=tolerance,
    )


def test_the_trainer_scores_trains_and_logs(tmp_path, model_dir, capsys, caplog):
    trainer = trained(tmp_path, configuration(tmp_path, model_dir))
    assert type(trainer) is StarDSSAxolotlTrainer
    lines = [h for h in trainer.state.log_history if "grad_norm" in h]
    assert len(lines) == 2
    for name in ("mean_score", "share_below_threshold", "ce", "kl", "kl_weight_mass"):
        assert f"star_dss/{name}" in lines[0]
    assert lines[1]["loss"] == pytest.approx(lines[1]["star_dss/ce"] + lines[1]["star_dss/kl"])
    assert lines[1]["star_dss/kl"] > 0
    out = capsys.readouterr().out
    assert "STAR-DSS is active: loss_type=star_dss" in out
    assert "for 8 of them the guard read the messages, for 0 the raw prompt" in caplog.text
    record = json.loads((tmp_path / "out" / "star_dss.json").read_text())
    assert record["options"]["guard"] == "test-words"
    assert record["data"]["train"]["responses"] == 8


def test_the_loss_is_that_of_the_trl_integration(tmp_path, model_dir):
    """With the same model and data, three steps have the same losses and gradient norms."""
    ours = trained(tmp_path, configuration(tmp_path, model_dir, max_steps=3, learning_rate=1e-3))
    columns = ["input_ids", "labels", SCORES_COLUMN]
    theirs = StarDSSTrainer(
        AutoModelForCausalLM.from_pretrained(model_dir, attn_implementation="eager"),
        args=StarDSSConfig(
            output_dir=str(tmp_path / "trl"),
            per_device_train_batch_size=8,
            max_steps=3,
            learning_rate=1e-3,
            lr_scheduler_type="constant",
            logging_steps=1,
            report_to="none",
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            save_strategy="no",
            max_grad_norm=ours.args.max_grad_norm,
            weight_decay=ours.args.weight_decay,
            kl_coef=2.0,
        ),
        train_dataset=Dataset.from_list(ours.train_dataset.select_columns(columns).to_list()),
        processing_class=AutoTokenizer.from_pretrained(model_dir),
    )
    theirs.train()
    assert_same(history(ours), history(theirs))


def test_the_loss_is_equation_3(tmp_path, model_dir):
    ours = trained(tmp_path, configuration(tmp_path, model_dir))
    model = AutoModelForCausalLM.from_pretrained(model_dir)
    batch = ours.data_collator([ours.train_dataset[i] for i in range(8)])
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    expected = star_dss_loss(
        logits, batch["labels"], batch[SCORES_COLUMN], ref_logits=logits.detach(), kl_coef=2.0
    ).loss
    assert history(ours)[0][0] == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("packed", [False, True], ids=["unpacked", "packed"])
def test_safe_scores_give_the_run_of_stock_axolotl(tmp_path, model_dir, packed):
    batch = {"sample_packing": packed, "micro_batch_size": 1 if packed else 8}
    batch |= {"sample_packing_sequentially": True} if packed else {}
    ours = trained(tmp_path, configuration(tmp_path, model_dir, star_dss={"guard": SAFE}, **batch))
    plain = configuration(tmp_path, model_dir, star_dss=None, plugins=None, **batch)
    stock = trained(tmp_path, plain)
    assert type(stock).__name__ == "AxolotlTrainer"
    assert_same(history(ours), history(stock))


def test_accumulation_does_not_change_the_gradient(tmp_path, model_dir):
    one = trained(tmp_path, configuration(tmp_path, model_dir, micro_batch_size=4))
    four = configuration(tmp_path, model_dir, micro_batch_size=1, gradient_accumulation_steps=4)
    assert_same(history(one), history(trained(tmp_path, four)))


def conversations(folder):
    return chat(folder / "chat.jsonl", multi_turn())


def texts(folder):
    """Write texts of which every token is trained; return their entry of `datasets`."""
    rows = [{"text": "the quick brown fox is bad"}, {"text": "hello world. how are you?"}] * 2
    file = write_rows(folder / "text.jsonl", rows)
    return {"path": file, "ds_type": "json", "type": "completion"}


class ShiftedScores(TokenColumnsCollator):
    """A collator that shifts every score by one token."""

    def __call__(self, features):
        batch = super().__call__(features)
        return {**batch, SCORES_COLUMN: batch[SCORES_COLUMN].roll(1, dims=1)}


@pytest.mark.parametrize(("data", "attention"), [(conversations, "eager"), (texts, "sdpa")])
def test_packed_equals_unpacked(tmp_path, model_dir, data, attention):
    """Compare losses and gradients of rows in a batch with those of the same rows in one pack."""
    shared = {"datasets": [data(tmp_path)], "attn_implementation": attention}
    apart = trained(tmp_path, configuration(tmp_path, model_dir, **shared))
    shared |= {"sample_packing": True, "micro_batch_size": 1, "sequence_len": 1024}
    shared |= {"sample_packing_sequentially": True}  # the other sampler starts processes
    packed = trainer_of(tmp_path, configuration(tmp_path, model_dir, **shared))
    batches = list(packed.get_train_dataloader())
    assert len(batches) == 1
    assert len(batches[0]["input_ids"]) == 1
    packed.train()
    assert_same(history(apart), history(packed))
    twin = trainer_of(tmp_path, configuration(tmp_path, model_dir, **shared))
    twin.data_collator = ShiftedScores(twin.data_collator.inner)
    twin.train()
    with pytest.raises(AssertionError):
        assert_same(history(apart), history(twin), 1e-3)


def test_scores_of_several_packs_lie_on_their_tokens(tmp_path, model_dir):
    packing = {"sample_packing": True, "sequence_len": 128, "micro_batch_size": 2}
    trainer = trainer_of(
        tmp_path,
        configuration(tmp_path, model_dir, datasets=[conversations(tmp_path)], **packing),
    )
    known = {}
    for row in trainer.train_dataset:
        known[tuple(row["input_ids"])] = (row[SCORES_COLUMN], row["ref_logps"])
    seen = 0
    for batch in trainer.get_train_dataloader():
        for i, ids in enumerate(batch["input_ids"].tolist()):
            start = 0
            while found := next((k for k in known if ids[start : start + len(k)] == [*k]), None):
                here = slice(start, start + len(found))
                for column, values in zip((SCORES_COLUMN, "ref_logps"), known[found]):
                    assert batch[column][i, here].tolist() == pytest.approx(values)
                start += len(found)
                seen += 1
    assert seen >= 4


@pytest.mark.parametrize(
    ("estimator", "lora", "references"),
    [
        ("k3", True, ("adapter", "precomputed")),
        ("full", True, ("adapter", "copy")),
        ("k2", False, ("precomputed", "copy")),
    ],
)
def test_every_reference_gives_the_same_trajectory(
    tmp_path, model_dir, estimator, lora, references
):
    runs = []
    for reference in references:
        block = {"guard": "test-words", "kl_coef": 2.0, "kl_estimator": estimator}
        changes = {**(LORA if lora else {}), "star_dss": {**block, "reference": reference}}
        trainer = trainer_of(tmp_path, configuration(tmp_path, model_dir, **changes))
        assert trainer.star_dss_state.reference.kind == reference
        trainer.train()
        runs.append(trainer)
    assert_same(history(runs[0]), history(runs[1]), 1e-4)
    assert runs[0].state.log_history[1]["star_dss/kl"] > 0


@pytest.mark.parametrize(("estimator", "reference"), [("k2", "auto"), ("full", "auto")])
def test_qlora_trains(tmp_path, tokenizer, estimator, reference):
    """bitsandbytes computes with 4-bit weights on a CPU, too, in blocks of 64."""
    folder = tmp_path / "model"
    tiny_llama(len(tokenizer), hidden_size=64, intermediate_size=128).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    block = {"guard": "test-words", "kl_estimator": estimator, "reference": reference}
    qlora = {**LORA, "adapter": "qlora", "load_in_4bit": True}
    trainer = trained(tmp_path, configuration(tmp_path, folder, star_dss=block, **qlora))
    assert any(type(m).__name__ == "Linear4bit" for m in trainer.model.modules())
    assert trainer.star_dss_state.reference.kind == (
        "precomputed" if estimator == "k2" else "adapter"
    )
    assert trainer.state.log_history[0]["star_dss/kl"] == pytest.approx(0, abs=1e-3)
    assert trainer.state.log_history[1]["star_dss/kl"] > 0


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_nothing(tmp_path, model_dir, reentrant):
    block = {"guard": "test-words", "reference": "adapter", "kl_coef": 2.0}
    plain = trained(tmp_path, configuration(tmp_path, model_dir, star_dss=block, **LORA))
    checkpointing = {
        "gradient_checkpointing": True,
        "gradient_checkpointing_kwargs": {"use_reentrant": reentrant},
    }
    config = configuration(tmp_path, model_dir, star_dss=block, **LORA, **checkpointing)
    assert_same(history(plain), history(trained(tmp_path, config)))


@pytest.mark.parametrize(
    "setting",
    [
        {"chunked_cross_entropy": True},
        {"group_by_length": True},
        {"curriculum_sampling": True},
        {"pad_to_sequence_len": True},
        {"neftune_noise_alpha": 5},
        {"remove_unused_columns": False},
        {"include_tkps": True},
        {"excess_length_strategy": "truncate", "sequence_len": 20},
    ],
    ids=lambda setting: next(iter(setting)),
)
def test_other_settings_train(tmp_path, model_dir, setting):
    trainer = trained(tmp_path, configuration(tmp_path, model_dir, **setting))
    assert trainer.star_dss_state.shaped == 2
    assert trainer.state.log_history[1]["star_dss/kl"] > 0


@pytest.mark.parametrize("mode", ["hard", "static", "rejection", "kl_only", "sft"])
def test_every_loss_type_trains(tmp_path, model_dir, mode):
    block = {"loss_type": mode, "guard": "test-words"}
    trainer = trained(tmp_path, configuration(tmp_path, model_dir, star_dss=block, max_steps=1))
    assert trainer.star_dss_state.shaped == 1


def test_evaluation_uses_the_same_loss(tmp_path, model_dir):
    config = configuration(
        tmp_path,
        model_dir,
        eval_strategy="steps",
        eval_steps=2,
        test_datasets=[{**conversations(tmp_path / "eval"), "split": "train"}],
    )
    trainer = trained(tmp_path, config)
    logged = [h for h in trainer.state.log_history if "eval_loss" in h][-1]
    assert logged["eval_loss"] == pytest.approx(
        logged["eval_star_dss/ce"] + logged["eval_star_dss/kl"], rel=1e-5
    )
    assert trainer.star_dss_state.summaries["eval"].responses == 16


def test_evaluation_can_be_packed(tmp_path, model_dir):
    test = {**conversations(tmp_path / "eval"), "split": "train"}
    config = configuration(
        tmp_path,
        model_dir,
        test_datasets=[test],
        sample_packing=True,
        eval_sample_packing=True,
        micro_batch_size=1,
        sample_packing_sequentially=True,
    )
    packing = trainer_of(tmp_path, config)
    assert len(list(packing.get_eval_dataloader())) == 2
    packed = packing.evaluate()
    config |= {"eval_sample_packing": False, "eval_batch_size": 8}
    apart = trainer_of(tmp_path, config).evaluate()
    # eval_loss is the mean of the batches' losses, whose numbers of tokens differ.
    for name in ("eval_star_dss/ce", "eval_star_dss/mean_score"):
        assert packed[name] == pytest.approx(apart[name], rel=1e-5)


def test_the_guard_is_not_asked_again_for_cached_scores(tmp_path, model_dir):
    def loads(**changes):
        before = WordGuard.loads
        trainer_of(tmp_path, configuration(tmp_path, model_dir, **changes))
        return WordGuard.loads - before

    block = {"guard": "test-words", "chunk_size": 2}
    assert loads(star_dss=block) > 0
    assert loads(star_dss=block, learning_rate=5e-3, max_steps=1) == 0
    assert loads(star_dss={**block, "kl_coef": 0.1}) == 0
    assert loads(star_dss={**block, "chunk_size": 3}) > 0
    assert loads(star_dss={**block, "guard": {"preset": "test-words", "word": "dog"}}) > 0


def test_an_incomplete_checkpoint_is_named(tmp_path, model_dir):
    folder = tmp_path / "out" / "checkpoint-2"
    folder.mkdir(parents=True)
    trainer = trainer_of(tmp_path, configuration(tmp_path, model_dir))
    with pytest.raises(CheckpointError, match="checkpoint-2: it was not written to its end"):
        trainer.train(resume_from_checkpoint=str(folder))


def test_scored_data_needs_no_guard(tmp_path, model_dir):
    config = configuration(tmp_path, model_dir)
    scored = trainer_of(tmp_path, config).train_dataset
    rows = [
        {name: row[name] for name in ("input_ids", "attention_mask", "labels", SCORES_COLUMN)}
        for row in scored
    ]
    file = write_rows(tmp_path / "scored.jsonl", rows)
    config |= {"datasets": [{"path": file, "ds_type": "json", "type": None}]}
    config |= {"star_dss": {"kl_coef": 2.0}}
    again = trainer_of(tmp_path, config).train_dataset
    assert sorted(again[SCORES_COLUMN]) == sorted(scored[SCORES_COLUMN])
    rows[0][SCORES_COLUMN].pop()
    write_rows(tmp_path / "scored.jsonl", rows)
    with pytest.raises(DataError, match="one per token"):
        trainer_of(tmp_path, config)


@pytest.mark.parametrize("entry", ["shards", "saved"])
def test_what_star_dss_score_writes_needs_no_guard(tmp_path, model_dir, entry):
    data, out = write_rows(tmp_path / "chat.jsonl", multi_turn()), tmp_path / "shards"
    job = jobs.begin(data, str(model_dir), out, shard_rows=3, guard="test-words")
    shards.score_shards(job, progress=False)
    jobs.finish(job)
    if entry == "saved":
        write_dataset(load_scored(out), tmp_path / "saved")
    config = configuration(tmp_path, model_dir, star_dss={"kl_coef": 2.0})
    config |= {"datasets": [{"path": str(tmp_path / entry), "type": None}]}
    trained_on = trainer_of(tmp_path, config).train_dataset
    assert sorted(trained_on[SCORES_COLUMN]) == sorted(load_scored(out)[SCORES_COLUMN])


@pytest.mark.parametrize("adapter", [LORA, {}], ids=["lora", "full"])
def test_rows_that_a_collator_joins_keep_their_scores(tmp_path, model_dir, monkeypatch, adapter):
    """Axolotl allows `batch_flattening` only with attentions that need a GPU; sdpa works, too."""
    monkeypatch.setattr(
        axolotl.utils.schemas.config, "ATTN_IMPLS_SUPPORTING_PACKING", frozenset({"sdpa"})
    )
    changes = {"attn_implementation": "sdpa", "micro_batch_size": 4, **adapter}
    joined = configuration(tmp_path / "joined", model_dir, batch_flattening=True, **changes)
    trainer = trained(tmp_path / "joined", joined)
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(4)])
    assert batch["input_ids"].shape[0] == 1
    assert "attention_mask" not in batch
    assert (batch["star_scores"] < 0.5).any()
    apart = trained(tmp_path / "apart", configuration(tmp_path / "apart", model_dir, **changes))
    for one, two in zip(history(trainer), history(apart), strict=True):
        assert one == pytest.approx(two, rel=1e-5)
