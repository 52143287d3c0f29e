"""Keep Axolotl's LoRA kernels from breaking guards and references of the trained model's class."""

from __future__ import annotations

from typing import Any

__all__ = ["add_kernel_methods"]


def add_kernel_methods(cfg: Any) -> None:
    """Give the patched attention class the methods that Axolotl sets on the trained model alone.

    For `lora_qkv_kernel` and `lora_o_kernel` Axolotl patches the attention class so that its
    forward pass calls `apply_qkv` and `apply_o`, and sets these methods on the trained model's
    layers. Any other model of the class, such as a named reference, would raise an AttributeError.
    With the original computation as methods of the class, other models run unchanged; the trained
    model's instance methods take precedence.

    Args:
        cfg: Axolotl's configuration. Call this after Axolotl has patched the class and before it
            loads the model.
    """
    if not (cfg.lora_qkv_kernel or cfg.lora_o_kernel):
        return
    from axolotl.monkeypatch import lora_kernels

    attention = lora_kernels.get_attention_cls_from_config(cfg)
    if hasattr(attention, "_original_forward"):  # Axolotl has patched the class
        attention.apply_qkv = lora_kernels.original_apply_qkv
        attention.apply_o = lora_kernels.original_apply_o
