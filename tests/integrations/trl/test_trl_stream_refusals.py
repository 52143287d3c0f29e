"""Streams in TRL: options, guards and changed rows that stop a run."""

import pytest

pytest.importorskip("trl")

from datasets import Dataset, IterableDataset
from star_dss_trl import StarDSSTrainer
from support.guards import WordGuard
from support.models import tiny_llama
from support.trl_runs import ANSWERS, arguments, prompt_completion, tiny_trainer
from support.trl_streams import IN_ORDER, train_in_order

from star_dss_plugin import ConfigError, DataError, GuardError
from star_dss_plugin.training.rows import known_rows

REFUSED = {
    "precomputed": (
        {"reference": "precomputed"},
        ConfigError,
        "train data set is a stream, for whose rows",
    ),
    "probed": ({"trajectory": "probed"}, ConfigError, "a sample of all the data"),
    "buffer": ({"stream_buffer": 0}, ConfigError, "stream_buffer is 0"),
    "cut": ({"max_length": 2}, DataError, "a stream that gives no row"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_options_that_do_not_work_with_a_stream_are_refused(tmp_path, tokenizer, name):
    changes, error, words = REFUSED[name]
    with pytest.raises(error, match=words):
        tiny_trainer(tmp_path, tokenizer, prompt_completion().to_iterable_dataset(), **changes)


def test_a_stream_without_trained_tokens_is_refused(tmp_path, tokenizer):
    rows = [{"input_ids": [1, 2, 3], "labels": [-100] * 3}] * 4
    stream = Dataset.from_list(rows).to_iterable_dataset()
    with pytest.raises(DataError, match="None of the first 4 rows of the train stream"):
        tiny_trainer(tmp_path, tokenizer, stream, max_length=None, guard="test-words")


def test_a_stream_without_max_steps_is_refused(tmp_path, tokenizer):
    with pytest.raises(ValueError, match="max_steps"):
        tiny_trainer(tmp_path, tokenizer, prompt_completion().to_iterable_dataset(), max_steps=-1)


def test_evaluating_a_stream_is_refused_if_the_reference_was_precomputed(tmp_path, tokenizer):
    trainer = tiny_trainer(tmp_path, tokenizer)
    with pytest.raises(ConfigError, match="reference of this run was computed before"):
        trainer.evaluate(prompt_completion().to_iterable_dataset())


@pytest.mark.parametrize("changed", ["workers", "dispatch"])
def test_loader_settings_that_change_after_setup_are_refused(tmp_path, tokenizer, changed):
    trainer = tiny_trainer(tmp_path, tokenizer, prompt_completion().to_iterable_dataset())
    if changed == "workers":
        trainer.args.dataloader_num_workers = 1
    else:
        trainer.accelerator.dataloader_config.dispatch_batches = True
    with pytest.raises(ConfigError, match="Set dataloader_num_workers=0 and dispatch_batches"):
        trainer.train()


def test_a_guard_error_stops_the_run_and_names_the_row(tmp_path, tokenizer, monkeypatch):
    scores = WordGuard.token_scores

    def fail_on_fox(self, responses):
        if any("fox" in text for _, text in responses):
            raise GuardError("the guard is gone")
        return scores(self, responses)

    monkeypatch.setattr(WordGuard, "token_scores", fail_on_fox)
    data = prompt_completion().to_iterable_dataset()
    changes = {"per_device_train_batch_size": 1, "stream_buffer": 2, "max_steps": 8}
    trainer = tiny_trainer(tmp_path, tokenizer, data, **changes)
    with pytest.raises(GuardError, match="The train stream: Row 4: the guard is gone"):
        trainer.train()
    assert 0 < trainer.state.global_step <= 4
    trainer = tiny_trainer(tmp_path / "b", tokenizer, data, on_guard_error="unsafe", **changes)
    with pytest.raises(GuardError, match="the guard is gone"):
        trainer.train()


def test_a_guard_that_scores_nothing_stops_the_run_also_with_small_buffers(
    tmp_path, tokenizer, monkeypatch
):
    def fails(self, responses):
        raise GuardError("no such row", request=0)

    monkeypatch.setattr(WordGuard, "token_scores", fails)
    data = {"prompt": [str(i) for i in range(64)], "completion": ANSWERS * 8}
    stream = Dataset.from_dict(data).to_iterable_dataset()
    changes = {"stream_buffer": 2, "on_guard_error": "unsafe", "max_steps": 16}
    trainer = tiny_trainer(tmp_path, tokenizer, stream, **changes)
    with pytest.raises(GuardError, match="could not score a single one of 22 responses"):
        trainer.train()


@pytest.mark.parametrize("scored", [True, False])
def test_a_stream_that_replaces_the_scored_one_is_refused(tmp_path, tokenizer, scored):
    stream = prompt_completion().to_iterable_dataset()
    trainer = tiny_trainer(tmp_path, tokenizer, stream)
    own = trainer.train_dataset
    trainer.train_dataset = own.map(lambda row: row) if scored else stream
    with pytest.raises(DataError, match="a stream that took the place"):
        trainer.train()


def test_a_row_that_changes_after_scoring_stops_the_run(tmp_path, tokenizer):
    trainer = tiny_trainer(
        tmp_path, tokenizer, prompt_completion().to_iterable_dataset(), **IN_ORDER
    )
    stream, inner = trainer.star_dss_state.streams[0], trainer.train_dataset

    class Changed(IterableDataset):
        def __init__(self):
            super().__init__(inner._ex_iterable)

        def __iter__(self):
            for row in inner:
                yield {**row, "star_scores": [1.0] * len(row["star_scores"])}

    trainer.train_dataset = stream.dataset = trainer.star_dss_state.train_dataset = Changed()
    with pytest.raises(DataError, match="A row of a batch is not one that was scored"):
        trainer.train()


def test_the_number_of_row_digests_does_not_grow_with_the_stream(tmp_path, tokenizer, monkeypatch):
    """Digests do not grow with the stream."""
    monkeypatch.setattr(known_rows, "_RECENT_ROWS", 6)
    data = {"prompt": [str(i) for i in range(48)], "completion": ANSWERS * 6}
    rows = Dataset.from_dict(data)
    trainer = train_in_order(
        tmp_path, tokenizer, rows.to_iterable_dataset(), stream_buffer=1, max_steps=12
    )
    assert len(trainer.star_dss_state.rows._recent["train"]) == 12


def test_an_evaluation_longer_than_the_kept_digests_does_not_stop_the_run(
    tmp_path, tokenizer, monkeypatch
):
    monkeypatch.setattr(known_rows, "_RECENT_ROWS", 6)
    data = {"prompt": [str(i) for i in range(64)], "completion": ANSWERS * 8}
    rows = Dataset.from_dict(data)
    trainer = StarDSSTrainer(
        tiny_llama(len(tokenizer)),
        args=arguments(tmp_path, eval_strategy="steps", eval_steps=1, stream_buffer=16),
        train_dataset=prompt_completion().to_iterable_dataset(),
        eval_dataset=rows.to_iterable_dataset(),
        processing_class=tokenizer,
    )
    trainer.train()
    assert trainer.state.global_step == 3
