"""Fuzz target for changed scored rows: a run stops, or its loss uses each token's own score.

Rows are changed before the trainer gets them, after it has checked them, or in its collator.
Changed scores are accepted only if the data set's description, which holds the digests of its rows,
is removed too.
"""

import contextlib
import functools
import math
import tempfile
from unittest import mock

import numpy as np
from datasets import Dataset, Features, List, Value
from hypothesis import strategies as st
from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments

from star_dss_plugin import attach, score_dataset
from star_dss_plugin.data.columns import SCORES_COLUMN
from star_dss_plugin.errors import StarDSSError
from star_dss_plugin.training.mixin import StarDSSMixin
from support.fuzz_inputs import tokenizer
from support.fuzz_places import check_words
from support.fuzzing import Target
from support.guards import WordGuard
from support.models import tiny_llama

ANSWERS = ["fine", "a bad word is bad", "good words", "is this bad? no!", "hello world"]
COLUMNS = ("input_ids", "labels", SCORES_COLUMN)


@functools.cache
def scored():
    """Return the unchanged scored rows."""
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"how are you? {i}"},
                {"role": "assistant", "content": answer},
            ]
        }
        for i, answer in enumerate(ANSWERS)
    ]
    with tempfile.TemporaryDirectory() as cache:
        return score_dataset(
            Dataset.from_list(rows),
            tokenizer(),
            guard=WordGuard(),
            chunk_size=2,
            score_cache_dir=cache,
            progress=False,
        )


def trained(labels, scores):
    """Return the labels of a row's trained tokens, and their scores."""
    pairs = [(label, score) for label, score in zip(labels, scores, strict=True) if label != -100]
    return tuple(label for label, _ in pairs), [score for _, score in pairs]


def truth(rows):
    """Return the scores of each row's trained tokens, by the row's token ids and trained labels."""
    return {
        (tuple(row["input_ids"]), trained(row["labels"], row[SCORES_COLUMN])[0]): trained(
            row["labels"], row[SCORES_COLUMN]
        )[1]
        for row in rows
    }


values = st.sampled_from(
    [0.0, 1.0, 0.1, 0.5, 0.9, 1, 0, True, -0.1, 1.5, 7.0, math.nan, math.inf, -math.inf, None]
)
WHOLE = ["nothing", "permute rows", "double", "permute scores", "swap scores", "other notes"]
ROW = ["value", "fill", "shift", "cut scores", "longer", "cut tokens", "cut row", "other tokens"]
LABELS = ["train all", "train less", "train none", "wrong labels"]
TYPES = ["float64", "float16", "int64", "bool", "string", "nested", "large", "fixed"]
NOTES = ["forget notes", "damage notes"]


@st.composite
def changes(draw):
    """Draw one or two changes of the rows, and when they are made."""
    kinds = st.sampled_from([*WHOLE, *ROW, *LABELS, *TYPES, *NOTES])
    change = st.tuples(kinds, st.integers(0, 4), st.integers(0, 40), values)
    when = draw(st.sampled_from(["before", "before", "after", "collated", "evaluation"]))
    return when, draw(st.lists(change, min_size=1, max_size=2))


def changed(rows, kind, i, k, value):
    """Return rows with one change; `as_dataset` changes types and the description."""
    rows = [dict(row) for row in rows]
    i %= len(rows)
    row, other = rows[i], rows[k % len(rows)]
    ids, labels, scores = (list(row[name]) for name in COLUMNS)
    if kind == "permute rows":
        return rows[i:] + rows[:i]
    if kind == "double":
        return rows + rows
    if kind == "permute scores":
        moved = [one[SCORES_COLUMN] for one in rows]
        moved = moved[i or 1 :] + moved[: i or 1]
        return [{**one, SCORES_COLUMN: s} for one, s in zip(rows, moved, strict=True)]
    if kind == "swap scores":
        row[SCORES_COLUMN], other[SCORES_COLUMN] = other[SCORES_COLUMN], row[SCORES_COLUMN]
        return rows
    if kind == "value" and scores:
        scores[k % len(scores)] = value
    elif kind == "fill":
        scores = [value] * len(scores)
    elif kind == "shift":
        scores = scores[1:] + scores[:1]
    elif kind == "cut scores":
        scores = scores[:-1]
    elif kind == "longer":
        scores = [*scores, 0.5]
    elif kind == "cut tokens":
        ids = ids[:-1]
    elif kind == "cut row":
        ids, labels, scores = ids[:-2], labels[:-2], scores[:-2]
    elif kind == "other tokens":  # as another tokenizer makes them
        ids = [(token * 7 + k) % 400 for token in ids]
        labels = [label if label == -100 else ids[n] for n, label in enumerate(labels[: len(ids)])]
    elif kind == "train all":
        labels = list(ids)
    elif kind == "train less":
        labels = [-100 if n == k % max(1, len(labels)) else one for n, one in enumerate(labels)]
    elif kind == "train none":
        labels = [-100] * len(labels)
    elif kind == "wrong labels":
        labels = [one if one == -100 else (one + 1) % 400 for one in labels]
    row.update(zip(COLUMNS, (ids, labels, scores), strict=True))
    return rows


