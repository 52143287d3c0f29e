"""Per-token columns and collators: each value reaches its own token, or the batch is refused."""

import copy

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from transformers import (
    DataCollatorForLanguageModeling,
    DataCollatorForSeq2Seq,
    DataCollatorWithFlattening,
)

from star_dss_plugin import DataError
from star_dss_plugin.data.columns import REF_COLUMN, SCORES_COLUMN
from star_dss_plugin.training.rows.collation import TokenColumnsCollator

PAD = 0  # the tiny tokenizer's <|endoftext|>, a token of its texts too


def row(ids, trained, **changes):
    """Return a row whose columns identify its tokens: the score of token i is (i + 1)/100."""
    labels = [i if t else -100 for i, t in zip(ids, trained, strict=True)]
    return {
        "input_ids": list(ids),
        "labels": labels,
        SCORES_COLUMN: [(i + 1) / 100 for i in range(len(ids))],
        REF_COLUMN: [-(i + 1) / 10 for i in range(len(ids))],
        **changes,
    }


def seq2seq(tokenizer, side="right", **options):
    tokenizer = copy.copy(tokenizer)
    tokenizer.padding_side = side
    return TokenColumnsCollator(DataCollatorForSeq2Seq(tokenizer, padding=True, **options))


def trl_default(tokenizer, side="right", **options):
    """Return TRL's default collator, which pads on the right for any tokenizer."""
    trainer = pytest.importorskip("trl.trainer.sft_trainer")
    return TokenColumnsCollator(
        trainer.DataCollatorForLanguageModeling(pad_token_id=PAD, **options)
    )


@pytest.fixture(params=["seq2seq", "trl"])
def collator(request):
    return {"seq2seq": seq2seq, "trl": trl_default}[request.param]


def check(batch, features):
    """Check that each trained token has the values of its own row and position."""
    assert batch["labels"].shape == batch["input_ids"].shape
    for name, empty in ((SCORES_COLUMN, 1.0), (REF_COLUMN, 0.0)):
        assert batch[name].dtype == torch.float32
        assert batch[name].shape == batch["input_ids"].shape
        for i, feature in enumerate(features):
            ids = torch.tensor(feature["input_ids"])
            real = batch["attention_mask"][i].bool() if "attention_mask" in batch else None
            trained = batch["labels"][i] != -100
            values = torch.tensor(feature[name])
            own = torch.tensor(feature["labels"]) != -100
            assert batch[name][i][trained].tolist() == values[own].tolist()
            if real is not None and trained.any():
                assert torch.equal(batch["input_ids"][i][real], ids)
                assert batch[name][i][real].tolist() == values.tolist()
                assert batch[name][i][~real].eq(empty).all()


# Collators that only pad


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("multiple", [None, 8])
def test_columns_follow_their_tokens(tokenizer, collator, side, multiple):
    features = [
        row([5, 6, 7, 8, 9], [0, 0, 1, 1, 1]),
        row([5, 6, 7], [0, 1, 1]),
        row([9], [1]),
        row([7, 8, 9], [0, 1, 0]),
    ]
    made = collator(tokenizer, side, pad_to_multiple_of=multiple)
    batch = made(copy.deepcopy(features))
    assert batch["input_ids"].shape == (4, 5 if multiple is None else 8)
    check(batch, features)


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize(
    "ids",
    [[0, 5, 6], [5, 6, 0], [0, 0, 5], [5, 0, 0], [0, 5, 0], [0, 0, 0], [0], [0, 0]],
    ids=str,
)
def test_padding_that_looks_like_text(tokenizer, collator, side, ids):
    """The pad token also begins and ends texts: only the labels show where a row is."""
    wide = row([5, 6, 7, 8, 9, 9], [1] * 6)
    for trained in ([1] * len(ids), [0] + [1] * (len(ids) - 1), [1] + [0] * (len(ids) - 1)):
        features = [row(ids, trained), wide]
        check(collator(tokenizer, side)(copy.deepcopy(features)), features)


