"""Attention in 16 bits only, like FlashAttention: all passes use training's precision."""

import pytest
import torch
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

pytest.importorskip("trl")

from support.models import tiny_llama
from support.run_differences import history
from support.trl_runs import lora_config, tiny_trainer


def halves_alone(module, query, key, value, *args, **kwargs):
    """Behave like FlashAttention in transformers, which casts the outputs of rotary embeddings."""
    if query.dtype == torch.float32 and torch.is_autocast_enabled("cpu"):
        query, key, value = (part.to(torch.bfloat16) for part in (query, key, value))
    if query.dtype not in (torch.bfloat16, torch.float16):
        raise RuntimeError("this attention only supports 16 bits")
    return sdpa_attention_forward(module, query, key, value, *args, **kwargs)


@pytest.fixture
def kind(monkeypatch):
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "halves_alone", halves_alone)
    monkeypatch.setitem(ALL_MASK_ATTENTION_FUNCTIONS._global_mapping, "halves_alone", sdpa_mask)
    return "halves_alone"


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize(
    ("lora", "reference"),
    [
        (None, "precomputed"),
        (None, "copy"),
        (lora_config(), "precomputed"),
        (lora_config(), "adapter"),
    ],
)
def test_weights_in_32_bits_train_in_16(tmp_path, tokenizer, kind, lora, reference, packing):
    """The results equal those with an attention for both precisions."""
    found = []
    for attention in ("sdpa", kind):
        model = tiny_llama(len(tokenizer))
        model.set_attn_implementation(attention)
        trainer = tiny_trainer(
            tmp_path,
            tokenizer,
            model=model,
            peft_config=lora,
            reference=reference,
            bf16=True,
            packing=packing,
            max_length=64,
        )
        assert trainer.star_dss_state.projects
        assert trainer.star_dss_state.reference.kind == reference
        trainer.train()
        found.append(torch.tensor(history(trainer)))
    assert len(found[0]) == 3
    torch.testing.assert_close(found[0], found[1], rtol=0.02, atol=0.02)
