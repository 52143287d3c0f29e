"""Find the chat template that TRL trains with."""

from __future__ import annotations

import re

from transformers import PreTrainedTokenizerBase, ProcessorMixin
from trl.chat_template_utils import get_training_chat_template

__all__ = ["training_template"]

_GENERATION = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")


def training_template(tokenizer: PreTrainedTokenizerBase | ProcessorMixin) -> str | None:
    """Return the chat template that TRL renders with if `assistant_only_loss` is set.

    Returns:
        TRL's variant of the template, which marks the generated tokens; None if TRL uses the
        tokenizer's own, which marks them itself or has no variant in TRL.
    """
    if _GENERATION.search(str(tokenizer.chat_template or "")):
        return None
    try:
        template: str | None = get_training_chat_template(tokenizer)
    except ValueError:  # TRL has no variant of the template
        return None
    return template
