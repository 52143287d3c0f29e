"""Combined and calibrated guards, and responses that no guard could score."""

import logging
import math

import numpy as np
import pytest
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from support.guards import WordGuard
from support.scoring import batches_of_three

from star_dss_plugin import ConfigError, GuardError, load_guard, provenance_of, score_dataset
from star_dss_plugin.data.requests import PrefixRequest, Trajectory
from star_dss_plugin.guards.adaptive import AdaptiveGuard
from star_dss_plugin.guards.base import Guard
from star_dss_plugin.guards.combined import (
    CalibratedGuard,
    EnsembleGuard,
    calibrate,
    single_guards,
)
from star_dss_plugin.options import StarDSSOptions
from star_dss_plugin.report.reading import read_scored

BAD = {"preset": "test-words", "word": "bad", "safe": 0.9, "unsafe": 0.2}
FOX = {"preset": "test-words", "word": "fox", "safe": 0.8, "unsafe": 0.4}
TEXT = "the bad quick fox jumps"


def talk(text=TEXT):
    return [{"role": "user", "content": "how are you?"}, {"role": "assistant", "content": text}]


def rows(*texts):
    return Dataset.from_list([{"messages": talk(text)} for text in texts])


def scored(tokenizer, guard, *texts, **options):
    data = rows(*(texts or (TEXT, "hello world. i am fine")))
    return score_dataset(data, tokenizer, guard=guard, chunk_size=1, progress=False, **options)


@pytest.mark.parametrize("how", ["mean", "min"])
def test_an_ensemble_is_the_mean_or_the_minimum(tokenizer, how):
    one, two = (np.concatenate(scored(tokenizer, g)["star_scores"]) for g in (BAD, FOX))
    both = scored(tokenizer, {"guards": [BAD, FOX], "combine": how})
    expected = (one + two) / 2 if how == "mean" else np.minimum(one, two)
    np.testing.assert_allclose(np.concatenate(both["star_scores"]), expected, atol=1e-7)
    assert provenance_of(both)["guard"] == f"{how}(test-words, test-words)"
    assert len(set(expected.tolist())) > 2


def test_one_guard_at_a_time_is_in_memory(tokenizer):
    events = []

    class RecordingGuard(WordGuard):
        def token_scores(self, responses):
            events.append(("asks", self.word))
            return super().token_scores(responses)

        def close(self):
            events.append(("frees", self.word))

    def of(word):
        return [event for event, name in events if name == word]

    ensemble = EnsembleGuard([RecordingGuard(word="bad"), RecordingGuard(word="fox")])
    score_dataset(rows(TEXT, "a fox"), tokenizer, guard=ensemble, progress=False)
    assert events == [("asks", "bad")] * 2 + [("frees", "bad")] + [("asks", "fox")] * 2 + [
        ("frees", "fox")
    ]
    events.clear()
    ensemble.score([talk(), talk("a fox")])
    assert of("bad")[-1] == of("fox")[-1] == "frees"
    assert events.index(("frees", "bad")) < events.index(("asks", "fox"))


def test_scores_of_a_member_are_cached_for_that_guard(tokenizer):
    scored(tokenizer, BAD)
    WordGuard.loads = 0
    scored(tokenizer, {"guards": [BAD, FOX]})
    assert WordGuard.loads == 2  # one batch per response, of the second guard only
    scored(tokenizer, {"guards": [FOX, BAD], "combine": "min"})
    scored(tokenizer, {**BAD, "calibration": {"temperature": 2.0, "threshold": 0.3}})
    assert WordGuard.loads == 2


def test_per_guard_adds_a_column_for_each_guard(tokenizer):
    ensemble = {"guards": [BAD, FOX]}
    assert "star_scores" in scored(tokenizer, ensemble).column_names
    assert not any("star_scores_" in name for name in scored(tokenizer, ensemble).column_names)
    found = scored(tokenizer, ensemble, per_guard=True)
    for name, guard in (("test-words", BAD), ("test-words#2", FOX)):
        alone = scored(tokenizer, guard)
        assert found[f"star_scores_{name}"] == alone["star_scores"][:]
    assert provenance_of(found) == provenance_of(scored(tokenizer, ensemble))
    assert (
        scored(tokenizer, BAD, per_guard=True).column_names == scored(tokenizer, BAD).column_names
    )


