"""Guards and references are loaded unsharded, also if the trained model is sharded."""

import torch
from transformers import AutoModelForCausalLM, modeling_utils
from transformers.integrations import deepspeed

from star_dss_plugin.models.loading import read_model


def test_axolotls_word_that_zero3_is_on_holds_for_its_own_model_alone(model_dir, monkeypatch):
    """Axolotl replaces functions in transformers that report ZeRO-3, and never restores them."""

    def always():
        return True

    for module in (deepspeed, modeling_utils):
        monkeypatch.setattr(module, "is_deepspeed_zero3_enabled", always)
    model = read_model(AutoModelForCausalLM, str(model_dir), dtype=torch.float32)
    assert all(p.numel() > 0 and not p.is_meta for p in model.parameters())
    assert deepspeed.is_deepspeed_zero3_enabled is always
    assert modeling_utils.is_deepspeed_zero3_enabled is always
