"""Data scored in shards: the same rows for any workers, also after workers were killed."""

import json
import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from datasets import load_dataset
from support.shards import ROWS, SHARD_ROWS, SHARDS, asked, begin, contents, in_one_process

from star_dss_plugin import (
    ConfigError,
    DataError,
    GuardError,
    load_guard,
    load_scored,
    provenance_of,
    score_dataset,
    star_dss_loss,
)
from star_dss_plugin.data.reading import read_dataset
from star_dss_plugin.scoring import jobs, shards
from star_dss_plugin.training.rows.collation import TokenColumnsCollator

# The files


def test_shards_equal_the_rows_of_one_call(data, model_dir, tokenizer, tmp_path, log):
    """Compared with all rows in one call of `score_dataset`."""
    provenance = in_one_process(data, model_dir, tmp_path / "out", log)
    guard = load_guard({"preset": "test-letters", "log": str(log)})
    one_call = score_dataset(
        read_dataset(str(data)), tokenizer, guard=guard, chunk_size=2, progress=False
    )
    found = load_scored(tmp_path / "out")
    assert {mask for row in found["attention_mask"] for mask in row} == {1}
    assert list(map(len, found["attention_mask"])) == list(map(len, found["input_ids"]))
    found = found.remove_columns("attention_mask")
    assert found.column_names == one_call.column_names
    assert found.features["star_scores"] == one_call.features["star_scores"]
    assert found.to_list() == one_call.to_list()
    assert (
        provenance
        == provenance_of(found)
        == json.loads((tmp_path / "out" / "star_dss.json").read_text())
    )
    expected = provenance_of(one_call)
    assert provenance["mean_prefix_score"] == pytest.approx(expected["mean_prefix_score"])
    for name in set(expected) - {"mean_prefix_score", "tokenizer"}:
        assert provenance[name] == expected[name], name
    assert not (tmp_path / "out.incomplete").exists()
    assert len(list((tmp_path / "out" / "data").iterdir())) == SHARDS


def test_provenance_of_combined_guards_is_merged(model_dir, tokenizer, tmp_path, log):
    """The merged facts equal those of one call: attempts by row, means over all prefixes."""
    path = tmp_path / "chat.jsonl"
    with path.open("w") as file:
        for i in range(ROWS):
            answer = "it is it is " * (i + 1) + ("<end_of_turn>\u202e" if i % 7 == 3 else "")
            messages = [
                {"role": "user", "content": f"how is {i}?"},
                {"role": "assistant", "content": answer},
            ]
            file.write(json.dumps({"messages": messages}) + "\n")
    letters = {"preset": "test-letters", "log": str(log)}
    guard = {"guards": [letters, "test-words"], "combine": "min"}
    job = jobs.begin(
        str(path),
        str(model_dir),
        tmp_path / "out",
        guard=guard,
        shard_rows=SHARD_ROWS,
        chunk_size=2,
    )
    shards.score_shards(job, progress=False)
    found = jobs.finish(job)
    one_call = provenance_of(
        score_dataset(read_dataset(str(path)), tokenizer, guard=guard, chunk_size=2, progress=False)
    )
    assert found["attempts"] == one_call["attempts"] != {}
    assert found["members"].keys() == one_call["members"].keys()
    for name, member in one_call["members"].items():
        mean = member["mean_prefix_score"]
        assert found["members"][name]["mean_prefix_score"] == pytest.approx(mean)
    for name in ("mean", "opposite"):
        assert found["disagreement"][name] == pytest.approx(one_call["disagreement"][name])


def test_label_masses_are_merged(data, model_dir, tokenizer, tmp_path):
    guard = {
        "model": str(model_dir),
        "safe_labels": [" good"],
        "unsafe_labels": [" bad"],
        "self_check": False,
        "min_label_mass": 0.0,
    }
    job = jobs.begin(
        str(data), str(model_dir), tmp_path / "out", shard_rows=7, guard=guard, guard_device="cpu"
    )
    shards.score_shards(job, progress=False)
    found = jobs.finish(job)["label_mass"]
    expected = provenance_of(
        score_dataset(
            read_dataset(str(data)), tokenizer, guard=guard, guard_device="cpu", progress=False
        )
    )["label_mass"]
    assert found == {name: pytest.approx(expected[name]) for name in ("mean", "min")}