def test_disagreement_is_reported(tokenizer, caplog):
    with caplog.at_level(logging.INFO):
        found = scored(tokenizer, {"guards": [BAD, FOX]})
    note = provenance_of(found)
    assert note["members"]["test-words"]["label_mass"] is None
    assert sorted(note["members"]) == ["test-words", "test-words#2"]
    assert 0.1 < note["disagreement"]["mean"] < note["disagreement"]["p95"] < 0.61
    assert 0 < note["disagreement"]["opposite"] < 1
    assert "apart on average" in caplog.text
    assert "disagreement" not in provenance_of(scored(tokenizer, BAD))


def test_disagreement_equals_figures_computed_by_hand():
    from star_dss_plugin.scoring.guard_statistics import member_notes, remarks

    members = {
        "a": {"x": Trajectory((0.9, 0.1)), "y": Trajectory((0.5,), (0.7,))},
        "b": {"x": Trajectory((0.7, 0.7)), "y": Trajectory((0.5,))},
    }
    note = member_notes(members, ["x", "y", "y"])  # a response that occurs twice counts twice
    assert note["disagreement"]["mean"] == pytest.approx((0.2 + 0.6 + 0 + 0) / 4)
    assert note["disagreement"]["opposite"] == 0.25
    assert note["members"]["a"]["mean_prefix_score"] == pytest.approx((0.9 + 0.1 + 0.5 + 0.5) / 4)
    assert note["members"]["a"]["label_mass"]["mean"] == pytest.approx(0.7)
    assert remarks(note) == [
        "the guards' scores are 0.200 apart on average; 25.0% of the prefixes are safe to one and "
        "unsafe to another"
    ]


def test_adaptive_asks_each_member_adaptively(model_dir, tokenizer):
    options = {"self_check": False, "min_label_mass": 0.0, "device": "cpu"}
    one = {
        "model": str(model_dir),
        "prefill": "x:",
        "safe_labels": [" good"],
        "unsafe_labels": [" bad"],
        **options,
    }
    both = {"guards": [one, {**one, "prefill": "y:"}]}
    exact = scored(tokenizer, both)
    found = scored(tokenizer, both, trajectory="adaptive", trajectory_epsilon=0.0)
    np.testing.assert_allclose(
        np.concatenate(found["star_scores"]), np.concatenate(exact["star_scores"]), atol=1e-5
    )
    assert read_scored(found, tokenizer).interpolated
    assert not read_scored(exact, tokenizer).interpolated
    parts = provenance_of(found)["guard_identity"]["guards"]
    assert all("trajectory" in part for part in parts)


@pytest.mark.parametrize(
    ("guard", "message"),
    [
        ({"guards": [BAD]}, "needs two guards or more, not 1"),
        ({"guards": []}, "needs two guards or more, not 0"),
        ({"guards": [BAD, BAD]}, "same guard twice"),
        ({"guards": [BAD, FOX], "combine": "median"}, "Unknown combine 'median'"),
        ({"guards": [BAD, FOX], "preset": "demo"}, "takes a list of guards"),
        ({"guards": "demo"}, "takes a list of guards"),
        ({"guards": [BAD, "test-wrods"]}, "Did you mean 'test-words'"),
        ({"guards": [BAD, FOX], "word": "x"}, "cannot be used.*word"),
        ({**BAD, "calibration": {"temperature": 0}}, "temperature is 0"),
        ({**BAD, "calibration": {"temperature": math.inf}}, "temperature is inf"),
        ({**BAD, "calibration": {"temperature": math.nan}}, "temperature is nan"),
        ({**BAD, "calibration": {"temperature": "2"}}, "temperature is '2'"),
        ({**BAD, "calibration": {"threshold": 0}}, "threshold is 0"),
        ({**BAD, "calibration": {"threshold": 1}}, "threshold is 1"),
        ({**BAD, "calibration": {"threshold": 1e-9}}, "threshold is 1e-09"),
        ({**BAD, "calibration": {"what": 1}}, "cannot be used.*what"),
        ({"preset": "demo", "what": 1, "target": 2}, "cannot be used.*what"),
        ({**BAD, "calibration": {"thresold": 0.5}}, "cannot be used.*thresold"),
        ({**BAD, "calibration": 2}, "calibration is 2"),
    ],
    ids=str,
)
def test_invalid_combinations_are_refused(guard, message):
    with pytest.raises(ConfigError, match=message):
        load_guard(guard)


