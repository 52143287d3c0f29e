"""Shared helpers of the tests: small models, test guards, stand-in guards, runs, paths."""

import os

# transformers reads these variables when it is imported.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
