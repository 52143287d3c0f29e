"""Probed trajectories: close to exact ones if the probe is sure, else exact; repeatable."""

import shutil
import threading
from types import SimpleNamespace

import numpy as np
import pytest
from datasets import Dataset
from support.guards import WordGuard
from support.probed import PROBED, ROWS, exact, learnable, probed, talks, trained
from support.verdict_guards import describe
from transformers import AutoModelForCausalLM

from star_dss_plugin import ConfigError, GuardError, inspect_row, load_guard, provenance_of
from star_dss_plugin.data.columns import ASKED_COLUMN, SCORES_COLUMN
from star_dss_plugin.data.reading import read_dataset
from star_dss_plugin.data.templates.chat import ChatTokenizer
from star_dss_plugin.guards.probing import guard as probing_guard
from star_dss_plugin.guards.verdict import VerdictGuard
from star_dss_plugin.options import StarDSSOptions
from star_dss_plugin.report.page import render_page
from star_dss_plugin.report.reading import read_scored
from star_dss_plugin.scoring import jobs, shards
from star_dss_plugin.scoring.guard_statistics import remarks
from star_dss_plugin.scoring.probed import (
    POOL,
    STRIDE,
    prefixes_to_score,
    pseudo_random_order,
    stratified,
)
from star_dss_plugin.scoring.ranks import Share
from star_dss_plugin.scoring.scorer import score_dataset
from star_dss_plugin.training.preflight import check_options
from star_dss_plugin.training.rows.prepare import prepare_dataset


@pytest.fixture(scope="module")
def guard(tmp_path_factory, tokenizer):
    return learnable(tmp_path_factory.mktemp("learnable"), tokenizer)


@pytest.fixture(scope="module")
def unlearnable(tmp_path_factory, tokenizer):
    return learnable(tmp_path_factory.mktemp("unlearnable"), tokenizer, seed=0, spread=0.2)


