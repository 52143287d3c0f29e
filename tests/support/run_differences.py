"""How far two runs of the same training are apart."""

from __future__ import annotations

CLOSE = 1e-5
"""How far a loss, a gradient norm or an evaluation loss may be from that of one process."""


def apart(one, other):
    """Return the largest difference, relative where a number is above 1.

    Of a resumed run the last lines are compared.
    """
    return max(
        abs(a - b) / max(1, abs(b))
        for mine, wanted in zip(one, other[-len(one) :], strict=True)
        for a, b in zip(mine, wanted, strict=True)
    )


def weights_apart(one, other, lora):
    """Return the largest difference of two saved models, which a plain process can load."""
    from peft import AutoPeftModelForCausalLM
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

    cls = AutoPeftModelForCausalLM if lora else AutoModelForCausalLM
    if not lora and hasattr(AutoConfig.from_pretrained(one), "vision_config"):
        cls = AutoModelForImageTextToText
    models = [cls.from_pretrained(path).state_dict() for path in (one, other)]
    assert models[0].keys() == models[1].keys()
    return max(float((models[0][n] - models[1][n]).abs().max()) for n in models[0])
