"""Random models with and without shared-prefix passes in the local engine, and their prompts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cache
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoConfig,
    GraniteConfig,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen3Config,
)

from star_dss_plugin.engines.local import LocalEngine

MODULE = LocalEngine.__module__
VOCABULARY = 61
LABELS = [3, 60, 17]
# Large weights: with the usual small ones a wrong mask would hardly change the result.
COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.4,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GEMMA: dict[str, Any] = {
    **COMMON,
    "head_dim": 8,
    "query_pre_attn_scalar": 8,
    "sliding_window": 8,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
}
# Models whose prefixes the engine shares.
SERVED: dict[str, Callable[[], PreTrainedConfig]] = {
    "llama": lambda: LlamaConfig(**COMMON),
    "llama-eager": lambda: LlamaConfig(**COMMON, attn_implementation="eager"),
    "qwen3": lambda: Qwen3Config(**COMMON, head_dim=8),
    "gemma3": lambda: Gemma3TextConfig(**GEMMA),
    "gemma2": lambda: Gemma2Config(
        **GEMMA,
        attn_logit_softcapping=3.0,
        final_logit_softcapping=4.0,
        attn_implementation="eager",
    ),
    "mistral": lambda: MistralConfig(**COMMON, sliding_window=8),
    "granite": lambda: GraniteConfig(
        **COMMON, logits_scaling=3.0, attention_multiplier=0.3, residual_multiplier=0.7
    ),
    "gpt2": lambda: GPT2Config(
        vocab_size=VOCABULARY,
        n_embd=32,
        n_layer=3,
        n_head=4,
        n_positions=40,
        initializer_range=0.4,
    ),
}
# Models that the engine runs on whole sequences, and words of its warning.
NOT_SERVED: dict[str, tuple[Callable[[], PreTrainedConfig], str]] = {
    "bloom": (
        lambda: BloomConfig(
            vocab_size=VOCABULARY, hidden_size=32, n_layer=2, n_head=4, initializer_range=0.4
        ),
        "takes no position_ids",
    ),
    "mamba": (
        lambda: MambaConfig(
            vocab_size=VOCABULARY,
            hidden_size=32,
            num_hidden_layers=2,
            state_size=8,
            initializer_range=0.4,
        ),
        "layers other than full and sliding attention",
    ),
    # Its local layers mask by column instead of position, which only the engine's trial detects.
    "gpt-neo": (
        lambda: GPTNeoConfig(
            vocab_size=VOCABULARY,
            hidden_size=32,
            num_layers=2,
            attention_types=[[["global", "local"], 1]],
            num_heads=4,
            window_size=8,
            max_position_embeddings=128,
            initializer_range=0.4,
        ),
        "cannot be replaced",
    ),
}


def make(config: PreTrainedConfig) -> PreTrainedModel:
    """Return a model whose random weights are the same at each call."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    return model.eval()


@cache
def served(name: str) -> PreTrainedModel:
    """Return a model of `SERVED`, which all tests share."""
    return make(SERVED[name]())


def one_pass_per_sequence(
    model: PreTrainedModel, sequences: Sequence[Sequence[int]], label_ids: Sequence[int]
) -> torch.Tensor:
    """Return the engine's results from one plain forward pass per sequence."""
    rows = []
    with torch.no_grad():
        for sequence in sequences:
            logits = model(torch.tensor([list(sequence)])).logits[0, -1].float()
            rows.append(logits.log_softmax(dim=-1)[list(label_ids)])
    return torch.stack(rows)


def draw(*counts: int, seed: int = 0) -> Iterator[list[int]]:
    """Yield a list of random token ids for each count."""
    generator = torch.Generator().manual_seed(seed)
    for count in counts:
        yield torch.randint(3, VOCABULARY, (count,), generator=generator).tolist()


def prompts(length: int = 32) -> list[list[int]]:
    """Return prompts of a growing response: a fixed head, k tokens of the response, a tail."""
    head, response, tail = draw(10, length - 10, 5, seed=1)
    return [head + response[:k] + tail for k in range(0, length - 14, 3)]


def shapes() -> dict[str, list[list[int]]]:
    """Return groups of sequences that share prefixes in different ways."""
    trunk, other, third = draw(36, 30, 25)
    return {
        "prompts": prompts(),
        "nothing shared": [[5, *trunk[:20]], [6, *other], [7, *third[:9]]],
        "identical": [trunk, trunk, other, trunk],
        "prefixes of one another": [trunk[:k] for k in (1, 36, 2, 35, 20)],
        "length one": [[4], [9]],
        "one sequence": [other],
        "merges near the end": [trunk, [*trunk[:-1], 4], [*trunk[:-2], 7], [*trunk[:-3], 7, 8, 9]],
        "deep and shallow": [trunk, trunk[:2] + other[:28], trunk[:33] + third[:2], other[:3], [5]],
    }