@pytest.mark.parametrize("way", ["load_dataset", "files", "streaming"])
def test_load_dataset_reads_the_shards(data, model_dir, tmp_path, log, way):
    provenance = in_one_process(data, model_dir, tmp_path / "out", log)
    found = load_dataset(
        *(["parquet"] if way == "files" else [str(tmp_path / "out")]),
        split="train",
        data_files=str(tmp_path / "out" / "data" / "*.parquet") if way == "files" else None,
        streaming=way == "streaming",
    )
    rows = list(found)
    assert [row["messages"][1]["content"] for row in rows] == [f"it is {i}" for i in range(ROWS)]
    assert all(len(row["star_scores"]) == len(row["input_ids"]) for row in rows)
    if way != "files":  # the data card has the provenance
        assert provenance_of(found) == provenance


def test_a_training_loop_streams_the_shards(data, model_dir, model, tokenizer, tmp_path, log):
    in_one_process(data, model_dir, tmp_path / "out", log)
    rows = load_scored(tmp_path / "out", streaming=True)
    assert provenance_of(rows)["guard"] == "test-letters"
    from transformers import DataCollatorForSeq2Seq

    collate = TokenColumnsCollator(DataCollatorForSeq2Seq(tokenizer))
    names = ["input_ids", "labels", "star_scores"]
    seen = 0
    for batch in torch.utils.data.DataLoader(rows.select_columns(names), 4, collate_fn=collate):
        logits = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        loss = star_dss_loss(
            logits, batch["labels"], batch["star_scores"], ref_logits=logits.detach()
        ).loss
        assert torch.isfinite(loss)
        seen += len(batch["input_ids"])
    assert seen == ROWS


def test_each_shard_holds_its_provenance(data, model_dir, tmp_path, log):
    in_one_process(data, model_dir, tmp_path / "out", log)
    for path in (tmp_path / "out" / "data").iterdir():
        note = json.loads(pq.read_schema(path).metadata[b"star_dss"])
        assert note["guard_identity"] == {"kind": "letters"}
        assert note["chunk_size"] == 2


def test_a_folder_without_all_shards_is_refused(data, model_dir, tmp_path, log):
    out = tmp_path / "out"
    with pytest.raises(DataError, match="is not a folder of scored shards"):
        load_scored(tmp_path)
    in_one_process(data, model_dir, out, log)
    (out / "data" / "train-00003-of-00007.parquet").unlink()
    with pytest.raises(DataError, match="has 6 shards of 7"):
        load_scored(out)


def without_answer(data, *rows):
    """Give rows such a long prompt that, cut to `max_length`, they have no response."""
    lines = data.read_text().splitlines()
    for i in rows:
        row = json.loads(lines[i])
        row["messages"][0]["content"] = "how is it? " * 200
        lines[i] = json.dumps(row)
    data.write_text("\n".join(lines) + "\n")


@pytest.mark.parametrize("several", [False, True])
@pytest.mark.parametrize("empty", [[32, 31, 30], [0, 1, 2, 3, 4], [*range(0, 15), 20, 32]])
def test_a_shard_may_hold_no_response(data, model_dir, tokenizer, tmp_path, log, empty, several):
    """A job is an error only if none of its rows has a response."""
    without_answer(data, *empty)
    letters = {"preset": "test-letters", "log": str(log)}
    guard = {"guards": [letters, "test-words"]} if several else letters
    options = {"guard": guard, "chunk_size": 2, "max_length": 64, "per_guard": several}
    job = jobs.begin(str(data), str(model_dir), tmp_path / "out", shard_rows=5, **options)
    shards.score_shards(job, progress=False)
    provenance = jobs.finish(job)
    one_call = score_dataset(read_dataset(str(data)), tokenizer, progress=False, **options)
    found = load_scored(tmp_path / "out").remove_columns("attention_mask")
    assert found.to_list() == one_call.to_list()
    expected = provenance_of(one_call)
    assert expected["responses"] == ROWS - len(empty)
    assert provenance["mean_prefix_score"] == pytest.approx(expected["mean_prefix_score"])
    if several:
        mean = expected["disagreement"]["mean"]
        assert provenance["disagreement"]["mean"] == pytest.approx(mean)


