"""Probed trajectories: scores, provenance, several guards and reports."""

import threading

import numpy as np
import pytest
from datasets import Dataset
from support.probed import PROBED, ROWS, exact, learnable, probed, talks, trained

from star_dss_plugin import inspect_row, load_guard, provenance_of
from star_dss_plugin.data.columns import ASKED_COLUMN, SCORES_COLUMN
from star_dss_plugin.data.templates.chat import ChatTokenizer
from star_dss_plugin.errors import DataError
from star_dss_plugin.options import StarDSSOptions
from star_dss_plugin.report.page import render_page
from star_dss_plugin.report.reading import read_scored
from star_dss_plugin.scoring.guard_statistics import remarks
from star_dss_plugin.scoring.probed import POOL, STRIDE
from star_dss_plugin.scoring.ranks import Share
from star_dss_plugin.scoring.scorer import score_dataset
from star_dss_plugin.training.rows.prepare import prepare_dataset


def test_probed_scores_are_close_and_all_others_are_exact(scored_twice):
    """Compared with a run in which the guard scores every prefix."""
    exact_run, found = scored_twice.exact, scored_twice.probed
    difference = np.abs(trained(found) - trained(exact_run))
    asked = trained(found, ASKED_COLUMN)
    assert (difference[asked] < 1e-5).all()
    assert 0.7 < (~asked).mean() < 0.95
    assert (difference[~asked] > 1e-6).mean() > 0.9
    assert (difference[~asked] <= 0.05).mean() >= 0.95
    of_rows = [
        np.array(marks)[np.array(labels) != -100]
        for marks, labels in zip(found[ASKED_COLUMN], found["labels"], strict=True)
    ]
    assert sum(marks.any() for marks in of_rows) >= POOL * PROBED["probe_sample"]
    # In some rows the guard scored more than every fourth and the last prefix.
    assert any(marks.sum() > -(-len(marks) // STRIDE) + 1 for marks in of_rows)
    # Tokens without a score count as asked.
    for marks, labels in zip(found[ASKED_COLUMN], found["labels"], strict=True):
        assert all(mark for mark, label in zip(marks, labels, strict=True) if label == -100)


def test_provenance_describes_the_probe_and_its_coverage(scored_twice):
    found = provenance_of(scored_twice.probed)
    [note] = found["probes"]
    assert note["responses"] == PROBED["probe_sample"]
    assert note["coverage"] >= 0.95
    assert note["fell_back"] is None
    assert note["guard"] == found["guard"]
    assert 0 < found["probed_prefixes"] < found["prefixes"]
    assert found["guard_identity"]["trajectory"]["probed"]["tolerance"] == 0.05
    remark = " ".join(remarks(found))
    assert "most scores" in remark
    assert f"{note['coverage']:.1%}" in remark
    assert provenance_of(scored_twice.exact).keys() == found.keys() - {
        "probes",
        "probed_prefixes",
    }


def test_a_trainer_with_another_threshold_warns(tokenizer, scored_twice, caplog):
    chat = ChatTokenizer(tokenizer)
    for data, threshold, warned in (
        (scored_twice.probed, 0.5, False),
        (scored_twice.exact, 0.7, False),
        (scored_twice.probed, 0.7, True),
    ):
        caplog.clear()
        options = StarDSSOptions(threshold=threshold)
        prepare_dataset(data, chat, options, name="train", truncation=(None, None), progress=False)
        assert ("the threshold 0.5, and the threshold of this run is 0.7" in caplog.text) == warned


def test_the_order_of_rows_changes_only_the_rounding(tokenizer, learnable_guard, scored_twice):
    order = np.random.default_rng(0).permutation(ROWS).tolist()
    one, other = scored_twice.probed, probed(talks().select(order), tokenizer, learnable_guard)
    assert provenance_of(one)["probes"] == provenance_of(other)["probes"]
    for there, here in enumerate(order):
        assert one[here][ASKED_COLUMN] == other[there][ASKED_COLUMN]
        assert one[here][SCORES_COLUMN] == pytest.approx(other[there][SCORES_COLUMN], abs=1e-5)


def test_repeated_responses_count_once(tokenizer, learnable_guard):
    rows = talks(40)
    twice = Dataset.from_list([*rows, *rows])
    found = probed(twice, tokenizer, learnable_guard)
    assert found[SCORES_COLUMN][:40] == found[SCORES_COLUMN][40:]
    one = provenance_of(probed(rows, tokenizer, learnable_guard))
    assert provenance_of(found)["probes"] == one["probes"]


def test_all_ranks_get_the_same_scores(tokenizer, learnable_guard, scored_twice, tmp_path):
    rows, ranks = talks(), 3
    wait_for_all, found = threading.Barrier(ranks, timeout=120).wait, [None] * ranks
    errors = []
    guards = [load_guard(learnable_guard) for _ in range(ranks)]
    for one in guards:
        one._load()  # before the threads: transformers cannot load models in several at once

    def score(index):
        try:
            found[index] = probed(
                rows,
                tokenizer,
                guards[index],
                score_cache_dir=str(tmp_path),
                share=Share(index, ranks, wait_for_all),
            ).to_list()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=score, args=(i,)) for i in range(ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert found[0] == found[1] == found[2]
    for one, other in zip(scored_twice.probed, found[0], strict=True):
        assert one[ASKED_COLUMN] == other[ASKED_COLUMN]
        # Other batches round the guard's scores differently, and a probe with a small penalty
        # amplifies this, but far below the tolerance.
        assert one[SCORES_COLUMN] == pytest.approx(other[SCORES_COLUMN], abs=1e-3)


def test_more_prefixes_are_asked_around_the_threshold_of_the_loss(
    tokenizer, learnable_guard, scored_twice
):
    """With τ amid the scores, many error intervals contain it, so more prefixes are asked."""
    from star_dss_trl import StarDSSConfig

    rows, middle = talks(), float(np.median(trained(scored_twice.exact)))
    shares = []
    for threshold in (middle, 0.99):
        options = StarDSSConfig(output_dir="x", threshold=threshold, **PROBED, use_cpu=True)
        found = score_dataset(
            rows, tokenizer, options, guard=load_guard(learnable_guard), progress=False
        )
        shares.append(trained(found, ASKED_COLUMN).mean())
    assert shares[0] > shares[1]


# Several guards, and calibrated ones


def test_each_of_several_guards_has_its_own_probe(
    tokenizer, learnable_guard, scored_twice, tmp_path
):
    other = learnable(tmp_path, tokenizer, seed=0)
    both = {"guards": [learnable_guard, other], "combine": "mean"}
    rows = talks()
    found, exact_run = probed(rows, tokenizer, both), exact(rows, tokenizer, both)
    notes = provenance_of(found)["probes"]
    assert [note["guard"] for note in notes] == [learnable_guard["model"], other["model"]]
    asked = trained(found, ASKED_COLUMN)
    difference = np.abs(trained(found) - trained(exact_run))
    assert (difference[asked] < 1e-5).all()
    assert (difference[~asked] <= 0.05).mean() >= 0.95
    assert (asked <= trained(scored_twice.probed, ASKED_COLUMN)).all()


def test_the_tolerance_applies_to_calibrated_scores(tokenizer, learnable_guard):
    calibrated = {**learnable_guard, "calibration": {"temperature": 0.3, "threshold": 0.22}}
    rows = talks()
    found, exact_run = probed(rows, tokenizer, calibrated), exact(rows, tokenizer, calibrated)
    asked, difference = trained(found, ASKED_COLUMN), np.abs(trained(found) - trained(exact_run))
    assert (difference[asked] < 1e-4).all()
    assert (~asked).mean() > 0.5
    assert (difference[~asked] <= 0.05).mean() >= 0.95


# Reports


def test_reports_distinguish_probed_from_asked_chunks(tokenizer, learnable_guard, scored_twice):
    found = scored_twice.probed
    read = read_scored(found, tokenizer)
    marks = [mark for response in read.responses for mark in response.asked]
    assert {True, False} == set(marks)
    assert not read.interpolated
    page = render_page(read, name="talks")
    assert '"asked":[' in page
    assert "by a probe" in page
    mixed = next(r for r in read.responses if False in r.asked)
    shown = inspect_row(found, mixed.row, tokenizer=learnable_guard["model"])
    assert "pieces by a probe" in shown._repr_html_()
    assert "by the probe'" in shown._repr_html_()
    plain = render_page(read_scored(scored_twice.exact, tokenizer), name="talks")
    assert '"asked"' not in plain


def test_damaged_marks_are_refused(tokenizer, learnable_guard):
    found = probed(talks(31), tokenizer, learnable_guard)
    wrong = found.remove_columns(ASKED_COLUMN).add_column(ASKED_COLUMN, [[True]] * len(found))
    with pytest.raises(DataError, match="does not hold true or false"):
        read_scored(wrong, tokenizer)
