"""Rows with images, and TRL runs on them, that several test modules share."""

import pytest
from datasets import Dataset
from star_dss_trl import StarDSSTrainer

from support.run_differences import history
from support.trl_runs import ANSWERS, PROMPTS, arguments
from support.vision_models import MAKE, picture

each_model = pytest.mark.parametrize("name", sorted(MAKE))
"""Run a test once for each model's name."""


def talk(prompt, answer, images=1):
    """Return a row of two questions and answers; the images come with the first question."""
    parts = [{"type": "image", "text": None}] * images
    return {
        "messages": [
            {"role": "user", "content": [*parts, {"type": "text", "text": prompt}]},
            {"role": "assistant", "content": [{"type": "text", "text": answer}]},
            {"role": "user", "content": [{"type": "text", "text": "and " + prompt}]},
            {"role": "assistant", "content": [{"type": "text", "text": answer + " yes"}]},
        ],
        "images": [picture(30 * n) for n in range(images)],
    }


def talks():
    """Return rows with none to three images each."""
    counts = [1, 0, 2, 1, 3, 1, 0, 1]
    return Dataset.from_list(
        [talk(p, a, n) for p, a, n in zip(PROMPTS, ANSWERS, counts, strict=True)]
    )


def asked_and_answered():
    """Return rows with prompt and completion whose contents are strings, another form of TRL."""
    return Dataset.from_list(
        [
            {
                "prompt": [{"role": "user", "content": p}],
                "completion": [{"role": "assistant", "content": a}],
                "images": [picture(30 * n)],
            }
            for n, (p, a) in enumerate(zip(PROMPTS, ANSWERS, strict=True))
        ]
    )


def vision_trainer(tmp_path, parts, data, peft_config=None, **changes):
    """Return a trainer of a model and its processor; `changes` are training arguments."""
    model, processor = parts
    return StarDSSTrainer(
        model,
        args=arguments(tmp_path, max_length=None, **changes),
        train_dataset=data,
        processing_class=processor,
        peft_config=peft_config,
    )


def batch_of(trainer, rows):
    """Return the collated batch of the training rows with these numbers."""
    return trainer.data_collator([trainer.train_dataset[i] for i in rows])


def numbers(trainer):
    """Return the loss and gradient norm of each step in one list."""
    return [number for step in history(trainer) for number in step]
