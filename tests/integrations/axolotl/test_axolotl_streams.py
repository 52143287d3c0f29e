"""Streams in Axolotl: rows are scored as they are read, packed or not."""

import json

import pytest

pytest.importorskip("axolotl", reason="needs Axolotl: make test-axolotl")

import torch
from axolotl_runs import (
    LORA,
    PLUGIN,
    _light_runs,  # noqa: F401
    chat,
    configuration,
    data_of,
    loaded,
    multi_turn,
    single_turn,
    trained,
    trainer_of,
    write_config,
    write_rows,
)
from datasets import IterableDataset
from star_dss_axolotl.check import check
from star_dss_axolotl.streams import PackedStream
from support.guards import WordGuard
from support.run_differences import history

from star_dss_plugin import ConfigError, DataError, GuardError
from star_dss_plugin.data.columns import SCORES_COLUMN

IN_ORDER = {
    "micro_batch_size": 2,
    "max_steps": 3,
    "learning_rate": 2e-3,
    "curriculum_sampling": True,
    "shuffle_merged_datasets": False,
}
PACKS = {
    "sample_packing": True,
    "sample_packing_sequentially": True,
    "multipack_real_batches": False,
    "sequence_len": 96,
    "micro_batch_size": 2,
    "eval_sample_packing": False,
}


def block(reference, **changes):
    return {"guard": "test-words", "chunk_size": 2, "reference": reference, **changes}


def alpaca(folder):
    rows = [{"instruction": "say it", "input": "", "output": f"word {i} bad"} for i in range(8)]
    return {"path": write_rows(folder / "a.jsonl", rows), "ds_type": "json", "type": "alpaca"}


def assert_same_history(one, other):
    assert len(history(one)) == len(history(other)) > 0
    torch.testing.assert_close(
        torch.tensor(history(one)), torch.tensor(history(other)), rtol=1e-6, atol=1e-6
    )


@pytest.mark.parametrize("kind", ["lora", "full", "copy", "packed", "packed-real", "alpaca"])
def test_a_stream_trains_as_a_data_set_of_its_rows(tmp_path, model_dir, kind):
    reference = {"lora": "adapter", "packed": "adapter"}.get(kind, str(model_dir))
    options = block("auto" if kind == "copy" else reference, kl_coef=2.0)
    changes = {**IN_ORDER, "star_dss": options}
    changes["datasets"] = [
        alpaca(tmp_path) if kind == "alpaca" else chat(tmp_path / "chat.jsonl", multi_turn())
    ]
    if kind in ("lora", "packed"):
        changes |= LORA
    if kind.startswith("packed"):
        changes |= PACKS
    if kind == "packed-real":
        changes |= {"multipack_real_batches": True, "max_steps": 2}
    buffer = 8 if kind.startswith("packed") else 3
    streamed = {**changes, "star_dss": options | {"stream_buffer": buffer}, "streaming": True}
    ours = trained(tmp_path / "a", configuration(tmp_path / "a", model_dir, **streamed))
    twin = trained(tmp_path / "b", configuration(tmp_path / "b", model_dir, **changes))
    assert_same_history(ours, twin)
    lines = [line for line in ours.state.log_history if "star_dss/kl" in line]
    assert max(line["star_dss/kl"] for line in lines) > 1e-6
    record = json.loads((tmp_path / "a/out/star_dss.json").read_text())["data"]["train"]
    assert record["streamed"]
    assert record["rows"] == len(twin.train_dataset)
    # The guard has read messages, also of packed rows and of Alpaca.
    assert record["provenance"]["raw_contexts"] == 0