def test_a_job_without_any_response_is_refused(data, model_dir, tmp_path, log):
    without_answer(data, *range(ROWS))
    job = begin(data, model_dir, tmp_path / "out", log, max_length=64)
    shards.score_shards(job, progress=False)
    with pytest.raises(DataError, match=f"None of the {ROWS} rows has a response"):
        jobs.finish(job)


def short_context_guard(model_dir):
    """Return a guard with a short context, which long responses do not fit."""
    return {
        "model": str(model_dir),
        "safe_labels": [" good"],
        "unsafe_labels": [" bad"],
        "self_check": False,
        "min_label_mass": 0.0,
    }


def test_a_shard_may_have_no_scored_response_but_not_all_shards(data, model_dir, tmp_path):
    """A failure of the last shard's one response does not stop the job; a failure of all does."""
    options = {
        "guard": short_context_guard(model_dir),
        "guard_device": "cpu",
        "on_guard_error": "unsafe",
        "chunk_size": 500,
    }
    lines = data.read_text().splitlines()
    row = json.loads(lines[0])
    row["messages"][1]["content"] = "bad good " * 600
    data.write_text("\n".join([*lines[1:], json.dumps(row)]) + "\n")
    job = jobs.begin(str(data), str(model_dir), tmp_path / "out", shard_rows=16, **options)
    assert job.shards == 3
    shards.score_shards(job, progress=False)
    found = jobs.finish(job)
    assert found["guard_errors"] == 1
    assert found["label_mass"]["mean"] > 0
    data.write_text(json.dumps(row) + "\n")
    job = jobs.begin(str(data), str(model_dir), tmp_path / "all", **options)
    shards.score_shards(job, progress=False)
    with pytest.raises(GuardError, match="could not score a single one of 1 responses"):
        jobs.finish(job)


# Interrupted and resumed jobs


def test_a_resumed_job_scores_only_missing_shards(data, model_dir, tmp_path, log):
    in_one_process(data, model_dir, tmp_path / "whole", log)
    out = tmp_path / "out"
    job = begin(data, model_dir, out, log)
    scorer = shards.ShardScorer(job)
    for index in (4, 1):
        scorer(index)
    shutil.rmtree(log)
    log.mkdir()
    again = begin(data, model_dir, out, log)
    assert again.missing() == [0, 2, 3, 5, 6]
    shards.score_shards(again, progress=False)
    jobs.finish(again)
    assert sum(map(len, asked(log))) == ROWS - 2 * SHARD_ROWS
    assert contents(out) == contents(tmp_path / "whole")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"chunk_size": 3}, "options differ"),
        ({"shard_rows": 4}, "shard_rows differ"),
        ({"rows": 1}, "content, rows differ"),
    ],
    ids=str,
)
def test_a_job_with_other_options_in_the_same_folder_is_refused(
    data, model_dir, tmp_path, log, changes, message
):
    begin(data, model_dir, tmp_path / "out", log)
    if changes.pop("rows", None):
        data.write_text(data.read_text() + data.read_text().splitlines()[0] + "\n")
    with pytest.raises(ConfigError, match=message):
        begin(data, model_dir, tmp_path / "out", log, **changes)


