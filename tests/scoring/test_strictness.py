"""Stricter scores and the warm-up of λ: their properties, their values, and training with them."""

import itertools
import math

import numpy as np
import pytest
from datasets import concatenate_datasets
from hypothesis import given
from hypothesis import strategies as st
from support.scoring import unbound

from star_dss_plugin import ConfigError, DataError
from star_dss_plugin.loss import Shaping
from star_dss_plugin.options import StarDSSOptions
from star_dss_plugin.scoring.strictness import stricter_scores

UNIT = st.floats(0, 1, width=32)
RULES = st.fixed_dictionaries(
    {"threshold": UNIT, "unsafe_lookahead": st.integers(0, 9), "monotone": st.booleans()}
)


@given(scores=st.lists(UNIT, max_size=12), rules=RULES)
def test_scores_are_only_lowered_and_only_around_harm(scores, rules):
    found = stricter_scores(scores, **rules)
    assert len(found) == len(scores)
    assert all(a <= b for a, b in zip(found, scores, strict=True))
    first = next((k for k, s in enumerate(scores) if s < rules["threshold"]), len(scores))
    untouched = max(0, first - rules["unsafe_lookahead"])
    assert found[:untouched] == scores[:untouched]
    if first == len(scores):
        assert found == scores
        return
    assert found[first] == scores[first]
    assert all(s <= scores[first] for s in found[untouched:first])
    if rules["monotone"]:
        assert all(a >= b for a, b in itertools.pairwise(found[first:]))
        assert all(s < rules["threshold"] for s in found[first:])
    else:
        assert found[first:] == scores[first:]


def test_stricter_scores_of_an_example():
    scores = [1.0, 0.9, 0.8, 0.3, 0.9, 0.1, 0.7]
    rules = {"threshold": 0.5, "unsafe_lookahead": 2, "monotone": True}
    assert stricter_scores(scores, **rules) == [1.0, 0.3, 0.3, 0.3, 0.3, 0.1, 0.1]


@given(step=st.integers(0, 50), steps=st.integers(0, 20), kl_coef=st.floats(0, 10))
def test_the_warm_up_rises_to_kl_coef(step, steps, kl_coef):
    shaping = Shaping.named("star_dss", kl_coef=kl_coef, threshold=0.5)
    now, later = (shaping.at_step(s, steps).kl_coef for s in (step, step + 1))
    assert 0 <= now <= later <= kl_coef
    if step + 1 >= steps:
        assert now == kl_coef
    elif kl_coef > 1e-300:
        assert 0 < now < kl_coef


@pytest.mark.parametrize("value", [math.inf, math.nan, True, "0.5"])
@pytest.mark.parametrize("name", ["kl_coef", "threshold", "trajectory_epsilon"])
def test_options_that_are_no_finite_number_are_refused(name, value):
    with pytest.raises(ConfigError, match=f"{name} is {value!r}; it must be a "):
        StarDSSOptions(guard="demo", **{name: value}).validate()


@pytest.mark.parametrize("name", ["kl_warmup_steps", "unsafe_lookahead"])
@pytest.mark.parametrize("value", [-1, 0.5, True])
def test_options_that_are_no_count_are_refused(name, value):
    with pytest.raises(ConfigError, match=f"{name} is {value}"):
        StarDSSOptions(guard="demo", **{name: value}).validate()


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("trajectory_epsilon", None, "trajectory_epsilon is None"),
        ("monotone", "no", "monotone is 'no'; it must be true or false"),
        ("score_eval", 0, "score_eval is 0; it must be true or false"),
        ("loss_type", ["star_dss"], "loss_type is .*; it must be a text"),
        ("segmenter", {}, "segmenter is {}; it must be a text"),
        ("reference", 5, "reference is 5; it must be a text"),
        ("reference", "x" * 5000, "Unknown reference"),
        ("guard_device", 0, "guard_device is 0; it must be a text, or nothing"),
        ("kl_coef", float("inf"), "kl_coef is inf; it must be a finite number"),
        ("kl_coef", 10**400, "it must be a finite number"),
        ("chunk_size", 2**63, "chunk_size is 9223372036854775808"),
        ("guard", "{" + '"a":{' * 3000, "is not valid JSON"),
        ("guard", '{"a": ' + "9" * 5000 + "}", "is not valid JSON"),
        ("guard", {1: 2}, "guard has the key 1"),
        ("guard", {"preset": "demo", "calibration": {1: 2}}, "calibration is {1: 2}"),
        ("engine_options", '{"a":' * 3000, "engine_options is not valid JSON"),
    ],
)
def test_options_of_the_wrong_kind_are_refused(name, value, message):
    with pytest.raises(ConfigError, match=message):
        StarDSSOptions(**{"guard": "demo", name: value}).validate()


def test_numpy_numbers_are_accepted():
    StarDSSOptions(
        guard="demo", threshold=np.float32(0.5), kl_coef=np.float64(0.1), chunk_size=np.int64(3)
    ).validate()


