"""Models of a class that Axolotl has patched for LoRA kernels, other than the trained one."""

import pytest
from axolotl_runs import KERNELS, LORA, PLUGIN, configuration, loaded

pytest.importorskip("triton", reason="needs Triton, which defines the kernels")

import torch
from axolotl.integrations.base import PluginManager
from axolotl.monkeypatch.lora_kernels import patch_self_attn_lora
from transformers import AutoModelForCausalLM
from transformers.models.llama.modeling_llama import LlamaAttention


@pytest.fixture
def attention(monkeypatch):
    """Return the class of Llama's attention, and restore it after the test."""
    monkeypatch.setattr(LlamaAttention, "forward", LlamaAttention.forward)
    yield LlamaAttention
    for name in ("_original_forward", "apply_qkv", "apply_o"):
        if name in vars(LlamaAttention):
            delattr(LlamaAttention, name)


def test_another_model_of_a_rewritten_class_computes_the_same(tmp_path, model_dir, attention):
    """A named reference with the trained model's architecture is such a model."""
    cfg = loaded(tmp_path, configuration(tmp_path, model_dir, **LORA | KERNELS))
    ids = torch.arange(6)[None]
    model = AutoModelForCausalLM.from_pretrained(model_dir)
    before = model(ids).logits
    patch_self_attn_lora(cfg)
    with pytest.raises(AttributeError, match="apply_qkv"):
        model(ids)
    plugins = PluginManager.get_instance()
    assert PLUGIN in cfg.plugins
    plugins.pre_model_load(cfg)
    assert torch.equal(model(ids).logits, before)
    other = AutoModelForCausalLM.from_pretrained(model_dir)
    assert torch.equal(other(ids).logits, before)
