"""Scores are bound to tokens: a batch with a row that was not prepared stops the run."""

import json
import logging

import pytest

pytest.importorskip("trl")

from accelerate.data_loader import IterableDatasetShard
from datasets import Dataset
from star_dss_trl import StarDSSTrainer
from support.models import tiny_llama
from support.trl_runs import ANSWERS, PROMPTS, Stop, arguments, prompt_completion, tiny_trainer
from torch.utils.data import DataLoader, Subset
from transformers import TrainerCallback

from star_dss_plugin import StarDSSError
from star_dss_plugin.errors import DataError
from star_dss_plugin.training.rows import known_rows
from star_dss_plugin.training.rows.known_rows import KnownRows


def edited(name, change):
    """Return a function that changes one column of every row."""
    return lambda dataset: dataset.map(lambda row: {name: change(row[name])})


def swapped(dataset):
    """Reverse the scores of each row."""
    scores = list(dataset["star_scores"])
    moved = [list(reversed(one)) for one in scores]
    return dataset.remove_columns("star_scores").add_column("star_scores", moved)


def replaced(dataset, change):
    """Replace the scores with values of another type, which `map` would convert back."""
    scores = [change(row) for row in dataset["star_scores"]]
    return dataset.remove_columns("star_scores").add_column("star_scores", scores)


CHANGES = {
    "all safe": edited("star_scores", lambda scores: [1.0] * len(scores)),
    "too large": edited("star_scores", lambda scores: [7.0] * len(scores)),
    "not a number": edited("star_scores", lambda scores: [float("nan")] * len(scores)),
    "permuted": swapped,
    "texts": lambda dataset: replaced(dataset, lambda scores: list(map(str, scores))),
    "in lists": lambda dataset: replaced(dataset, lambda scores: [[score] for score in scores]),
    "other tokens": edited("input_ids", lambda ids: [5] * len(ids)),
    "other labels": edited("labels", lambda labels: [-100, *labels[1:-1], -100]),
    "other reference": edited("ref_logps", lambda values: [x - 1 for x in values]),
}


@pytest.mark.parametrize("change", CHANGES)
def test_rows_that_changed_after_set_up_are_refused(tmp_path, tokenizer, change):
    trainer = tiny_trainer(tmp_path, tokenizer)
    trainer.train_dataset = CHANGES[change](trainer.train_dataset)
    with pytest.raises(DataError, match="not one that was scored when STAR-DSS was set up"):
        trainer.train()
    assert trainer.state.global_step == 0


def test_a_part_of_the_training_set_trains_and_is_what_is_said(tmp_path, tokenizer, capsys):
    trainer = tiny_trainer(tmp_path, tokenizer)
    trainer.train_dataset = trainer.train_dataset.select([1, 3, 4, 5])
    trainer.train()
    assert "4 responses scored" in capsys.readouterr().out
    assert json.loads((tmp_path / "out/star_dss.json").read_text())["data"]["train"]["rows"] == 4


@pytest.mark.parametrize("kind", [list, lambda rows: Subset(rows, range(4))])
@pytest.mark.parametrize("scored", [True, False])
def test_evaluation_rows_in_a_list_train_only_if_the_guard_read_them(
    tmp_path, tokenizer, scored, kind, capsys
):
    trainer = StarDSSTrainer(
        tiny_llama(len(tokenizer)),
        args=arguments(tmp_path, score_eval=scored),
        train_dataset=prompt_completion(),
        eval_dataset=prompt_completion().map(
            lambda row: {"completion": [{"role": "assistant", "content": "a bad word it is"}]}
        ),
        processing_class=tokenizer,
    )
    trainer.train_dataset = kind(trainer.eval_dataset)
    count = len(trainer.train_dataset)
    if scored:
        trainer.train()
        assert f"{count} responses scored" in capsys.readouterr().out
        return
    with pytest.raises(DataError, match="not one that was scored when STAR-DSS was set up"):
        trainer.train()
    assert trainer.state.global_step == 0


@pytest.mark.parametrize("scored", [True, False])
def test_evaluation_rows_train_only_if_the_guard_read_them(tmp_path, tokenizer, scored):
    # With other answers, so that these rows are not in the training set.
    evaluation = prompt_completion().map(
        lambda row: {"completion": [{"role": "assistant", "content": "a bad word it is"}]}
    )
    trainer = StarDSSTrainer(
        tiny_llama(len(tokenizer)),
        args=arguments(tmp_path, score_eval=scored),
        train_dataset=prompt_completion(),
        eval_dataset=evaluation,
        processing_class=tokenizer,
    )
    trainer.train_dataset = trainer.eval_dataset
    if scored:
        trainer.train()
        assert trainer.state.global_step == 3
        return
    with pytest.raises(DataError, match="Row 0 of the training set is not one that was scored"):
        trainer.train()
    assert trainer.state.global_step == 0