@pytest.mark.parametrize("side", ["right", "left"])
def test_rows_that_begin_or_end_each_other(tokenizer, collator, side):
    features = [
        row([5, 6, 5, 6, 5, 6], [0, 0, 0, 0, 1, 1]),
        row([5, 6], [1, 1]),
        row([5, 6, 5, 6], [0, 0, 1, 1]),
        row([6, 5, 6], [1, 0, 0]),
    ]
    check(collator(tokenizer, side)(copy.deepcopy(features)), features)


few = st.integers(0, 3)  # few tokens, so that rows and padding look alike


@settings(max_examples=300, deadline=None)
@given(
    st.lists(
        st.lists(st.tuples(few, st.booleans()), min_size=1, max_size=6), min_size=1, max_size=4
    ),
    st.sampled_from(["right", "left"]),
    st.sampled_from([None, 4]),
)
@example([[(0, True)], [(0, False), (0, True), (0, False)]], "left", None)
@example([[(0, False)], [(1, True), (0, True)]], "left", None)
def test_any_rows(tokenizer, rows, side, multiple):
    features = [row([i for i, _ in r], [t for _, t in r]) for r in rows]
    made = seq2seq(tokenizer, side, pad_to_multiple_of=multiple)
    check(made(copy.deepcopy(features)), features)


def test_the_inner_collators_batch_is_kept(tokenizer):
    features = [row([5, 6, 7], [0, 1, 1]), row([5, 6], [0, 1])]
    seen = []

    def inner(rows):
        seen.append([sorted(r) for r in rows])
        return DataCollatorForSeq2Seq(tokenizer)(rows) | {"extra": "kept"}

    batch = TokenColumnsCollator(inner)(features)
    assert seen == [[["input_ids", "labels"]] * 2]  # the inner collator never gets our columns
    assert batch["extra"] == "kept"
    assert sorted(features[0]) == sorted(row([1], [1]))  # and they are kept
    assert set(batch) == {
        "input_ids",
        "labels",
        "attention_mask",
        "extra",
        SCORES_COLUMN,
        REF_COLUMN,
    }


def test_scores_alone(tokenizer):
    feature = row([5, 6], [0, 1])
    del feature[REF_COLUMN]
    batch = seq2seq(tokenizer)([feature])
    assert batch[SCORES_COLUMN].tolist() == [[pytest.approx(0.01), pytest.approx(0.02)]]
    assert REF_COLUMN not in batch


def test_without_scores_nothing_is_added(tokenizer):
    feature = {k: v for k, v in row([5, 6], [0, 1]).items() if k in ("input_ids", "labels")}
    assert SCORES_COLUMN not in seq2seq(tokenizer)([feature])


def test_rows_of_tensors(tokenizer):
    features = [row([5, 6, 7], [0, 1, 1]), row([0, 5], [1, 1])]
    as_tensors = [{k: torch.tensor(v) for k, v in f.items()} for f in features]

    def inner(rows):
        plain = [{k: v.tolist() for k, v in r.items()} for r in rows]
        return DataCollatorForSeq2Seq(tokenizer)(plain)

    check(TokenColumnsCollator(inner)(as_tensors), features)


# Collators that also change rows


def truncating(rows):
    return {
        "input_ids": torch.tensor([r["input_ids"][:2] for r in rows]),
        "labels": torch.tensor([r["labels"][:2] for r in rows]),
    }


def shuffling(rows):
    return {
        "input_ids": torch.tensor([r["input_ids"] for r in rows[::-1]]),
        "labels": torch.tensor([r["labels"] for r in rows[::-1]]),
    }


def flattening(rows):
    return {
        "input_ids": torch.tensor([[i for r in rows for i in r["input_ids"]]]),
        "labels": torch.tensor([[i for r in rows for i in r["labels"]]]),
    }


def shifting(rows):
    return {
        "input_ids": torch.tensor([r["input_ids"] for r in rows]),
        "labels": torch.tensor([[*r["labels"][1:], -100] for r in rows]),
    }


def training_all(rows):
    return {key: torch.tensor([r["input_ids"] for r in rows]) for key in ("input_ids", "labels")}


def centring(rows):
    return {
        "input_ids": torch.tensor([[PAD, *r["input_ids"], PAD] for r in rows]),
        "labels": torch.tensor([[-100, *r["labels"], -100] for r in rows]),
    }


