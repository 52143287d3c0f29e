"""A fixture for tests that read files with datasets."""

import datasets
import pytest


@pytest.fixture
def own_copies(monkeypatch, tmp_path):
    """Let datasets copy files into the test's folder, so that no copy of an earlier run is used."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "copies")
