"""Compute label probabilities with vLLM in this process, for large guards and data sets.

vLLM gets token ids, so its prompts equal those of engine `local` token by token. It generates one
token per prompt and reports the log-softmax over the whole vocabulary at the label ids
(`logprob_token_ids`, raw log-probabilities). So labels need not be among the likeliest tokens, and
the label mass is exact. Tokens that prompts of a response share come from vLLM's prefix cache.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor

from star_dss_plugin.engines.base import Weights
from star_dss_plugin.engines.label_rows import label_row, longest_first, rows_of_group
from star_dss_plugin.engines.shared_prompts import SharedPrompts
from star_dss_plugin.errors import ConfigError, GuardError

__all__ = ["VllmEngine"]

_CALL_TOKENS = 1 << 24
"""Largest number of prompt tokens in one call of vLLM: 128 MB in Python lists. Only very long
responses exceed it."""


class VllmEngine:
    """Run vLLM as an `Engine`.

    Args:
        weights: The model to load, with revision and dtype.
        options: Further arguments of `vllm.LLM` (`tensor_parallel_size`, `max_model_len`, …).

    Attributes:
        prompt_tokens: Number of prompt tokens so far; equal prompts of a group count once.
        cached_tokens: How many of them were served from the prefix cache.

    Raises:
        GuardError: vLLM cannot be imported, or cannot load the model.
    """

    def __init__(self, weights: Weights, options: Mapping[str, Any]) -> None:
        self.prompt_tokens = self.cached_tokens = 0
        self._model = weights.model
        try:
            from vllm import LLM

            self._llm: Any = LLM(
                model=weights.model,
                revision=weights.revision,
                trust_remote_code=weights.trust_remote_code,
                dtype=str(weights.dtype).removeprefix("torch."),
                logprobs_mode="raw_logprobs",
                enable_prefix_caching=True,
                **{"disable_log_stats": True, **options},
            )
        except TypeError as error:
            raise ConfigError(
                f"vLLM does not take the engine_options {', '.join(options) or '(none)'}: {error}."
            ) from error
        except Exception as error:  # vLLM passes on errors of all its parts
            raise GuardError(
                f"vLLM cannot load the guard from {weights.model!r}: {type(error).__name__}: "
                f"{error}. Its own messages are above. Set engine_options (max_model_len and "
                "gpu_memory_utilization bound its memory), or use engine 'local'."
            ) from error

    def label_logprobs(
        self, groups: Sequence[Sequence[Sequence[int]]], label_ids: Sequence[int]
    ) -> list[Tensor]:
        """See `Engine.label_logprobs`."""
        shared = [SharedPrompts.from_prompts(group) for group in groups]
        ordered = [longest_first(group) for group in shared]
        longest = int(self._llm.model_config.max_model_len) - 1
        for number, (group, indices) in enumerate(zip(shared, ordered, strict=True)):
            if indices and (tokens := len(group[indices[0]])) > longest:
                raise GuardError(
                    f"A prompt of {tokens} tokens does not fit the {longest} that vLLM "
                    "has room for (max_model_len, less the generated token). Raise "
                    "engine_options max_model_len, or shorten the data (max_length).",
                    request=number,
                )
        known: list[dict[int, list[float]]] = [{} for _ in shared]
        for call in _calls(shared, ordered):
            prompts = [shared[number][i] for number, i in call]
            outputs = self._generate([{"prompt_token_ids": p} for p in prompts], list(label_ids))
            for (number, i), prompt, output in zip(call, prompts, outputs, strict=True):
                known[number][i] = self._row(output, prompt, label_ids)
        return [
            rows_of_group(group, rows, len(label_ids))
            for group, rows in zip(shared, known, strict=True)
        ]

    def close(self) -> None:
        """Stop vLLM's processes and free the device's memory."""
        self._llm.llm_engine.engine_core.shutdown()

    def _generate(self, prompts: list[dict[str, list[int]]], label_ids: list[int]) -> Any:
        from vllm import SamplingParams

        try:
            wanted = SamplingParams(
                max_tokens=1, temperature=0.0, logprob_token_ids=label_ids, detokenize=False
            )
            return self._llm.generate(prompts, wanted, use_tqdm=False)
        except Exception as error:
            raise GuardError(
                f"vLLM failed on guard {self._model!r}: {type(error).__name__}: {error}. vLLM 0.32 "
                "or newer is needed; its own messages are above."
            ) from error

    def _row(self, output: Any, prompt: list[int], label_ids: Sequence[int]) -> list[float]:
        """Return the labels' log-probabilities of one prompt, and count its tokens."""
        if list(output.prompt_token_ids) != prompt:
            raise GuardError("vLLM answered another prompt than the one that was sent.")
        self.prompt_tokens += len(prompt)
        self.cached_tokens += output.num_cached_tokens or 0
        # One dict per generated token, with the requested ids and the generated token itself.
        [found] = output.outputs[0].logprobs
        return label_row({i: entry.logprob for i, entry in found.items()}, label_ids)


def _calls(
    groups: Sequence[SharedPrompts], ordered: Sequence[Sequence[int]]
) -> Iterator[list[tuple[int, int]]]:
    """Yield the (group, prompt) indices of each call, of at most `_CALL_TOKENS` or one prompt."""
    call: list[tuple[int, int]] = []
    tokens = 0
    for number, (group, indices) in enumerate(zip(groups, ordered, strict=True)):
        lengths = group.lengths()
        for i in indices:
            if call and tokens + lengths[i] > _CALL_TOKENS:
                yield call
                call, tokens = [], 0
            call.append((number, i))
            tokens += lengths[i]
    if call:
        yield call
