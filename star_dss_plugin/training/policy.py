"""Return the trained model of a trainer, and its mode."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import Trainer

__all__ = ["mode_of", "policy_of"]


def policy_of(trainer: Trainer, model: nn.Module) -> Any:
    """Return a trainer's model without the wrappers of accelerate and the compiler."""
    return trainer.accelerator.unwrap_model(model, keep_torch_compile=False)


def mode_of(trainer: Trainer) -> str:
    """Return "train" or "eval", the mode of the trainer's model."""
    assert trainer.model is not None
    return "train" if trainer.model.training else "eval"