def scores_by_chunk(trainer):
    """Return the scores of each row's trained tokens, one per chunk of two tokens."""
    for row in trainer.train_dataset:
        pairs = zip(row["star_scores"], row["labels"], strict=True)
        yield [round(score, 3) for score, label in pairs if label != -100][::2]


def test_a_trainer_lowers_the_scores_of_its_data(tmp_path, tokenizer):
    pytest.importorskip("trl")
    from support.trl_runs import tiny_trainer

    plain = tiny_trainer(tmp_path, tokenizer)
    strict = tiny_trainer(tmp_path, tokenizer, unsafe_lookahead=1, monotone=True)
    changed = 0
    for given_scores, found in zip(scores_by_chunk(plain), scores_by_chunk(strict), strict=True):
        expected = stricter_scores(given_scores, threshold=0.5, unsafe_lookahead=1, monotone=True)
        assert found == expected
        changed += found != given_scores
    assert changed


def test_the_loss_follows_the_warm_up(tmp_path, tokenizer):
    pytest.importorskip("trl")
    from support.trl_runs import tiny_trainer

    odds = []
    for steps in (0, 3):
        trainer = tiny_trainer(tmp_path, tokenizer, kl_warmup_steps=steps, max_steps=4)
        trainer.train()
        lines = [h for h in trainer.state.log_history if "grad_norm" in h]
        mass = [line["star_dss/kl_weight_mass"] for line in lines]
        odds.append([m / (1 - m) for m in mass])
    plain, warm = odds
    factors = [a / b for a, b in zip(warm, plain, strict=True)]
    assert factors == pytest.approx([1 / 3, 2 / 3, 1, 1])


def test_scores_are_not_lowered_twice(tmp_path, tokenizer):
    pytest.importorskip("trl")
    from support.trl_runs import tiny_trainer

    first = tiny_trainer(tmp_path, tokenizer, unsafe_lookahead=1)
    again = tiny_trainer(tmp_path, tokenizer, first.train_dataset, unsafe_lookahead=1)
    assert list(scores_by_chunk(again)) == list(scores_by_chunk(first))
    with pytest.raises(DataError, match="lowered before"):
        tiny_trainer(tmp_path, tokenizer, first.train_dataset, unsafe_lookahead=2)
    with pytest.raises(DataError, match="lowered before"):
        tiny_trainer(tmp_path, tokenizer, first.train_dataset)


def test_scored_data_that_a_trainer_cut_can_be_given_to_another(tmp_path, tokenizer):
    pytest.importorskip("trl")
    from support.trl_runs import tiny_trainer

    scored = tiny_trainer(tmp_path, tokenizer).train_dataset
    most = max(map(len, scored["input_ids"])) - 1
    first = tiny_trainer(tmp_path, tokenizer, scored, max_length=most)
    assert max(map(len, first.train_dataset["star_scores"])) == most
    again = tiny_trainer(tmp_path, tokenizer, first.train_dataset, max_length=most)
    assert list(scores_by_chunk(again)) == list(scores_by_chunk(first))


def test_scores_of_unknown_chunks_cannot_be_lowered(tmp_path, tokenizer):
    pytest.importorskip("trl")
    from support.trl_runs import tiny_trainer

    scored = tiny_trainer(tmp_path, tokenizer).train_dataset
    scored.info.description = ""
    with pytest.raises(DataError, match="does not say"):
        tiny_trainer(tmp_path, tokenizer, scored, monotone=True)


def test_rows_with_other_chunks_than_scored_are_refused(tmp_path, tokenizer):
    pytest.importorskip("trl")
    from support.trl_runs import tiny_trainer

    scored = tiny_trainer(tmp_path, tokenizer).train_dataset
    later = scored.map(lambda row: {"labels": without_first_label(row["labels"])})
    with pytest.raises(DataError, match="not as it was scored"):
        tiny_trainer(tmp_path, tokenizer, later, monotone=True)
    unbound(later)  # as in shards that another process reads
    with pytest.raises(DataError, match="not cut as they were"):
        tiny_trainer(tmp_path, tokenizer, later, monotone=True)
    joined = concatenate_datasets(
        [scored, tiny_trainer(tmp_path, tokenizer, chunk_size=3).train_dataset]
    )
    with pytest.raises(DataError, match="scored separately"):
        tiny_trainer(tmp_path, tokenizer, joined, monotone=True)


def without_first_label(labels):
    """Return labels of which the first trained one is masked."""
    first = next(i for i, label in enumerate(labels) if label != -100)
    return [*labels[:first], -100, *labels[first + 1 :]]


def test_evaluation_uses_the_full_kl_coef(tmp_path, tokenizer):
    pytest.importorskip("trl")
    from support.trl_runs import prompt_completion, tiny_trainer

    found = []
    for steps in (0, 9):
        trainer = tiny_trainer(tmp_path, tokenizer, kl_warmup_steps=steps)
        trainer.evaluate(prompt_completion())
        found.append(trainer.state.log_history[-1]["eval_star_dss/kl_weight_mass"])
    assert found[0] == found[1] > 0
