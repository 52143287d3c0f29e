"""What the tests share: small real models, guards that read words, stand-ins, runs, paths."""

import os

# transformers reads them when it is imported.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