def test_rows_too_long_for_a_pack_are_left_out_and_not_scored(tmp_path, model_dir, monkeypatch):
    asked = []
    scores = WordGuard.token_scores
    monkeypatch.setattr(
        WordGuard,
        "token_scores",
        lambda self, found: asked.extend(text for _, text in found) or scores(self, found),
    )
    rows = single_turn()
    rows[2]["messages"][1]["content"] = "long " * 60
    changes = IN_ORDER | PACKS | {"streaming": True}
    config = configuration(
        tmp_path, model_dir, datasets=[chat(tmp_path / "chat.jsonl", rows)], **changes
    )
    trainer = trainer_of(tmp_path, config)
    packs = list(trainer.train_dataset)
    assert isinstance(trainer.train_dataset, PackedStream)
    assert sum(map(len, packs)) == 7
    assert not any("long" in text for text in asked)
    lengths = [sum(len(row["input_ids"]) for row in pack) for pack in packs]
    assert 96 < max(lengths) <= 192  # one long pack in place of a batch of two
    (batch,) = [next(iter(trainer.get_train_dataloader()))]
    assert batch["input_ids"].shape[0] == 1
    assert batch[SCORES_COLUMN].shape == batch["input_ids"].shape


def test_packs_differ_in_each_pass_and_are_equal_on_each_process(tmp_path, model_dir):
    changes = {**PACKS, "streaming": True, "sample_packing_sequentially": False}
    packs = trainer_of(tmp_path, configuration(tmp_path, model_dir, **changes)).train_dataset

    def read():
        return [[row["input_ids"] for row in pack] for pack in packs]

    first = read()
    torch.rand(1)
    assert read() == first
    packs.set_epoch(1)
    assert read() != first


def test_evaluation_data_of_a_packed_stream_is_scored_in_advance(tmp_path, model_dir):
    changes = IN_ORDER | PACKS | {"streaming": True}
    write_rows(tmp_path / "data" / "chat.jsonl", single_turn())
    data = {"path": str(tmp_path / "data"), "type": "chat_template", "split": "train"}
    changes |= {"datasets": [data], "test_datasets": [data]}
    config = configuration(tmp_path, model_dir, **changes)
    cfg = loaded(tmp_path, config)
    data = data_of(cfg)
    assert isinstance(data.train_dataset, IterableDataset)
    assert SCORES_COLUMN in data.eval_dataset.column_names
    assert (cfg.micro_batch_size, cfg.sample_packing) == (2, True)


def test_a_guard_error_stops_the_run_and_names_the_row(tmp_path, model_dir, monkeypatch):
    scores = WordGuard.token_scores

    def fail_on_fox(self, responses):
        if any("fox" in text for _, text in responses):
            raise GuardError("the guard is gone")
        return scores(self, responses)

    monkeypatch.setattr(WordGuard, "token_scores", fail_on_fox)
    options = block("auto", stream_buffer=2)
    changes = IN_ORDER | {"streaming": True, "star_dss": options, "max_steps": 8}
    trainer = trainer_of(tmp_path, configuration(tmp_path, model_dir, **changes))
    with pytest.raises(GuardError, match="The train stream: Row 4: the guard is gone"):
        trainer.train()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"star_dss": block("precomputed")}, "reference is 'precomputed' and the train"),
        ({"star_dss": block("auto", trajectory="probed")}, "a sample of all the data"),
    ],
)
def test_options_that_do_not_work_with_a_stream_are_refused(tmp_path, model_dir, changes, words):
    config = configuration(tmp_path, model_dir, streaming=True, **changes)
    with pytest.raises(ConfigError, match=words):
        trainer_of(tmp_path, config)
    found = check(write_config(tmp_path, config), config, data=True)
    assert any(words in problem for problem in found.problems)


@pytest.mark.parametrize("packed", [False, True])
def test_check_describes_a_stream(tmp_path, model_dir, packed):
    changes = PACKS if packed else {}
    config = configuration(tmp_path, model_dir, streaming=True, **changes)
    found = check(write_config(tmp_path, config), config, data=True)
    assert not found.problems
    assert any("train data: a stream, scored 512 rows at a time" in note for note in found.notes)


def test_data_that_is_no_data_set_is_refused(tmp_path, model_dir):
    config = configuration(tmp_path, model_dir, plugins=[PLUGIN])
    trainer = trainer_of(tmp_path, config)
    with pytest.raises(DataError, match="whose rows cannot be scored"):
        trainer._scored([{"input_ids": [1]}], "train")