def noising(rows):
    return {
        "input_ids": torch.tensor([[1, *r["input_ids"][1:]] for r in rows]),
        "labels": torch.tensor([r["labels"] for r in rows]),
    }


def unlabelled(rows):
    return {"input_ids": torch.tensor([r["input_ids"] for r in rows])}


def dropping(rows):
    return {key: torch.tensor([r[key] for r in rows[:1]]) for key in ("input_ids", "labels")}


@pytest.mark.parametrize(
    "inner",
    [
        truncating,
        shuffling,
        flattening,
        shifting,
        training_all,
        centring,
        noising,
        unlabelled,
        dropping,
    ],
)
def test_collators_that_move_tokens_or_labels_are_refused(inner):
    features = [row([5, 6, 7], [0, 1, 1]), row([8, 9, 5], [0, 0, 1])]
    with pytest.raises(DataError, match="does not keep the scored tokens in place"):
        TokenColumnsCollator(inner)(features)


def trl_flattening():
    trainer = pytest.importorskip("trl.trainer.sft_trainer")
    return trainer.DataCollatorForLanguageModeling(pad_token_id=PAD, padding_free=True)


@pytest.mark.parametrize("inner", [DataCollatorWithFlattening, trl_flattening])
@pytest.mark.parametrize("masks", [[[0, 1, 1], [0, 0, 1]], [[1, 1, 1], [1, 0, 1]], [[1, 1, 1]]])
def test_joined_rows_are_not_predicted_from_each_other(inner, masks):
    features = [row([5 + i, 6, 7], mask) for i, mask in enumerate(masks)]
    batch = TokenColumnsCollator(inner())(copy.deepcopy(features))
    assert batch["input_ids"].shape[0] == 1
    for name in (SCORES_COLUMN, REF_COLUMN):
        expected = torch.cat([torch.as_tensor(f[name]) for f in features])
        assert torch.equal(batch[name][0], expected.float())
    assert (batch["labels"][0, ::3] == -100).all()


def test_joined_rows_that_see_each_other_are_refused():
    """Labels as of separate rows, positions as of one text."""
    inner = DataCollatorWithFlattening(return_position_ids=False)
    features = [row([5, 6, 7], [0, 1, 1]), row([8, 9, 5], [0, 0, 1])]
    with pytest.raises(DataError, match="1 sequences of 2 rows"):
        TokenColumnsCollator(inner)(features)


@pytest.mark.parametrize("mlm", [False, True])
def test_a_collator_that_makes_its_own_labels_is_refused(tokenizer, mlm):
    """DataCollatorForLanguageModeling trains prompts, and no pad token even within a text."""
    tokenizer = copy.copy(tokenizer)
    tokenizer.mask_token = "<|im_start|>"
    torch.manual_seed(0)
    inner = DataCollatorForLanguageModeling(tokenizer, mlm=mlm, mlm_probability=0.9)
    for features in ([row([5, 6, 7], [0, 1, 1])], [row([5, 6, 0], [1, 1, 1])]):
        with pytest.raises(DataError, match="makes its own labels"):
            TokenColumnsCollator(inner)(features)


def test_a_collator_that_makes_the_same_labels_is_not(tokenizer):
    inner = DataCollatorForLanguageModeling(tokenizer, mlm=False)
    features = [row([5, 6, 7], [1, 1, 1])]
    check(TokenColumnsCollator(inner)(copy.deepcopy(features)), features)


# Columns that do not fit


@pytest.mark.parametrize("name", [SCORES_COLUMN, REF_COLUMN])
@pytest.mark.parametrize("length", [0, 2, 4])
def test_one_value_per_token(tokenizer, name, length):
    feature = row([5, 6, 7], [0, 1, 1]) | {name: [0.5] * length}
    with pytest.raises(DataError, match=f"3 tokens and {length} {name}"):
        seq2seq(tokenizer)([feature])


def test_every_row_has_the_columns(tokenizer):
    features = [row([5, 6, 7], [0, 1, 1]), row([5, 6, 7], [0, 1, 1])]
    del features[1][SCORES_COLUMN]
    for order in (features, features[::-1]):
        with pytest.raises(DataError, match="no 'star_scores'"):
            seq2seq(tokenizer)(order)
