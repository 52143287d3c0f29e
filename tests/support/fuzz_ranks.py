"""Fuzz target for ranks with different inputs: all stop with an error, or all are set up equally.

The ranks are threads of one process, each with its own trainer. A barrier takes the place of the
process group's collectives; a rank that ends breaks the barrier, as it would break the group.
"""

import tempfile
import threading
from unittest import mock

from datasets import Dataset
from hypothesis import strategies as st
from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments

from star_dss_plugin import attach, hookimpl
from star_dss_plugin.data.columns import SCORES_COLUMN
from star_dss_plugin.errors import StarDSSError
from star_dss_plugin.plugins import Origin, load_plugins
from star_dss_plugin.scoring.ranks import Share, explain_barrier_errors
from star_dss_plugin.training.sharding import Ranks
from support.fuzz_inputs import tokenizer
from support.fuzz_scored import COLUMNS, scored
from support.fuzzing import Target
from support.guards import WordGuard
from support.models import tiny_llama

HANGS_SECONDS = 120
"""Timeout of the barrier, longer than any set-up takes."""


class RankGuard(WordGuard):
    """Score as another version of the guard on the ranks that set `here.unsafe`."""

    name = "rank-words"
    here = threading.local()

    def token_scores(self, responses):
        unsafe = getattr(self.here, "unsafe", 0.1)
        self.unsafe = unsafe
        return super().token_scores(responses)

    @property
    def identity(self):
        return {"kind": "words"}


class RankPlugin:
    @hookimpl
    def star_dss_register_guards(self, register):
        register(RankGuard.name, RankGuard, summary="a word list that differs between ranks")


class Group:
    """Stand in for a process group: a barrier and a gather between threads."""

    def __init__(self, size):
        self.size = size
        self._barrier = threading.Barrier(size, timeout=HANGS_SECONDS)
        self.values = [None] * size

    def barrier(self):
        with explain_barrier_errors():
            self._barrier.wait()

    def gather(self, rank, value):
        self.values[rank] = value
        self.barrier()
        found = list(self.values)
        self.barrier()
        return found


OPTIONS = {
    "chunk_size": [1, 3],
    "kl_coef": [0.0, 0.5],
    "kl_estimator": ["k1", "k3"],
    "loss_type": ["sft", "hard", "rejection", "static", "kl_only", "nll", "no such"],
    "threshold": [0.2, 7],
    "reference": ["copy", "none", "no such"],
    "segmenter": ["words", "whole", "no such"],
    "monotone": [True],
    "unsafe_lookahead": [2],
    "score_eval": [False],
    "on_guard_error": ["unsafe"],
    "trajectory": ["adaptive"],
    "guard": [None, "demo", "no such", {"preset": "test-words", "word": "good"}],
    "score_cache_dir": ["other"],
    "kl_warmup_steps": [3],
}
ROWS = ["reversed", "fewer", "none", "other text", "column", "scored", "scored 1", "edited scores"]
OTHER = ["weights", "guard", "no evaluation", "other evaluation", "machine", "bad row"]
one_change = (
    st.sampled_from([(name, value) for name, values in OPTIONS.items() for value in values])
    | st.sampled_from([("rows", kind) for kind in ROWS])
    | st.sampled_from([("other", kind) for kind in OTHER])
)
rank_changes = st.tuples(
    st.sampled_from([2, 2, 3]),
    st.lists(st.tuples(st.integers(0, 2), one_change), max_size=2),
    st.booleans(),
)
"""The number of ranks, changes of a rank's inputs, and whether the ranks share one cache."""