def as_dataset(rows, kinds, description):
    """Return changed rows as a data set; None if Arrow cannot hold them."""
    feature = List(Value("float32"))
    rows = [{name: row[name] for name in (*COLUMNS, "messages")} for row in rows]
    for kind in kinds:
        if kind in ("float64", "float16", "int64", "bool", "string"):
            feature = List(Value(kind))
            kept = {"int64": lambda s: round(s or 0), "bool": bool, "string": str}.get(kind)
            if kept:
                with contextlib.suppress(OverflowError, TypeError, ValueError):  # NaN, lists
                    for row in rows:
                        row[SCORES_COLUMN] = [kept(score) for score in row[SCORES_COLUMN]]
        elif kind == "nested":
            feature = List(List(Value("float32")))
            for row in rows:
                row[SCORES_COLUMN] = [[score] for score in row[SCORES_COLUMN]]
        elif kind == "fixed" and len(rows[0][SCORES_COLUMN]) == len(rows[-1][SCORES_COLUMN]):
            feature = List(Value("float32"), length=len(rows[0][SCORES_COLUMN]))
    features = Features(
        {
            "input_ids": List(Value("int32" if "large" in kinds else "int64")),
            "labels": List(Value("int64")),
            SCORES_COLUMN: feature,
            "messages": scored().features["messages"],
        }
    )
    try:
        made = Dataset.from_list(rows, features=features)
    except (ValueError, TypeError, OverflowError, AttributeError):  # pyarrow's own among them
        return None
    made.info.description = description
    return made


def notes_after(kinds):
    """Return the description of the changed data set."""
    description = scored().info.description
    if "forget notes" in kinds:
        return ""
    if "damage notes" in kinds:
        return description.replace("star_dss rows: ", "star_dss rows: !")
    if "other notes" in kinds:  # those of other rows, beside its own
        return description.replace("star_dss rows: ", "star_dss rows: AAAA") + "\nanything"
    return description


class Seen:
    """Record the batch of each training loss."""

    def __init__(self):
        self.batches = []
        self.inner = StarDSSMixin.compute_loss

    def patched(self):
        seen = self

        def compute_loss(trainer, model, inputs, *args, **kwargs):
            loss = seen.inner(trainer, model, inputs, *args, **kwargs)
            if trainer.model.training:
                seen.batches.append({name: inputs[name].tolist() for name in COLUMNS})
            return loss

        return mock.patch.object(StarDSSMixin, "compute_loss", compute_loss)


def check_changed_rows(case):
    """Check that a run stops with an error, or trains each token with its own score."""
    when, made = case
    rows = scored().to_list()
    for change in made:
        rows = changed(rows, *change)
    kinds = [kind for kind, *_ in made]
    dataset = as_dataset(rows, kinds, notes_after(kinds))
    if dataset is None:
        return "no data set"
    known = truth(scored())
    if "forget notes" in kinds and when == "before":
        plain = [row for row in dataset.to_list() if len({len(row[n]) for n in COLUMNS}) == 1]
        known = truth(plain) | {
            # Labels that train all tokens of a conversation are cut down to its answers.
            (key[0], trained_key): scores
            for key, scores in _answers(plain).items()
            for trained_key in [key[1]]
        }
    seen = Seen()
    with tempfile.TemporaryDirectory() as folder, seen.patched():
        try:
            trainer = make(folder, dataset if when == "before" else scored(), dataset, when)
            if when == "after":
                trainer.train_dataset = dataset
            trainer.train()
        except StarDSSError as error:
            check_words(str(error))
            return "stopped"
    assert seen.batches, "nothing was trained"
    for batch in seen.batches:
        for ids, labels, scores in zip(*(batch[name] for name in COLUMNS), strict=True):
            _check_row(known, ids, labels, scores)
    return "trained right"


def _answers(rows):
    """Return the scores of the answers of rows whose labels train all tokens."""
    true = {tuple(row["input_ids"]): row["labels"] for row in scored().to_list()}
    found = {}
    for row in rows:
        labels = true.get(tuple(row["input_ids"]))
        if labels is not None and row["labels"] == row["input_ids"]:
            tokens, scores = trained(labels, row[SCORES_COLUMN])
            found[tuple(row["input_ids"]), tokens] = scores
    return found


def _check_row(known, ids, labels, scores):
    """Check one row of a batch; the padding at its end, which has no labels, is cut off."""
    tokens, found = trained(labels, scores)
    while ids:
        if (tuple(ids), tokens) in known:
            expected = known[tuple(ids), tokens]
            assert np.allclose(np.asarray(expected, np.float32), found), (expected, found)
            return
        if labels[len(ids) - 1] != -100:
            break
        ids = ids[:-1]
    raise AssertionError("trained on a row that is not one of those that were scored")


def make(folder, train, other, when):
    """Return a trainer with the loss; `other` is its evaluation set or replaces its batches."""
    collator = DataCollatorForSeq2Seq(tokenizer())
    rows = train.remove_columns([c for c in train.column_names if c not in COLUMNS])
    if when == "before":
        rows = train
    trainer = Trainer(
        tiny_llama(len(tokenizer())),
        args=TrainingArguments(
            folder,
            max_steps=2,
            per_device_train_batch_size=3,
            report_to=[],
            use_cpu=True,
            save_strategy="no",
            disable_tqdm=True,
            logging_steps=5,
        ),
        train_dataset=rows,
        eval_dataset=other if when == "evaluation" else None,
        data_collator=collator,
        processing_class=tokenizer(),
    )
    attach(trainer, score_cache_dir=f"{folder}/cache")
    if when == "collated":
        inner, plain = trainer.data_collator, other.to_list()

        def swapped(features):
            return inner([{**f, **pick(plain, f)} for f in features])

        trainer.data_collator = swapped
    return trainer


def pick(rows, feature):
    """Return the changed columns of the row with the same token ids."""
    same = [row for row in rows if row["input_ids"] == feature["input_ids"]] or rows[:1]
    return {name: same[0][name] for name in COLUMNS}


SCORED = {"scored-rows": Target(check_changed_rows, changes(), 15)}
