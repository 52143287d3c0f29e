"""The chat template that TRL trains with."""

from __future__ import annotations

from transformers import PreTrainedTokenizerBase
from trl.chat_template_utils import get_training_chat_template

__all__ = ["training_template"]


def training_template(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Return the template that TRL renders with if `assistant_only_loss` is set.

    Returns:
        TRL's own variant, which marks what is generated; None: the tokenizer's own template, as it
        marks that itself or TRL has no variant of it.
    """
    if "generation" in str(tokenizer.chat_template or ""):
        return None
    try:
        template: str | None = get_training_chat_template(tokenizer)
    except ValueError:  # TRL knows no variant of the template
        return None
    return template
