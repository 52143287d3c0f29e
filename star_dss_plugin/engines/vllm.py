"""Label probabilities from vLLM in this process: for guards and data too big for `local`.

vLLM gets token ids, so the prompts are the very ones that `local` computes. It generates one token
of each and reports the log-softmax over the whole vocabulary at the label ids (`logprob_token_ids`,
raw log-probabilities): the labels need not be among the likeliest tokens, and the label mass is the
true one. Its prefix cache finds what the prompts of a response share.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from star_dss_plugin.engines.base import Weights
from star_dss_plugin.engines.label_rows import label_row, longest_first, rows_of
from star_dss_plugin.errors import ConfigError, GuardError

__all__ = ["VllmEngine"]


class VllmEngine:
    """An `Engine` that runs vLLM.

    Args:
        weights: What to load.
        options: More arguments of `vllm.LLM` (`tensor_parallel_size`, `max_model_len`, …).

    Attributes:
        prompt_tokens: Tokens of the prompts so far, those of equal prompts of a group once.
        cached_tokens: How many of them the prefix cache held.

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
        except Exception as error:  # vLLM raises whatever its parts raise
            raise GuardError(
                f"vLLM cannot load the guard from {weights.model!r}: {type(error).__name__}: "
                f"{error}. Its own messages are above. Set engine_options (max_model_len and "
                "gpu_memory_utilization bound its memory), or use engine 'local'."
            ) from error

    def label_logprobs(
        self, groups: Sequence[Sequence[Sequence[int]]], label_ids: Sequence[int]
    ) -> list[Tensor]:
        """See `Engine.label_logprobs`."""
        ordered = [longest_first(group) for group in groups]
        longest = int(self._llm.model_config.max_model_len) - 1
        for number, prompts in enumerate(ordered):
            if prompts and len(prompts[0]) > longest:
                raise GuardError(
                    f"A prompt of {len(prompts[0])} tokens does not fit the {longest} that vLLM "
                    "has room for (max_model_len, less the generated token). Raise "
                    "engine_options max_model_len, or shorten the data (max_length).",
                    request=number,
                )
        flat = [{"prompt_token_ids": prompt} for prompts in ordered for prompt in prompts]
        outputs = iter(self._generate(flat, list(label_ids)) if flat else ())
        rows = []
        for group, prompts in zip(groups, ordered, strict=True):
            known = {
                tuple(prompt): self._row(next(outputs), prompt, label_ids) for prompt in prompts
            }
            rows.append(rows_of(group, known, len(label_ids)))
        return rows

    def close(self) -> None:
        """Ends vLLM's processes and frees the device's memory."""
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
                "or newer is needed; what it says itself is above."
            ) from error

    def _row(self, output: Any, prompt: list[int], label_ids: Sequence[int]) -> list[float]:
        """The labels' log-probabilities of one prompt."""
        if list(output.prompt_token_ids) != prompt:
            raise GuardError("vLLM answered for another prompt than it was asked for.")
        self.prompt_tokens += len(prompt)
        self.cached_tokens += output.num_cached_tokens or 0
        # A dict per generated token; with what was asked for comes the token that was generated.
        [found] = output.outputs[0].logprobs
        return label_row({i: entry.logprob for i, entry in found.items()}, label_ids)
