"""A small scored data set, in memory and saved."""

import pytest
from datasets import Dataset
from support.report_data import messages

from star_dss_plugin.scoring.scorer import score_dataset


@pytest.fixture
def scored_dataset(tokenizer, model_dir, monkeypatch):
    """Return three scored conversations of two sources."""
    monkeypatch.setattr(tokenizer, "name_or_path", str(model_dir))
    rows = [
        {**messages("is this bad?", "no! it is a bad word."), "source": "a", "origin": 1},
        {**messages("how are you?", "fine.", "and you?", "bad, bad"), "source": "b", "origin": 2},
        {**messages("héllo", "the lazy dog 🐶 is lazy"), "source": "a", "origin": 3},
    ]
    return score_dataset(
        Dataset.from_list(rows), tokenizer, guard="test-words", chunk_size=2, progress=False
    )


@pytest.fixture
def scored_folder(scored_dataset, tmp_path):
    """Return the folder in which these conversations are saved."""
    scored_dataset.save_to_disk(str(tmp_path / "scored"))
    return tmp_path / "scored"
