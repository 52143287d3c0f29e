"""A verdict guard whose scores a probe can learn, and data for it."""

import random

import numpy as np
import torch
from datasets import Dataset

from support.models import tiny_llama
from support.scoring import chat, scored
from support.verdict_guards import describe

WORDS = [
    "how",
    "are",
    "you",
    "fine",
    "thank",
    "the",
    "fox",
    "is",
    "bad",
    "good",
    "why",
    "no",
    "yes",
]
CHUNK = 1  # so that every fourth prefix of a small sample is enough to fit a probe
PROBED = {"trajectory": "probed", "probe_sample": 30, "chunk_size": CHUNK}
ROWS = 80


def learnable(folder, tokenizer, seed=2, spread=0.06, **changes):
    """Save a random guard of four blocks whose scores differ by a few hundredths; describe it."""
    model = tiny_llama(len(tokenizer), seed, num_hidden_layers=4, initializer_range=spread)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return describe(folder, **changes)


def talks(count=ROWS, seed=0):
    """Return conversations of random words."""
    draw = random.Random(seed)

    def words(number):
        return " ".join(draw.choices(WORDS, k=number))

    return Dataset.from_list(
        [{"messages": chat(words(5), words(draw.randrange(8, 30)))} for _ in range(count)]
    )


def probed(rows, tokenizer, guard, **options):
    """Score rows with a probe."""
    return scored(rows, tokenizer, guard, **{**PROBED, **options})


def exact(rows, tokenizer, guard, **options):
    """Score rows without a probe."""
    return scored(rows, tokenizer, guard, **{"chunk_size": CHUNK, **options})


def trained(dataset, column="star_scores"):
    """Return the values of a column at all trained tokens, (trained tokens,)."""
    rows = zip(dataset[column], dataset["labels"], strict=True)
    return np.concatenate([np.array(v)[np.array(labels) != -100] for v, labels in rows])


def slow_states(model, ids, blocks):
    """Return hidden states from a plain forward pass, (tokens, blocks, hidden size)."""
    with torch.inference_mode():
        found = model(torch.tensor([ids]), output_hidden_states=True).hidden_states
    return torch.stack([found[block + 1][0] for block in blocks], dim=1)
