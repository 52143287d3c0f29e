"""Axolotl's LoRA kernels and the models beside the trained one."""

from __future__ import annotations

from typing import Any

__all__ = ["keep_other_models_whole"]


def keep_other_models_whole(cfg: Any) -> None:
    """Let models of the trained one's class be computed that Axolotl has not prepared.

    For `lora_qkv_kernel` and `lora_o_kernel` Axolotl rewrites the attention's class, whose forward
    pass then calls methods that it gives to the layers of the trained model alone. Any other model
    of the class, such as a named reference, would stop with an AttributeError. So the class gets
    the methods that compute what was there before; the trained model's own come first.

    Args:
        cfg: Axolotl's configuration, once the class is rewritten and before the model is loaded.
    """
    if not (cfg.lora_qkv_kernel or cfg.lora_o_kernel):
        return
    from axolotl.monkeypatch import lora_kernels

    attention = lora_kernels.get_attention_cls_from_config(cfg)
    if hasattr(attention, "_original_forward"):  # Axolotl's mark of a rewritten class
        attention.apply_qkv = lora_kernels.original_apply_qkv
        attention.apply_o = lora_kernels.original_apply_o
