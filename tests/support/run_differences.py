"""The logged numbers of training runs, and differences between two runs."""

from __future__ import annotations

CLOSE = 1e-5
"""Largest difference of a loss or gradient norm from that of a run in one process."""


def history(trainer):
    """Return the loss and the gradient norm of each logged step."""
    return [(h["loss"], h["grad_norm"]) for h in trainer.state.log_history if "grad_norm" in h]


def largest_difference(one, other):
    """Return the largest difference of logged numbers, relative for numbers above 1.

    `one` may be the log of a resumed run: it is compared with the last lines of `other`.
    """
    return max(
        abs(a - b) / max(1, abs(b))
        for mine, wanted in zip(one, other[-len(one) :], strict=True)
        for a, b in zip(mine, wanted, strict=True)
    )


def largest_weight_difference(one, other, lora):
    """Return the largest difference of the weights of two saved models."""
    from peft import AutoPeftModelForCausalLM
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

    cls = AutoPeftModelForCausalLM if lora else AutoModelForCausalLM
    if not lora and hasattr(AutoConfig.from_pretrained(one), "vision_config"):
        cls = AutoModelForImageTextToText
    models = [cls.from_pretrained(path).state_dict() for path in (one, other)]
    assert models[0].keys() == models[1].keys()
    return max(float((models[0][n] - models[1][n]).abs().max()) for n in models[0])