@pytest.fixture(scope="module")
def usual(tmp_path_factory, tokenizer, guard):
    """Return an `exact` and a `probed` run, which many tests use, and the `cache` of the latter."""
    folder = tmp_path_factory.mktemp("usual")
    return SimpleNamespace(
        exact=exact(talks(), tokenizer, guard, score_cache_dir=str(folder / "exact")),
        probed=probed(talks(), tokenizer, guard, score_cache_dir=str(folder / "probed")),
        cache=folder / "probed",
    )


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, tokenizer, guard):
    """Return a run whose guard scores few responses at a time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(probing_guard, "_RESPONSES_PER_CALL", 16)
        folder = tmp_path_factory.mktemp("undisturbed")
        return probed(talks(), tokenizer, guard, score_cache_dir=str(folder))


def test_probed_scores_are_close_and_all_others_are_exact(usual):
    """Compared with a run in which the guard scores every prefix."""
    twin, found = usual.exact, usual.probed
    off = np.abs(trained(found) - trained(twin))
    asked = trained(found, ASKED_COLUMN)
    assert (off[asked] < 1e-5).all()
    assert 0.7 < (~asked).mean() < 0.95
    assert (off[~asked] > 1e-6).mean() > 0.9
    assert (off[~asked] <= 0.05).mean() >= 0.95
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


def test_provenance_says_what_was_learned_and_how_good_it_is(usual):
    found = provenance_of(usual.probed)
    [note] = found["probes"]
    assert note["responses"] == PROBED["probe_sample"]
    assert note["coverage"] >= 0.95
    assert note["fell_back"] is None
    assert note["guard"] == found["guard"]
    assert 0 < found["probed_prefixes"] < found["prefixes"]
    assert found["guard_identity"]["trajectory"]["probed"]["tolerance"] == 0.05
    said = " ".join(remarks(found))
    assert "most scores" in said
    assert f"{note['coverage']:.1%}" in said
    assert provenance_of(usual.exact).keys() == found.keys() - {
        "probes",
        "probed_prefixes",
    }


def test_the_order_of_the_data_changes_nothing_but_rounding(tokenizer, guard, usual):
    order = np.random.default_rng(0).permutation(ROWS).tolist()
    one, other = usual.probed, probed(talks().select(order), tokenizer, guard)
    assert provenance_of(one)["probes"] == provenance_of(other)["probes"]
    for there, here in enumerate(order):
        assert one[here][ASKED_COLUMN] == other[there][ASKED_COLUMN]
        assert one[here][SCORES_COLUMN] == pytest.approx(other[there][SCORES_COLUMN], abs=1e-5)


def saved(dataset, folder):
    dataset.save_to_disk(folder)
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_a_second_run_loads_nothing_and_is_the_same_to_the_byte(
    tokenizer, guard, usual, tmp_path, monkeypatch
):
    monkeypatch.setattr(
        AutoModelForCausalLM, "from_pretrained", lambda *_, **__: pytest.fail("weights were loaded")
    )
    two = probed(talks(), tokenizer, guard, score_cache_dir=str(usual.cache))
    assert saved(usual.probed, tmp_path / "one") == saved(two, tmp_path / "two")


@pytest.mark.parametrize(
    ("method", "calls"),
    # During the guard's scoring of the pool and of the sample, the fit, and the probe's scoring.
    [("trajectories", 0), ("trajectories", 1), ("trunk_states", 0), ("trunk_states", 2)],
)
def test_a_run_that_is_killed_ends_as_if_it_had_not_been(
    tokenizer, guard, undisturbed, tmp_path, monkeypatch, method, calls
):
    monkeypatch.setattr(probing_guard, "_RESPONSES_PER_CALL", 16)
    again = {"score_cache_dir": str(tmp_path / "b")}
    own, made = getattr(VerdictGuard, method), []

    def dies(self, *args):
        made.append(args)
        if len(made) > calls:
            raise KeyboardInterrupt
        return own(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(VerdictGuard, method, dies)
        with pytest.raises(KeyboardInterrupt):
            probed(talks(), tokenizer, guard, **again)
    resumed = probed(talks(), tokenizer, guard, **again)
    assert saved(undisturbed, tmp_path / "one") == saved(resumed, tmp_path / "two")


@pytest.mark.parametrize("damage", [lambda _: b"", lambda _: b"[1, 2]", lambda whole: whole[:-40]])
def test_a_probe_that_is_damaged_is_fitted_again(tokenizer, guard, usual, tmp_path, caplog, damage):
    folder = shutil.copytree(usual.cache, tmp_path / "cache")
    [path] = [path for path in folder.glob("*/*.json") if path.name != "namespace.json"]
    path.write_bytes(damage(path.read_bytes()))
    other = probed(talks(), tokenizer, guard, score_cache_dir=str(folder))
    assert "it is fitted again" in caplog.text
    assert usual.probed.to_list() == other.to_list()


def test_exact_runs_take_no_probed_scores(tokenizer, guard, usual, tmp_path):
    folder = shutil.copytree(usual.cache, tmp_path / "cache")
    after = exact(talks(), tokenizer, guard, score_cache_dir=str(folder))
    assert trained(after) == pytest.approx(trained(usual.exact), abs=1e-6)
    assert ASKED_COLUMN not in after.column_names


def test_another_tolerance_is_another_score(tokenizer, guard, usual, tmp_path):
    cache = {"score_cache_dir": str(shutil.copytree(usual.cache, tmp_path / "cache"))}
    other = probed(talks(), tokenizer, guard, probe_tolerance=0.03, **cache)
    more, fewer = (trained(found, ASKED_COLUMN).mean() for found in (other, usual.probed))
    assert more > fewer


def test_all_ranks_get_the_same(tokenizer, guard, usual, tmp_path):
    rows, ranks = talks(), 3
    barrier, found = threading.Barrier(ranks, timeout=120).wait, [None] * ranks
    errors = []
    guards = [load_guard(guard) for _ in range(ranks)]
    for one in guards:
        one._load()  # before the threads: transformers cannot load models in several at once

    def work(index):
        try:
            found[index] = probed(
                rows,
                tokenizer,
                guards[index],
                score_cache_dir=str(tmp_path),
                share=Share(index, ranks, barrier),
            ).to_list()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert found[0] == found[1] == found[2]
    for one, other in zip(usual.probed, found[0], strict=True):
        assert one[ASKED_COLUMN] == other[ASKED_COLUMN]
        # Other batches round the guard's scores differently, and a probe with a small penalty
        # amplifies this, but far below the tolerance.
        assert one[SCORES_COLUMN] == pytest.approx(other[SCORES_COLUMN], abs=1e-3)


# Falling back, with a reason


def same_as_exact(found, tokenizer, guard, rows):
    twin = exact(rows, tokenizer, guard)
    return (trained(found) == trained(twin)).all() and trained(found, ASKED_COLUMN).all()


def test_few_responses_are_all_asked(tokenizer, guard, caplog):
    rows = talks(30)
    found = probed(rows, tokenizer, guard)
    assert "the data has 30 different responses, and probe_sample is 30" in caplog.text
    assert "every prefix is asked" in caplog.text
    assert same_as_exact(found, tokenizer, guard, rows)
    [note] = provenance_of(found)["probes"]
    assert "30 different responses" in note["fell_back"]
    assert provenance_of(found)["probed_prefixes"] == 0
    assert "was not used" in " ".join(remarks(provenance_of(found)))


def test_a_guard_that_cannot_be_learned_is_asked(tokenizer, unlearnable, caplog):
    rows = talks(60)
    found = probed(rows, tokenizer, unlearnable)
    assert "the probe is sure of no held-out response" in caplog.text
    assert same_as_exact(found, tokenizer, unlearnable, rows)


def test_a_promise_that_is_not_kept_is_not_made(tokenizer, guard, caplog, monkeypatch):
    own = probing_guard.check_bounds
    monkeypatch.setattr(
        probing_guard, "check_bounds", lambda *told: {**own(*told), "coverage": 0.9499}
    )
    rows = talks(60)
    found = probed(rows, tokenizer, guard)
    assert "only 95.0% of the probe's scores" in caplog.text
    assert "(promised: 95%)" in caplog.text
    assert same_as_exact(found, tokenizer, guard, rows)


def test_what_cannot_be_scored_is_left_out_of_the_sample(tokenizer, guard, monkeypatch):
    own, wanted = VerdictGuard.trajectories, []

    def picky(self, requests):
        for index, request in enumerate(requests):
            if request.text.startswith("fox"):
                wanted.append(request)
                raise GuardError("no foxes", request=index)
        return own(self, requests)

    monkeypatch.setattr(VerdictGuard, "trajectories", picky)
    with pytest.raises(GuardError, match="no foxes"):
        probed(talks(), tokenizer, guard)
    found = probed(talks(), tokenizer, guard, on_guard_error="unsafe")
    assert wanted
    assert provenance_of(found)["probes"][0]["fell_back"] is None


# Several guards


def test_each_guard_of_several_learns_by_itself(tokenizer, guard, usual, tmp_path):
    other = learnable(tmp_path, tokenizer, seed=0)
    both = {"guards": [guard, other], "combine": "mean"}
    rows = talks()
    found, twin = probed(rows, tokenizer, both), exact(rows, tokenizer, both)
    notes = provenance_of(found)["probes"]
    assert [note["guard"] for note in notes] == [guard["model"], other["model"]]
    asked = trained(found, ASKED_COLUMN)
    off = np.abs(trained(found) - trained(twin))
    assert (off[asked] < 1e-5).all()
    assert (off[~asked] <= 0.05).mean() >= 0.95
    assert (asked <= trained(usual.probed, ASKED_COLUMN)).all()


def test_the_tolerance_is_one_of_calibrated_scores(tokenizer, guard, usual):
    sharp = {**guard, "calibration": {"temperature": 0.2, "threshold": 0.4}}
    rows = talks()
    found, twin = probed(rows, tokenizer, sharp), exact(rows, tokenizer, sharp)
    asked, off = trained(found, ASKED_COLUMN), np.abs(trained(found) - trained(twin))
    assert (off[asked] < 1e-4).all()
    assert not len(off[~asked]) or (off[~asked] <= 0.05).mean() >= 0.95
    # Scores that spread five times as far are less predictable: more prefixes are asked.
    assert asked.mean() > trained(usual.probed, ASKED_COLUMN).mean()


def test_a_guard_that_reads_a_response_once_learns_nothing(tokenizer):
    rows = talks(40)
    found = probed(rows, tokenizer, WordGuard())
    assert provenance_of(found)["probes"] == []
    assert (trained(found) == trained(exact(rows, tokenizer, WordGuard()))).all()


# Shards


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "talks.jsonl"
    talks().to_json(path)
    return path


def begun(data, output, guard, model=None, **changes):
    model = model or guard["model"]
    options = {**PROBED, "shard_rows": 15, **changes}
    return jobs.begin(str(data), model, output, guard=guard, **options)


def contents(folder):
    return {p.name: p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_all_shards_use_one_probe(data, guard, tmp_path, monkeypatch):
    learned, own = [], probing_guard.ProbingGuard.fit_probe
    monkeypatch.setattr(
        probing_guard.ProbingGuard,
        "fit_probe",
        lambda self, *told: learned.append(1) or own(self, *told),
    )
    job = begun(data, tmp_path / "one", guard)
    shards.score_shards(job, progress=False)
    provenance = jobs.finish(job)
    assert len(learned) == 1
    [note] = provenance["probes"]
    assert note["fell_back"] is None
    found = read_dataset(str(tmp_path / "one"))
    marks = [m for row in found[ASKED_COLUMN] for m in row]
    assert False in marks
    assert provenance["probed_prefixes"] > 0
    # Another worker with another order of shards writes the same files.
    other = begun(data, tmp_path / "two", guard)
    for index in reversed(range(other.shards)):
        scorer = shards.ShardScorer(other)
        scorer(index)
        scorer.close()
    assert jobs.finish(other) == provenance
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def test_an_error_in_the_sample_names_its_row(data, guard, tmp_path, monkeypatch, tokenizer):
    rows = read_dataset(str(data))
    bad = rows[37]["messages"][1]["content"]
    own = VerdictGuard.trajectories

    def picky(self, requests):
        for index, request in enumerate(requests):
            if request.text == bad:
                raise GuardError("no", request=index)
        return own(self, requests)

    monkeypatch.setattr(VerdictGuard, "trajectories", picky)
    job = begun(data, tmp_path / "out", guard, probe_sample=60)  # all rows are in the pool
    scorer = shards.ShardScorer(job)
    with pytest.raises(GuardError, match="Row 37"):
        scorer(1)


# The sample


def test_the_sample_takes_all_kinds_and_weighs_them(tokenizer):
    scores = {f"s{i}": 0.99 for i in range(90)} | {f"u{i}": 0.01 for i in range(6)}
    scores |= {f"m{i}": 0.5 for i in range(4)}
    weights = stratified(scores, 20)
    assert len(weights) == 20
    kinds = {kind: [w for key, w in weights.items() if key[0] == kind] for kind in "sum"}
    assert [len(kinds[kind]) for kind in "sum"] == [10, 6, 4]
    assert kinds == {"s": [9.0] * 10, "u": [1.0] * 6, "m": [1.0] * 4}
    assert sum(weights.values()) == pytest.approx(len(scores))
    assert list(weights) == [key for key in scores if key in weights]
    assert stratified(scores, 1000) == dict.fromkeys(scores, 1.0)


def test_what_is_drawn_depends_on_contents_alone():
    keys = {f"{i}": None for i in range(100)}
    assert pseudo_random_order(keys) == pseudo_random_order(dict(reversed(keys.items())))
    assert pseudo_random_order(keys) != list(keys)
    few = {key: None for key in keys if int(key) % 2}
    assert pseudo_random_order(few) == [key for key in pseudo_random_order(keys) if key in few]


def test_every_prefix_is_asked_as_often_as_any_other():
    found = [prefixes_to_score(f"{i}", 10) for i in range(4000)]
    counts = np.bincount(np.concatenate(found), minlength=10)
    assert counts == pytest.approx(np.full(10, 4000 / STRIDE), rel=0.12)
    assert found == [prefixes_to_score(f"{i}", 10) for i in range(4000)]
    assert all(len(prefixes_to_score(f"{i}", count)) > 0 for i in range(50) for count in (1, 2, 3))


def test_what_the_sample_costs(tokenizer, guard, monkeypatch):
    """The guard scores each pool response's last prefix and every fourth prefix of the sample."""
    own, wanted = VerdictGuard.trajectories, []
    monkeypatch.setattr(
        VerdictGuard,
        "trajectories",
        lambda self, requests: wanted.extend(requests) or own(self, requests),
    )
    probed(talks(), tokenizer, guard)
    said = [request for request in wanted if request.text != "a"]
    firsts, rest = said[: POOL * 30], said[POOL * 30 :]
    assert all(request.ends == (len(request.text),) for request in firsts)
    for request in rest[:30]:
        places = len(request.ends)
        assert places <= -(-len(tokenizer(request.text)["input_ids"]) // STRIDE) + 1


def test_hidden_doubles_count_once(tokenizer, guard):
    rows = talks(40)
    twice = Dataset.from_list([*rows, *rows])
    found = probed(twice, tokenizer, guard)
    assert found[SCORES_COLUMN][:40] == found[SCORES_COLUMN][40:]
    one = provenance_of(probed(rows, tokenizer, guard))
    assert provenance_of(found)["probes"] == one["probes"]


def test_the_threshold_of_the_loss_is_asked_around(tokenizer, guard, usual):
    """With τ amid the scores, many error intervals contain it, so more prefixes are asked."""
    from star_dss_trl import StarDSSConfig

    rows, middle = talks(), float(np.median(trained(usual.exact)))
    shares = []
    for threshold in (middle, 0.99):
        options = StarDSSConfig(output_dir="x", threshold=threshold, **PROBED, use_cpu=True)
        found = score_dataset(rows, tokenizer, options, guard=load_guard(guard), progress=False)
        shares.append(trained(found, ASKED_COLUMN).mean())
    assert shares[0] > shares[1]


def test_a_trainer_with_another_threshold_warns(tokenizer, usual, caplog):
    chat = ChatTokenizer(tokenizer)
    for data, threshold, warned in (
        (usual.probed, 0.5, False),
        (usual.exact, 0.7, False),
        (usual.probed, 0.7, True),
    ):
        caplog.clear()
        options = StarDSSOptions(threshold=threshold)
        prepare_dataset(data, chat, options, name="train", truncation=(None, None), progress=False)
        assert ("the threshold 0.5, and the threshold of this run is 0.7" in caplog.text) == warned


# Output


def test_reports_tell_probed_from_asked_chunks(tokenizer, guard, usual):
    found = usual.probed
    read = read_scored(found, tokenizer)
    marks = [mark for response in read.responses for mark in response.asked]
    assert {True, False} == set(marks)
    assert not read.interpolated
    page = render_page(read, name="talks")
    assert '"asked":[' in page
    assert "by a probe" in page
    mixed = next(r for r in read.responses if False in r.asked)
    shown = inspect_row(found, mixed.row, tokenizer=guard["model"])
    assert "pieces by a probe" in shown._repr_html_()
    assert "by the probe'" in shown._repr_html_()
    plain = render_page(read_scored(usual.exact, tokenizer), name="talks")
    assert '"asked"' not in plain


def test_marks_that_are_damaged_are_refused(tokenizer, guard):
    found = probed(talks(31), tokenizer, guard)
    wrong = found.remove_columns(ASKED_COLUMN).add_column(ASKED_COLUMN, [[True]] * len(found))
    with pytest.raises(Exception, match="does not hold true or false"):
        read_scored(wrong, tokenizer)


def test_a_guard_that_cannot_be_probed_is_refused_before_a_job_begins(data, model_dir, tmp_path):
    one, other = (describe(model_dir, prefill=prefill) for prefill in ("a:", "b:"))
    both = {"guards": [one, other], "calibration": {"temperature": 2.0, "threshold": 0.5}}
    with pytest.raises(ConfigError, match="Calibrate each guard by itself"):
        begun(data, tmp_path / "out", both, str(model_dir))
    found = check_options(StarDSSOptions(guard=both, trajectory="probed"))
    assert "Calibrate each guard by itself" in " ".join(found.problems)
    assert not (tmp_path / "out.incomplete").exists()
