"""Guards, conversations and a plain implementation for the tests of scoring."""

import hashlib
import json
import time

import numpy as np
from datasets import Dataset

from star_dss_plugin import score_dataset
from star_dss_plugin.data.requests import Trajectory
from star_dss_plugin.data.row_digests import remove_row_digests
from star_dss_plugin.data.templates.tokenized import trained_runs
from star_dss_plugin.guards.base import Guard, StreamingGuard


class HashGuard(StreamingGuard):
    """Score by a hash of every character of the context and of the prefix."""

    name = "test-hash"

    def __init__(self, salt="") -> None:
        self.salt = salt
        self.asked = []

    @property
    def identity(self):
        return {"kind": "hash", "salt": self.salt}

    def value(self, context, prefix):
        turns = [[m["role"], m["content"]] for m in context]
        digest = hashlib.sha256(json.dumps([self.salt, turns, prefix]).encode()).digest()
        return int.from_bytes(digest[:4], "big") / 2**32

    def token_scores(self, responses):
        self.asked += [text for _, text in responses]
        return [
            [(end, self.value(context, text[:end])) for end in range(len(text) + 1)]
            for context, text in responses
        ]


def batches_of_three(requests):
    """Return a plan that scores requests in their order, three at a time."""
    return [list(range(i, min(i + 3, len(requests)))) for i in range(0, len(requests), 3)]


class BatchGuard(Guard):
    """Score in batches of three; as on a GPU, the last bits of a score depend on the batch."""

    name = "test-batches"
    identity = {"kind": "batches"}

    def __init__(self, fail_at=None, action=None, delay=0.0) -> None:
        self.fail_at, self.action, self.delay = fail_at, action, delay
        self.batches = []

    def plan(self, requests):
        return batches_of_three(requests)

    def trajectories(self, requests):
        if len(self.batches) == self.fail_at:
            self.action()
        time.sleep(self.delay)
        self.batches.append([r.text for r in requests])
        noise = sum(len(r.text) for r in requests) * 1e-7
        return [Trajectory(tuple(1 / (2 + end) + noise for end in r.ends)) for r in requests]


def chat(*contents):
    """Return messages of the user and the assistant in turn."""
    roles = ["user", "assistant"] * len(contents)
    return [{"role": r, "content": c} for r, c in zip(roles, contents, strict=False)]


def conversations(count=20):
    return Dataset.from_list(
        [
            {
                "messages": chat(
                    f"is {i} bad?", f"no, {i} is good. but a bad {i}", "why?", f"{i} is {i}"
                )
            }
            for i in range(count)
        ]
    )


TALK = chat("how are you?", "i am fine, thank you. the fox is bad", "is it?", "no")
SIMPLE = {"messages": [TALK[0], TALK[1]]}


def scored(dataset, tokenizer, guard, **options):
    """Score a data set without a progress bar."""
    return score_dataset(dataset, tokenizer, guard=guard, **{"progress": False, **options})


def scores_of_prefixes(row, tokenizer, contexts, chunk_size):
    """Return a row's column of scores, computed by scoring each prefix of tokens by itself."""
    guard, special = HashGuard(), set(tokenizer.all_special_ids)
    column = [1.0] * len(row["input_ids"])
    for (start, end), context in zip(trained_runs(row["labels"]), contexts, strict=True):
        body = row["input_ids"][start:end]
        stops = [n for n, i in enumerate(body) if i in special]
        body = body[: stops[0]] if stops else body
        for n in range(start, end):
            chunk = min((n - start) // chunk_size, max(0, (len(body) - 1) // chunk_size))
            prefix = tokenizer.decode(body[: (chunk + 1) * chunk_size])
            column[n] = guard.score([[*context, {"role": "assistant", "content": prefix}]])[0]
    return np.asarray(column, dtype=np.float32)


def tokenized(tokenizer, row):
    """Return the token ids and labels of a row."""
    made = scored(Dataset.from_list([row]), tokenizer, HashGuard())[0]
    return {"input_ids": made["input_ids"], "labels": made["labels"]}


def unbound(dataset):
    """Remove the digests of scored rows, as a user must who changes scores on purpose."""
    remove_row_digests(dataset)
    return dataset


def saved_bytes(dataset, folder):
    """Return the bytes of each file of the saved data set."""
    dataset.save_to_disk(folder)
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}
