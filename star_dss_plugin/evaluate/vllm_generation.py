"""Generate answers with vLLM from token ids, for large models or many prompts."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from star_dss_plugin.errors import ConfigError
from star_dss_plugin.evaluate.answers import Generate
from star_dss_plugin.smollm2 import resolve_model
from star_dss_plugin.validation import require

__all__ = ["vllm_generation"]


@contextlib.contextmanager
def vllm_generation(
    model: str, tokenizer: PreTrainedTokenizerBase, dtype: str
) -> Iterator[Generate]:
    """Load a model in vLLM, yield its greedy generation, and free it at the end.

    Args:
        model: Hugging Face Hub id or folder of a complete model, or "smollm2".
        tokenizer: The model's tokenizer.
        dtype: "auto" or the name of a torch dtype.

    Raises:
        ConfigError: `model` is an adapter, vLLM is not installed, or vLLM cannot load the model.
    """
    if (Path(model) / "adapter_config.json").is_file():
        raise ConfigError(
            f"vLLM loads whole models, and {model!r} is none. Save the merged model to a folder, "
            "or use the engine 'local'."
        )
    require(
        "vllm", "vllm", "The engine 'vllm'", alternative="Or use the engine 'local'.", load=True
    )
    from vllm import LLM, SamplingParams

    try:
        llm: Any = LLM(
            model=resolve_model(model),
            dtype=dtype,
            enable_prefix_caching=True,
            disable_log_stats=True,
        )
    except Exception as error:  # vLLM passes on errors of all its parts
        raise ConfigError(
            f"vLLM cannot load {model!r}: {type(error).__name__}: {error}. Its own messages are "
            "above. The engine 'local' needs no vLLM."
        ) from error

    def generate(
        prompts: Sequence[Sequence[int]], max_new_tokens: int
    ) -> Iterable[tuple[int, str]]:
        wanted = SamplingParams(temperature=0.0, max_tokens=max_new_tokens, detokenize=False)
        asked = [{"prompt_token_ids": list(ids)} for ids in prompts]
        for i, output in enumerate(llm.generate(asked, wanted, use_tqdm=False) if asked else ()):
            said = tokenizer.decode(output.outputs[0].token_ids, skip_special_tokens=True)
            yield i, str(said)

    try:
        yield generate
    finally:
        llm.llm_engine.engine_core.shutdown()
