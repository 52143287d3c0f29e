"""Streams in TRL: which rows are scored and when, and what the output says about them."""

import json
import logging

import pytest

pytest.importorskip("trl")

from datasets import Dataset, IterableDataset, load_from_disk
from support.guards import WordGuard
from support.run_differences import history
from support.trl_runs import ANSWERS, Stop, conversations, prompt_completion, tiny_trainer
from support.trl_streams import IN_ORDER, assert_same_history, train_in_order

from star_dss_plugin import score_dataset


@pytest.fixture
def asked_texts(monkeypatch):
    """Return a list that records each response that a guard is asked to score."""
    texts = []
    scores = WordGuard.token_scores

    def note(self, responses):
        texts.extend(text for _, text in responses)
        return scores(self, responses)

    monkeypatch.setattr(WordGuard, "token_scores", note)
    return texts


def test_only_rows_that_training_reads_are_scored(tmp_path, tokenizer, asked_texts):
    def rows():
        i = 0
        while True:
            i += 1
            yield {"prompt": f"{i} + 1 =", "completion": f" {i + 1}"}

    stream = IterableDataset.from_generator(rows)
    train_in_order(tmp_path, tokenizer, stream, max_steps=3, per_device_train_batch_size=2)
    assert 6 <= len(asked_texts) <= 12  # the loader is one batch ahead


def test_a_resumed_run_scores_no_row_again(tmp_path, tokenizer, asked_texts):
    changes = {
        "max_steps": 4,
        "per_device_train_batch_size": 2,
        "save_strategy": "steps",
        "save_steps": 2,
        "stream_buffer": 2,
    }
    whole = train_in_order(
        tmp_path / "a", tokenizer, prompt_completion().to_iterable_dataset(), **changes
    )
    asked_texts.clear()
    cache = str(tmp_path / "cache")
    stopped = tiny_trainer(
        tmp_path / "b",
        tokenizer,
        prompt_completion().to_iterable_dataset(),
        score_cache_dir=cache,
        **IN_ORDER | changes,
    )
    stopped.add_callback(Stop())
    stopped.train()
    before = list(asked_texts)
    resumed = tiny_trainer(
        tmp_path / "b",
        tokenizer,
        prompt_completion().to_iterable_dataset(),
        score_cache_dir=cache,
        **IN_ORDER | changes,
    )
    resumed.train(resume_from_checkpoint=True)
    assert history(resumed)[-2:] == history(whole)[-2:]
    assert 4 <= len(before) < 8
    assert sorted(asked_texts) == sorted(ANSWERS)


def test_a_scored_stream_needs_no_guard(tmp_path, tokenizer, asked_texts):
    scored = score_dataset(prompt_completion(), tokenizer, guard="test-words", chunk_size=2)
    scored.save_to_disk(tmp_path / "scored")
    asked_texts.clear()
    stream = load_from_disk(tmp_path / "scored").to_iterable_dataset()
    stream.info.description = scored.info.description  # as load_scored(streaming=True) has it
    changes = {"max_length": 16, "monotone": True, "guard": None}
    ours = train_in_order(
        tmp_path / "a", tokenizer, stream, score_cache_dir=str(tmp_path / "c"), **changes
    )
    assert_same_history(
        ours,
        train_in_order(tmp_path / "b", tokenizer, load_from_disk(tmp_path / "scored"), **changes),
    )
    assert not asked_texts
    assert not ours.star_dss_state.kept_guard.loaded


def test_the_record_names_the_guard_and_the_given_scores(tmp_path, tokenizer):
    scored = score_dataset(prompt_completion(), tokenizer, guard="test-words", chunk_size=2)

    def rows():
        for i, row in enumerate(scored):
            names = ("input_ids", "labels", *(["star_scores"] if i > 3 else []))
            yield {name: row[name] for name in names}

    stream = IterableDataset.from_generator(rows)
    train_in_order(tmp_path, tokenizer, stream, stream_buffer=4)
    data = json.loads((tmp_path / "out/star_dss.json").read_text())["data"]["train"]
    assert data["guard"] == "test-words and unknown (star_scores column given)"
    assert data["rows"] == 8


def test_the_output_and_the_model_card_count_the_rows_read(tmp_path, tokenizer, capsys):
    trainer = tiny_trainer(
        tmp_path, tokenizer, prompt_completion().to_iterable_dataset(), **IN_ORDER
    )
    trainer.create_model_card()
    trainer.train()
    trainer.create_model_card()
    out = capsys.readouterr().out
    assert "the training data is a stream, scored 3 rows at a time" in out
    assert "the guard stays in memory" in out
    assert "of its first 3 rows: 3 responses scored" in out
    assert "STAR-DSS has read 8 rows of the stream: 8 responses scored" in out
    card = (tmp_path / "out/README.md").read_text()
    assert card.count("## STAR-DSS") == 1
    assert "8 responses, " in card
    assert " in 8 rows of a stream" in card


@pytest.mark.parametrize("streamed", [True, False])
def test_responses_without_a_context_cause_one_warning(tmp_path, tokenizer, caplog, streamed):
    rows = Dataset.from_list([{"text": f"user: {i} + 1? assistant: no"} for i in range(8)])
    rows = rows.to_iterable_dataset() if streamed else rows
    train_in_order(tmp_path, tokenizer, rows, max_steps=2, **IN_ORDER)
    said = [m for m in caplog.messages if "have nothing said before them" in m]
    count = 3 if streamed else 8  # of the first buffer
    assert [m.partition(" have")[0] for m in said] == [f"{count} of {count} responses"]


def test_a_warning_about_every_row_is_logged_once(tmp_path, tokenizer, caplog):
    with caplog.at_level(logging.WARNING, "star_dss_plugin"):
        train_in_order(tmp_path, tokenizer, conversations().to_iterable_dataset())
    said = [record for record in caplog.records if "what the user says was trained" in record.msg]
    assert len(said) == 1
