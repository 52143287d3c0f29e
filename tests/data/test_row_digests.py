"""Scored rows keep digests of their tokens, labels and scores; training checks them."""

import numpy as np
import pytest
from datasets import Dataset, concatenate_datasets, load_from_disk

from star_dss_plugin.data.files.parquet_shards import load_scored, write_card, write_shard
from star_dss_plugin.data.provenance import write_note
from star_dss_plugin.data.row_digests import add_row_digests, check_row_digests, write_row_digests
from star_dss_plugin.data.writing import write_dataset
from star_dss_plugin.errors import DataError

NOTE = {
    "guard": "words",
    "demonstration_guard": False,
    "guard_identity": {},
    "segmenter": "tokens",
    "chunk_size": 5,
    "responses": 6,
    "raw_contexts": 0,
    "rows": 6,
}


@pytest.fixture
def scored_rows():
    """Return six rows as `score_dataset` makes them; rows 4 and 5 are equally long."""
    rows = [
        {
            "input_ids": list(range(i, i + 5 + min(i, 4))),
            "labels": [-100, -100, *range(i + 2, i + 5 + min(i, 4))],
            "star_scores": [1.0, 1.0, *np.linspace(0.1 * i, 1, 3 + min(i, 4)).astype(np.float32)],
        }
        for i in range(6)
    ]
    dataset = Dataset.from_list(rows)
    write_note(dataset, "scores", NOTE)
    write_row_digests(dataset)
    return dataset


def saved(dataset, folder):
    """Return the data set, written and loaded again."""
    write_dataset(dataset, folder / "scored")
    return load_from_disk(str(folder / "scored"))


def sharded(dataset, folder):
    """Return the data set, written as two shards and loaded again."""
    for k in range(2):
        part = dataset.select(range(3 * k, 3 * k + 3))
        write_note(part, "scores", {**NOTE, "rows": 3})
        write_shard(part, folder / f"shards/data/train-0000{k}-of-00002.parquet")
    write_card(folder / "shards", NOTE)
    return load_scored(folder / "shards")


WAYS = {"in memory": lambda dataset, folder: dataset, "saved": saved, "sharded": sharded}


@pytest.mark.parametrize("way", WAYS)
def test_rows_may_be_selected_shuffled_joined_and_extended(scored_rows, tmp_path, way):
    dataset = WAYS[way](scored_rows, tmp_path)
    check_row_digests(dataset, "train")
    check_row_digests(dataset.select([5, 1, 1]), "train")
    check_row_digests(dataset.shuffle(seed=3).filter(lambda row: len(row["labels"]) > 5), "train")
    other = dataset.select([0]).map(lambda row: {"input_ids": [9, *row["input_ids"][1:]]})
    other.info.description = ""
    write_note(other, "scores", NOTE)
    write_row_digests(other)
    check_row_digests(concatenate_datasets([other, dataset]), "train")
    check_row_digests(dataset.map(lambda row: {"source": "web"}), "train")


def edit(name, change):
    """Return a function that changes one column of every row."""
    return lambda dataset: dataset.map(lambda row: {name: change(row[name])})


def moved(name):
    """Return a function that swaps one column of the last two rows, which are equally long."""

    def move(dataset):
        order = [0, 1, 2, 3, 5, 4]
        column = [dataset[name][i] for i in order]
        feature = dataset.features[name]
        return dataset.remove_columns(name).add_column(name, column, feature=feature)

    return move


CHANGES = {
    "scores swapped": moved("star_scores"),
    "tokens swapped": moved("input_ids"),
    "labels swapped": moved("labels"),
    "all safe": edit("star_scores", lambda scores: [1.0] * len(scores)),
    "one score": edit("star_scores", lambda scores: [*scores[:-1], scores[-1] / 2]),
    "more is trained": edit("labels", lambda labels: [7, *labels[1:]]),
    "other tokens are trained": edit("labels", lambda labels: [*labels[:-1], labels[-1] + 1]),
    "other tokens": edit("input_ids", lambda ids: [ids[0] + 1, *ids[1:]]),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("change", CHANGES)
def test_changed_rows_are_refused(scored_rows, tmp_path, way, change):
    changed = CHANGES[change](WAYS[way](scored_rows, tmp_path))
    with pytest.raises(DataError, match=r"The train data set.*not as it was scored"):
        check_row_digests(changed, "train")


def test_rows_cut_by_this_package_get_new_digests(scored_rows):
    names = ("input_ids", "labels", "star_scores")
    cut = scored_rows.map(lambda row: {name: row[name][:4] for name in names})
    with pytest.raises(DataError, match="not as it was scored"):
        check_row_digests(cut, "train")
    add_row_digests(cut)
    check_row_digests(cut, "train")
    check_row_digests(scored_rows, "train")
    with pytest.raises(DataError, match="not as it was scored"):
        check_row_digests(CHANGES["one score"](cut), "train")
    cut.info.description = ""
    add_row_digests(cut)
    assert not cut.info.description


def test_scores_without_a_digest_are_accepted(scored_rows):
    changed = CHANGES["all safe"](scored_rows)
    changed.info.description = ""
    check_row_digests(changed, "train")


def test_cut_and_packed_rows_are_not_compared(scored_rows):
    cut = scored_rows.map(lambda r: {"input_ids": r["input_ids"][:4], "labels": r["labels"][:4]})
    check_row_digests(cut, "train")
    check_row_digests(scored_rows.map(lambda r: {"seq_lengths": [len(r["input_ids"])]}), "train")


@pytest.mark.parametrize("note", [5, "no base64!", "AAAA", ["x"], "é"])
def test_digests_of_another_form_are_refused(scored_rows, note):
    write_note(scored_rows, "rows", note)
    with pytest.raises(DataError, match="not what this package writes"):
        check_row_digests(scored_rows, "train")
