"""Streams with unusable rows: the run stops and names the row."""

import pytest

pytest.importorskip("trl")

from datasets import IterableDataset
from star_dss_trl import StarDSSTrainer
from support.models import tiny_llama
from support.run_differences import history
from support.trl_runs import ANSWERS, PROMPTS, arguments, prompt_completion, tiny_trainer

from star_dss_plugin import DataError

TOKENS = {"input_ids": [3, 4, 5, 6], "labels": [-100, -100, 5, 6]}
RUN = {"stream_buffer": 3, "per_device_train_batch_size": 2, "max_steps": 4}


def stream(rows, bad=None, at=4):
    """Return a stream of rows, of which one is replaced by another row or by an error."""

    def read():
        for i, row in enumerate(rows):
            if i == at and isinstance(bad, Exception):
                raise bad
            yield bad if i == at and bad is not None else row

    return IterableDataset.from_generator(read)


def texts():
    return [{"prompt": p, "completion": a} for p, a in zip(PROMPTS, ANSWERS, strict=True)]


def talks():
    return [{"messages": row["prompt"] + row["completion"]} for row in prompt_completion()]


UNREADABLE = {
    "a column is missing": (list(prompt_completion()), {"prompt": texts()[0]["prompt"]}),
    "a text is null": (texts(), {"prompt": "1 + 1 =", "completion": None}),
    "another form": (texts(), {"text": "how are you?"}),
    "messages are null": (talks(), {"messages": None}),
    "no messages": (talks(), {"messages": []}),
    "labels are missing": ([TOKENS] * 8, {"input_ids": [3, 4, 5, 6]}),
    "tokens are null": ([TOKENS] * 8, {"input_ids": None, "labels": None}),
    "numbers for texts": (texts(), {"prompt": 5, "completion": 6}),
    "no mapping": (texts(), "a text"),
    "the source breaks": (texts(), OSError("the disk is gone")),
}


@pytest.mark.parametrize("name", UNREADABLE)
def test_a_row_that_cannot_be_read_stops_the_run_with_its_number(tmp_path, tokenizer, name):
    rows, bad = UNREADABLE[name]
    trainer = tiny_trainer(tmp_path, tokenizer, stream(rows, bad), max_length=64, **RUN)
    with pytest.raises(DataError, match="The train stream: Row 4: .*cannot be read: [A-Z]"):
        trainer.train()


def test_an_error_in_a_users_map_names_the_row(tmp_path, tokenizer):
    def shorten(row):
        return {"completion": row["completion"][: row["completion"].index("a")]}

    rows = stream(texts()).map(shorten)  # row 2 has no such letter
    with pytest.raises(DataError, match="The train stream: Row 2: .*ValueError: substring not"):
        tiny_trainer(tmp_path, tokenizer, rows, **RUN)


def test_an_error_in_a_later_pass_names_the_row(tmp_path, tokenizer):
    passes = []

    def read():
        passes.append(len(passes))
        if len(passes) > 7:
            raise OSError("gone")
        yield from texts()

    trainer = tiny_trainer(
        tmp_path, tokenizer, IterableDataset.from_generator(read), **RUN | {"max_steps": 40}
    )
    with pytest.raises(DataError, match="The train stream: Row 0: .*OSError: gone"):
        trainer.train()
    assert trainer.state.global_step % 4 == 0


@pytest.mark.parametrize("shuffled", [False, True])
def test_an_unreadable_row_of_evaluation_data_is_named(tmp_path, tokenizer, shuffled):
    rows = stream(texts(), {"prompt": "how", "completion": None})
    trainer = StarDSSTrainer(
        tiny_llama(len(tokenizer)),
        args=arguments(tmp_path, eval_strategy="steps", eval_steps=1, **RUN),
        train_dataset=prompt_completion(),
        eval_dataset=rows.shuffle(seed=1, buffer_size=1) if shuffled else rows,
        processing_class=tokenizer,
    )
    with pytest.raises(DataError, match="The eval stream: Row 4: .*cannot be read: AttributeError"):
        trainer.train()


@pytest.mark.parametrize(
    "empty", [stream([]), prompt_completion().select([])], ids=["stream", "set"]
)
def test_data_without_any_row_is_refused(tmp_path, tokenizer, empty):
    for train, evaluation in ((empty, None), (prompt_completion(), empty)):
        with pytest.raises(DataError, match="The train or eval data has no row"):
            StarDSSTrainer(
                tiny_llama(len(tokenizer)),
                args=arguments(tmp_path, **RUN),
                train_dataset=train,
                eval_dataset=evaluation,
                processing_class=tokenizer,
            )


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"star_scores": None}, "no list of star_scores"),
        ({"star_scores": [1.0, 1.0, float("nan"), 0.5]}, "a star_score of nan"),
        ({"star_scores": [1.0, 1.0, 0.5]}, "4 tokens and 3 star_scores"),
        ({"labels": [-100, 5, 6]}, "input_ids has 4 tokens and labels has 3"),
    ],
)
def test_columns_with_wrong_lengths_or_values_stop_the_run(tmp_path, tokenizer, change, words):
    row = {**TOKENS, "star_scores": [1.0, 1.0, 0.5, 0.5]}
    rows = stream([row] * 8, {**row, **change}, at=5)
    trainer = tiny_trainer(tmp_path, tokenizer, rows, max_length=64, **RUN)
    with pytest.raises(DataError, match=f"Row 5: .*{words}"):
        trainer.train()


@pytest.mark.parametrize(
    ("rows", "steps"),
    [
        (texts()[:1], 3),
        (texts()[:2], 6),
        ([texts()[1]] * 5, 6),
        ([*texts()[:4], {"prompt": "is this bad?", "completion": ""}, *texts()[5:]], 9),
    ],
    ids=["one row", "shorter than a buffer", "one row repeated", "an answer that is empty"],
)
def test_several_passes_over_a_short_stream_train(tmp_path, tokenizer, rows, steps):
    changes = RUN | {"max_steps": steps, "stream_buffer": 512}
    trainer = tiny_trainer(tmp_path, tokenizer, stream(rows), **changes)
    trainer.train()
    assert len(history(trainer)) == trainer.star_dss_state.shaped == steps
    assert trainer.star_dss_state.streams[0].summary.rows == len(rows)