def rows_of(kinds):
    """Return one rank's training set, with the given changes."""
    rows = scored().to_list()
    if "scored" not in kinds and "scored 1" not in kinds and "edited scores" not in kinds:
        rows = [{k: v for k, v in row.items() if k != SCORES_COLUMN} for row in rows]
    if "scored 1" in kinds:
        rows = [{**row, SCORES_COLUMN: [1.0] * len(row["input_ids"])} for row in rows]
    if "edited scores" in kinds:
        rows[1][SCORES_COLUMN][-1] = 0.5
    if "reversed" in kinds:
        rows.reverse()
    if "fewer" in kinds:
        rows = rows[:-1]
    if "none" in kinds:
        rows = rows[:0]
    if "other text" in kinds:
        rows[0]["input_ids"][0] = 7
    if "column" in kinds:
        rows = [{**row, "id": i} for i, row in enumerate(rows)]
    if "bad row" in kinds:
        rows[2]["labels"] = rows[2]["labels"][:-1]
    return Dataset.from_list(rows)


def check_ranks(case):
    """Check that all ranks stop, or all are set up with equal data, and that no rank hangs."""
    size, changes, together = case
    if RankGuard.name not in load_plugins().names("guard"):
        load_plugins().register(RankPlugin(), Origin("ranks", "star-dss-tests", "0"))
    group, ends = Group(size), [None] * size
    with tempfile.TemporaryDirectory() as folder:
        trainers = [_trainer(folder, rank, size, changes) for rank in range(size)]
        places = threading.local()

        def from_accelerator(accelerator, model, **others):
            rank = places.rank
            share = Share(rank, size, group.barrier) if together else Share(0, 1, group.barrier)
            return Ranks(share, lambda value: group.gather(rank, value))

        def run(rank):
            places.rank = rank
            mine = [change for r, change in changes if r == rank]
            RankGuard.here.unsafe = 0.8 if ("other", "guard") in mine else 0.1
            cache = f"{folder}/cache" if together else f"{folder}/cache-{rank}"
            if ("other", "machine") in mine or ("other", "guard") in mine:
                cache = f"{folder}/cache-of-{rank}"
            options = {"guard": RankGuard.name, "chunk_size": 2, "score_cache_dir": cache}
            options |= {k: v for k, v in mine if k not in ("rows", "other")}
            if options["score_cache_dir"] == "other":
                options["score_cache_dir"] = f"{folder}/other"
            try:
                attach(trainers[rank], **options)
                ends[rank] = "set up"
            except BaseException as error:
                ends[rank] = error
                group._barrier.abort()

        with mock.patch.object(Ranks, "from_accelerator", from_accelerator):
            threads = [threading.Thread(target=run, args=(r,), daemon=True) for r in range(size)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join(HANGS_SECONDS + 60)
        for end in ends:
            assert end is not None, "a rank still waits"
            if end != "set up" and not isinstance(end, StarDSSError):
                raise end
        stopped = [end for end in ends if end != "set up"]
        assert len(stopped) in (0, size), ends
        if stopped:
            # Ranks that only waited say so; at least one must say what differs.
            assert any("waited for the other processes" not in str(end) for end in stopped), ends
            return "stopped"
        _same(trainers)
        return "set up alike"


def _same(trainers):
    first = trainers[0]
    for trainer in trainers[1:]:
        for name in COLUMNS:
            assert list(trainer.train_dataset[name]) == list(first.train_dataset[name]), name
        mine, its = first.star_dss_state, trainer.star_dss_state
        assert mine.shaping == its.shaping
        assert mine.reference.kind == its.reference.kind
        assert mine.reference.fingerprint == its.reference.fingerprint


def _trainer(folder, rank, size, changes):
    mine = [change for r, change in changes if r == rank]
    kinds = [kind for name, kind in mine if name in ("rows", "other")]
    train = rows_of(kinds)
    evaluation = scored().remove_columns(SCORES_COLUMN).select([0, 1])
    if "other evaluation" in kinds:
        evaluation = evaluation.select([1])
    return Trainer(
        tiny_llama(len(tokenizer()), seed="weights" in kinds),
        args=TrainingArguments(
            f"{folder}/out", report_to=[], use_cpu=True, save_strategy="no", disable_tqdm=True
        ),
        train_dataset=train,
        eval_dataset=None if "no evaluation" in kinds else evaluation,
        data_collator=DataCollatorForSeq2Seq(tokenizer()),
        processing_class=tokenizer(),
    )


RANKS = {"ranks": Target(check_ranks, rank_changes, 12)}