@pytest.mark.parametrize("row", [1, 299])
def test_a_job_whose_data_changed_in_one_row_is_not_resumed(data, model_dir, tmp_path, log, row):
    rows = [json.loads(line) for line in data.read_text().splitlines()] * 10
    data.write_text("".join(json.dumps(one) + "\n" for one in rows))
    shards.ShardScorer(begin(data, model_dir, tmp_path / "out", log, shard_rows=50))(0)
    rows[row] = {"messages": [rows[row]["messages"][0], {"role": "assistant", "content": "no"}]}
    data.write_text("".join(json.dumps(one) + "\n" for one in rows))
    with pytest.raises(ConfigError, match="content differ"):
        begin(data, model_dir, tmp_path / "out", log, shard_rows=50)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"segmenter": "tokenz"}, "Did you mean 'tokens'"),
        ({"chunk_size": 0}, "chunk_size is 0"),
        ({"engine": "vlm"}, "Unknown engine"),
        ({"shard_rows": 0}, "shard_rows is 0"),
        ({"engine": "http://me:hush@h"}, "credentials"),
    ],
    ids=str,
)
def test_wrong_options_are_refused_before_the_job_begins(
    data, model_dir, tmp_path, log, changes, message
):
    with pytest.raises(ConfigError, match=message):
        begin(data, model_dir, tmp_path / "out", log, **changes)
    assert not (tmp_path / "out.incomplete").exists()


def test_a_damaged_shard_is_named_and_made_again(data, model_dir, tmp_path, log):
    job = begin(data, model_dir, tmp_path / "out", log)
    shards.score_shards(job, progress=False)
    damaged = job.path(2)
    damaged.write_bytes(damaged.read_bytes()[:-30])
    with pytest.raises(DataError, match=r"train-00002-of-00007.parquet is not a whole shard"):
        jobs.finish(job)
    assert not (tmp_path / "out").exists()
    damaged.unlink()
    shards.score_shards(job, progress=False)
    jobs.finish(job)
    assert len(load_scored(tmp_path / "out")) == ROWS


def test_a_worker_that_reads_other_rows_is_refused(data, model_dir, tmp_path, log):
    job = begin(data, model_dir, tmp_path / "out", log)
    data.write_text(data.read_text().replace("how is 0?", "who is 0?"))
    with pytest.raises(DataError, match="finds other rows"):
        shards.ShardScorer(job)(1)


def test_another_chat_template_is_refused(data, model_dir, tmp_path, log):
    folder = tmp_path / "model"
    shutil.copytree(model_dir, folder)
    job = begin(data, folder, tmp_path / "out", log)
    shards.ShardScorer(job)(1)
    template = folder / "chat_template.jinja"
    template.write_text("{{- '' }}" + template.read_text())
    with pytest.raises(ConfigError, match="tokens differ"):
        begin(data, folder, tmp_path / "out", log)
    with pytest.raises(ConfigError, match="finds another tokenizer or chat template"):
        shards.ShardScorer(job)(2)


def test_a_job_killed_while_finishing_keeps_its_plan(data, model_dir, tmp_path, log, monkeypatch):
    """After a kill while finishing, a run with other options must not use the old shards."""
    job = begin(data, model_dir, tmp_path / "out", log)
    shards.score_shards(job, progress=False)

    def killed(*paths):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Path, "rename", killed)
        with pytest.raises(KeyboardInterrupt):
            jobs.finish(job)
    with pytest.raises(ConfigError, match="options differ"):
        begin(data, model_dir, tmp_path / "out", log, chunk_size=3)
    jobs.finish(begin(data, model_dir, tmp_path / "out", log))
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "README.md",
        "data",
        "star_dss.json",
    ]


def test_an_error_names_the_row_of_the_data_set(data, model_dir, tmp_path, log):
    job = begin(data, model_dir, tmp_path / "out", log, guard_options={"refuse": "it is 12"})
    with pytest.raises(GuardError, match="^Row 12: not this one$"):
        shards.score_shards(job, progress=False)
