"""Tiny random Mistral models with images and audio, and a tokenizer for mistral-common."""

import base64
import json
from pathlib import Path

import torch
from mistral_common.tokens.tokenizers.tekken import Tekkenizer
from transformers import Mistral3Config, Mistral3ForConditionalGeneration, WhisperFeatureExtractor

from support.vision_models import TEXT, VISION

_NAMED = {24: "[AUDIO]", 25: "[BEGIN_AUDIO]", 32: "[ARGS]", 33: "[CALL_ID]", 34: "[TRANSCRIBE]"}
_SPECIAL = 1000
_PAIRS = ["he", "ll", "th", "in", "an"]
_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+"
VOCABULARY = _SPECIAL + 256 + len(_PAIRS)


def write_tekken(folder: Path) -> None:
    """Write a tokenizer of bytes and a few merges, with settings for images and audio."""
    pieces = [bytes([i]) for i in range(256)] + [pair.encode() for pair in _PAIRS]
    known = {token["rank"]: str(token["token_str"].value) for token in _deprecated()} | _NAMED
    config = {
        "config": {
            "pattern": _WORDS,
            "num_vocab_tokens": len(pieces),
            "default_vocab_size": VOCABULARY,
            "default_num_special_tokens": _SPECIAL,
            "version": "v11",
        },
        "vocab": [
            {"rank": rank, "token_bytes": base64.b64encode(piece).decode(), "token_str": None}
            for rank, piece in enumerate(pieces)
        ],
        "special_tokens": [
            {"rank": rank, "token_str": known.get(rank, f"<SPECIAL_{rank}>"), "is_control": True}
            for rank in range(max(known) + 1)
        ],
        "image": {"image_patch_size": 4, "max_image_size": 16, "spatial_merge_size": 2},
        "audio": {
            "sampling_rate": 16000,
            "frame_rate": 12.5,
            "audio_encoding_config": {"num_mel_bins": 16, "hop_length": 160, "window_size": 400},
            "chunk_length_s": 1.0,
        },
    }
    (folder / "tekken.json").write_text(json.dumps(config))


def _deprecated():
    return Tekkenizer.DEPRECATED_SPECIAL_TOKENS


def mistral3(folder: Path) -> None:
    """Write a model like Mistral Small 3.1 (Magistral, Ministral) and its tokenizer."""
    write_tekken(folder)
    torch.manual_seed(0)
    config = Mistral3Config(
        vision_config={"model_type": "pixtral", **VISION, "head_dim": 8},
        text_config={
            "model_type": "mistral",
            **TEXT,
            "vocab_size": VOCABULARY,
            "pad_token_id": 11,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
        image_token_index=10,
        spatial_merge_size=2,
    )
    Mistral3ForConditionalGeneration(config).save_pretrained(folder)


def feature_extractor() -> WhisperFeatureExtractor:
    """Return the audio feature extractor of Voxtral's processor."""
    return WhisperFeatureExtractor(feature_size=16)
