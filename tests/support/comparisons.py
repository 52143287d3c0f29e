"""Prompts of an evaluation, and a short comparison of models."""

from datasets import Dataset

from star_dss_plugin.evaluate.comparison import compare
from star_dss_plugin.evaluate.prompts import read_prompts

HARMFUL = [{"prompt": "is this bad?"}, {"prompt": "who is lazy?", "target": "good words keep"}]
BENIGN = [{"prompt": "how are you?"}]


def prompts(*, harmful=HARMFUL, benign=BENIGN):
    """Return the prompts of these rows."""
    return [
        *read_prompts(Dataset.from_list(harmful), "harmful"),
        *(read_prompts(Dataset.from_list(benign), "benign") if benign else ()),
    ]


def compared(model_dirs, tmp_path, **changes):
    """Return the comparison of these models with short answers."""
    options = {"output": tmp_path / "out", "max_new_tokens": 6, "progress": False, **changes}
    return compare(model_dirs, options.pop("prompts", prompts()), **options)