class Edits(TrainerCallback):
    """Change the data loader's training set during training."""

    def on_step_end(self, args, state, control, train_dataloader=None, **kwargs):
        dataset = train_dataloader.base_dataloader.dataset
        dataset._data = CHANGES["all safe"](dataset)._data


def test_rows_that_change_while_it_trains_are_refused(tmp_path, tokenizer):
    trainer = tiny_trainer(tmp_path, tokenizer, per_device_train_batch_size=1, max_steps=6)
    trainer.add_callback(Edits())
    with pytest.raises(DataError, match="not one that was scored"):
        trainer.train()
    assert trainer.state.global_step < 6


@pytest.mark.parametrize("value", [float("nan"), -0.1, 1.1])
def test_a_batch_with_scores_that_are_none_stops_the_run(tmp_path, tokenizer, value):
    trainer = tiny_trainer(tmp_path, tokenizer)
    batch = next(iter(trainer.get_train_dataloader()))
    batch["star_scores"][0, -1] = value
    with pytest.raises(StarDSSError, match="star_score of .* no probability"):
        trainer.compute_loss(trainer.model, batch)


def test_a_step_of_which_a_part_was_not_shaped_is_stopped(tmp_path, tokenizer):
    trainer = tiny_trainer(
        tmp_path, tokenizer, per_device_train_batch_size=2, gradient_accumulation_steps=2
    )
    shaped, calls = trainer.training_step, []

    def every_second(model, inputs, num_items_in_batch=None):
        calls.append(1)
        if len(calls) % 2:
            return shaped(model, inputs, num_items_in_batch)
        inputs = {k: v for k, v in inputs.items() if k not in ("star_scores", "ref_logps")}
        loss = model(**inputs).loss
        loss.backward()
        return loss.detach()

    trainer.training_step = every_second
    with pytest.raises(StarDSSError, match="for 1 of 2 micro-batches"):
        trainer.train()
    assert trainer.state.global_step == 0


def test_resuming_with_other_options_is_said(tmp_path, tokenizer, caplog):
    settings = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    stopped = tiny_trainer(tmp_path, tokenizer, **settings)
    stopped.add_callback(Stop())
    stopped.train()
    with caplog.at_level(logging.WARNING):
        tiny_trainer(tmp_path, tokenizer, **settings).train(resume_from_checkpoint=True)
        assert "other options" not in caplog.text
    stopped = tiny_trainer(tmp_path, tokenizer, **settings)
    with caplog.at_level(logging.WARNING):
        resumed = tiny_trainer(tmp_path, tokenizer, chunk_size=1, **settings | {"max_steps": 5})
        resumed.train(resume_from_checkpoint=True)
    assert "chunk_size=1 (was 2)" in caplog.text


@pytest.fixture
def few_pass(monkeypatch):
    monkeypatch.setattr(known_rows, "_RECENT_ROWS", 4)


def row(i):
    return {"input_ids": [i], "labels": [i], "star_scores": [0.5]}


def passed_by(known, rows, stream="train", size=1):
    for i in range(0, len(rows), size):
        known.add_buffer(Dataset.from_list(rows[i : i + size]), stream, first=not i)


def refused(known, gone):
    with pytest.raises(DataError, match="A row of a batch is not one that was scored"):
        known.check(gone)


def test_rows_of_a_stream_are_known_until_their_batches_have_gone_by(few_pass):
    known = KnownRows()
    rows = [row(i) for i in range(12)]
    passed_by(known, rows)
    for there in (*rows[:4], *rows[8:]):  # the first ones may fill the last batch
        known.check(there)
    for gone in (rows[4], rows[7], row(12), {**rows[11], "star_scores": [0.25]}):
        refused(known, gone)
    passed_by(known, [row(20)])  # another pass
    refused(known, rows[0])


def test_a_long_evaluation_leaves_the_rows_of_training_known(few_pass):
    known = KnownRows()
    passed_by(known, [row(i) for i in range(20)])
    passed_by(known, [row(100 + i) for i in range(50)], "eval")
    known.check(row(19))


def test_rows_of_the_buffer_before_are_known_however_large_it_is(few_pass):
    known = KnownRows()
    passed_by(known, [row(i) for i in range(30)], size=10)
    for i in range(10, 30):
        known.check(row(i))


def test_what_fills_up_the_last_batch_of_several_processes_is_known(tmp_path, tokenizer, few_pass):
    rows = Dataset.from_dict({"prompt": PROMPTS * 2, "completion": ANSWERS * 2})
    stream = rows.select(range(15)).map(lambda row, i: {"prompt": f"{i}"}, with_indices=True)
    trainer = tiny_trainer(tmp_path, tokenizer, stream.to_iterable_dataset(), stream_buffer=1)
    shard = IterableDatasetShard(
        trainer.train_dataset, batch_size=2, num_processes=2, process_index=1
    )
    found = list(DataLoader(shard, batch_size=2, collate_fn=trainer.data_collator))
    assert len(found) == 4
