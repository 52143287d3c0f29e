"""Audio files, and batches of rows with audio and scores."""

import wave
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset

from star_dss_plugin.data.alignment import Alignment
from star_dss_plugin.data.columns import SCORES_COLUMN
from star_dss_plugin.data.media_rows import MediaRows, with_text_column
from star_dss_plugin.training.rows.known_rows import KnownRows
from star_dss_plugin.training.rows.raw_rows import RawRowsCollator


def tone(path: Path, n: int) -> None:
    """Write a sine wave at a sampling rate of 16 kHz; a greater `n` makes it longer and lower."""
    with wave.open(str(path), "wb") as file:
        file.setparams((1, 2, 16000, 0, "NONE", ""))
        samples = np.sin(np.arange(1600 * (n + 1)) / (3 + n))
        file.writeframes((samples * 9000).astype(np.int16).tobytes())


def aligned_batch(collator: Any, read: MediaRows, raw: Dataset) -> dict[str, Any]:
    """Return a collated batch of all rows, in which each trained token has the score 0.5."""
    text = read.text_rows(raw, "train")
    scores = [[0.5 if label != -100 else 1.0 for label in row["labels"]] for row in text]
    scored = text.add_column(SCORES_COLUMN, scores)
    known = KnownRows()
    names = {f"star_text.{name}": name for name in ("input_ids", "labels", SCORES_COLUMN)}
    known.add(with_text_column(raw, scored).flatten().rename_columns(names))
    late = RawRowsCollator(collator, Alignment(read.chat, read.media), known)
    return late(list(with_text_column(raw, scored)))
