"""Two small models to compare."""

import pytest
from support.models import tiny_llama


@pytest.fixture(scope="session")
def model_dirs(tmp_path_factory, tokenizer):
    """Return the folders of two random models that give different answers."""
    root = tmp_path_factory.mktemp("models")
    for name, seed in (("first", 0), ("second", 1)):
        tiny_llama(len(tokenizer), seed).save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
    return [str(root / "first"), str(root / "second")]