def test_options_are_checked_before_anything_is_loaded():
    StarDSSOptions(guard={"guards": [BAD, FOX], "calibration": {"threshold": 0.4}}).validate()
    with pytest.raises(ConfigError, match="Did you mean 'test-words'"):
        StarDSSOptions(guard={"guards": [BAD, "test-word"]}).validate()
    with pytest.raises(ConfigError, match="Unknown on_guard_error 'safe'"):
        StarDSSOptions(on_guard_error="safe").validate()


# Calibration


@given(
    st.floats(0, 1),
    st.floats(1e-3, 1e3),
    st.floats(1e-6, 1 - 1e-6),
)
def test_calibrated_scores_are_probabilities_in_the_same_order(p, temperature, threshold):
    found = calibrate(p, temperature, threshold)
    assert 0 <= found <= 1
    assert calibrate(threshold, temperature, threshold) == pytest.approx(0.5)
    assert (found >= 0.5) == (p >= threshold) or math.isclose(p, threshold)
    assert calibrate(min(1.0, p + 0.1), temperature, threshold) >= found


@given(st.floats(0.01, 0.99), st.floats(0.2, 5), st.floats(0.05, 0.95))
def test_calibrated_scores_by_the_formula(p, temperature, threshold):
    def logit(x):
        return math.log(x / (1 - x))

    expected = 1 / (1 + math.exp(-(logit(p) - logit(threshold)) / temperature))
    assert calibrate(p, temperature, threshold) == pytest.approx(expected)
    assert calibrate(p, 1, 0.5) == pytest.approx(p)


def test_a_guard_that_rounds_to_0_and_1_is_calibrated_too():
    """Hard verdicts that are right in four of five cases."""
    from star_dss_plugin.scoring.calibration import fit_calibration

    scores, labels = [0.0, 1.0] * 100, [0, 1] * 80 + [1, 0] * 20
    numbers = fit_calibration(scores, labels)
    assert calibrate(1.0, *numbers) == pytest.approx(0.8, abs=0.01)
    assert calibrate(0.0, *numbers) == pytest.approx(0.2, abs=0.01)


def test_a_calibrated_guard(tokenizer):
    plain = scored(tokenizer, BAD)
    found = scored(tokenizer, {**BAD, "calibration": {"temperature": 2.0, "threshold": 0.3}})
    for row, other, labels in zip(found["star_scores"], plain["star_scores"], found["labels"]):
        for new, old, label in zip(row, other, labels):
            expected = 1.0 if label == -100 else calibrate(old, 2.0, 0.3)
            assert new == pytest.approx(expected, abs=1e-6)
    identity = provenance_of(found)["guard_identity"]
    assert (identity["temperature"], identity["threshold"]) == (2.0, 0.3)
    whole = {
        "guards": [BAD, {**FOX, "calibration": {"threshold": 0.6}}],
        "calibration": {"temperature": 0.5},
    }
    guard = load_guard(whole)
    expected = calibrate((0.2 + calibrate(0.4, 1.0, 0.6)) / 2, 0.5, 0.5)
    assert guard.score([talk()]) == pytest.approx([expected])
    assert [leaf.word for leaf in single_guards(guard)] == ["bad", "fox"]


# Responses that cannot be scored


class FailingGuard(Guard):
    """Fail on some texts, and name them in the error."""

    name = "test-choosy"

    def __init__(self, bad=("second",), names=True):
        self.bad, self.names, self.asked = bad, names, []

    @property
    def identity(self):
        return {"kind": "choosy", "bad": list(self.bad)}

    def plan(self, requests):
        return batches_of_three(requests)

    def trajectories(self, requests):
        self.asked.append([r.text for r in requests])
        for i, request in enumerate(requests):
            if request.text in self.bad:
                raise GuardError("no", request=i if self.names else None)
        return [Trajectory((0.75,) * len(r.ends)) for r in requests]


TEXTS = ("first", "second", "third", "fourth", "second", "sixth")


def trained(dataset):
    return [
        {s for s, label in zip(row["star_scores"], row["labels"]) if label != -100}
        for row in dataset
    ]


def test_a_guard_error_stops_scoring_by_default(tokenizer):
    with pytest.raises(GuardError, match="^Row 1: no"):
        scored(tokenizer, FailingGuard(), *TEXTS)


def test_a_guard_error_counts_as_unsafe_on_request(tokenizer, caplog):
    guard = FailingGuard()
    found = scored(tokenizer, guard, *TEXTS, on_guard_error="unsafe")
    assert trained(found) == [{0.75}, {0.0}, {0.75}, {0.75}, {0.0}, {0.75}]
    assert provenance_of(found)["guard_errors"] == 2
    assert guard.asked == [["first", "second", "third"], ["first", "third"], ["fourth", "sixth"]]
    assert "Row 1 counts as unsafe: no" in caplog.text
    # An error is not cached: the next run asks the guard again.
    better = FailingGuard()
    better.bad = ()
    assert type(better).identity.fget(better) != guard.identity
    again = FailingGuard()
    scored(tokenizer, again, *TEXTS, on_guard_error="unsafe")
    assert again.asked == [["first", "second", "third"], ["first", "third"]]
    with pytest.raises(GuardError, match="^Row 1: no"):
        scored(tokenizer, FailingGuard(), *TEXTS)


def test_an_error_of_one_member_makes_the_response_unsafe(tokenizer):
    for how in ("mean", "min"):
        ensemble = EnsembleGuard([FailingGuard(), WordGuard(), FailingGuard(bad=("sixth",))], how)
        found = scored(tokenizer, ensemble, *TEXTS, on_guard_error="unsafe")
        assert [max(s) > 0 for s in trained(found)] == [True, False, True, True, False, False]
        assert provenance_of(found)["guard_errors"] == 3


def test_a_member_keeps_its_scores_if_another_member_fails(tokenizer):
    """Its scores are kept if another guard failed, under a name of its own."""
    first = EnsembleGuard([CalibratedGuard(FailingGuard()), WordGuard()])
    second = EnsembleGuard([CalibratedGuard(WordGuard(word="fox")), WordGuard(word="sixth")])
    outer = EnsembleGuard([first, CalibratedGuard(second, 2.0)])
    found = scored(tokenizer, outer, *TEXTS, on_guard_error="unsafe", per_guard=True)

    def column(name):
        return trained(found.remove_columns("star_scores").rename_column(name, "star_scores"))

    unknown = [False, True, False, False, True, False]
    for name in ("star_scores_test-choosy", "star_scores_mean(test-choosy, test-words)"):
        assert [s == {0.0} for s in column(name)] == unknown
    words = [f"star_scores_test-words{n}" for n in ("", "#2", "#3")]
    words.append("star_scores_mean(test-words, test-words)")
    for name in words:
        assert not any(s == {0.0} for s in column(name))
    assert [s == {0.0} for s in trained(found)] == unknown


def test_an_error_that_names_no_response_stops_scoring(tokenizer):
    with pytest.raises(GuardError, match="^Row 0, 1, 2: no"):
        scored(tokenizer, FailingGuard(names=False), *TEXTS, on_guard_error="unsafe")


def test_a_guard_that_can_score_nothing_is_an_error(tokenizer):
    with pytest.raises(GuardError, match="could not score a single one of 5"):
        scored(tokenizer, FailingGuard(bad=TEXTS), *TEXTS, on_guard_error="unsafe")


@settings(max_examples=20)
@given(st.lists(st.sampled_from(["a", "bb", "ccc"]), max_size=7))
def test_errors_name_the_request_also_through_a_combination(texts):
    requests = [PrefixRequest((), text, (len(text),)) for text in texts]
    guard = CalibratedGuard(EnsembleGuard([WordGuard(), FailingGuard(bad=("ccc",))]))
    if "ccc" not in texts:
        assert len(guard.trajectories(requests)) == len(texts)
        return
    with pytest.raises(GuardError) as caught:
        guard.trajectories(requests)
    assert caught.value.request == texts.index("ccc")


def test_adaptive_guards_ask_the_inner_guard():
    class Short(FailingGuard):
        markers = WordGuard.markers
        min_label_mass = 0.3

        def truncates(self, request):
            return request.text == "long"

    guard = AdaptiveGuard(Short())
    assert guard.truncates(PrefixRequest((), "long", (1,)))
    assert not guard.truncates(PrefixRequest((), "x", (1,)))
    assert (guard.min_label_mass, guard.markers) == (0.3, Short.markers)
