"""Keep a tokenizer and the chat template that is used with it together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from star_dss_plugin.errors import DataError

__all__ = ["ChatTokenizer"]


@dataclass(frozen=True, eq=False)
class ChatTokenizer:
    """A tokenizer and the chat template of its conversations.

    Attributes:
        tokenizer: The trained model's.
        chat_template: The Jinja source; None: the tokenizer's own.
    """

    tokenizer: PreTrainedTokenizerBase
    chat_template: str | None = None

    def render(self, messages: Sequence[Mapping[str, Any]], /, **kwargs: Any) -> str:
        """Return the chat template's text for some messages.

        Args:
            messages: At least one message.
            **kwargs: Variables of the template, and arguments of `apply_chat_template`.

        Raises:
            DataError: There are no messages or no template, or it cannot render these messages.
        """
        if not messages:
            raise DataError("The row has no messages: its list is empty. Remove the row.")
        kwargs = {"chat_template": self.chat_template, **kwargs}
        try:
            text = self.tokenizer.apply_chat_template(
                [dict(m) for m in messages], tokenize=False, **kwargs
            )
        except Exception as error:  # a template is a program, and may stop with anything
            raise DataError(
                f"The chat template cannot render the row's messages: {str(error) or type(error)}"
            ) from error
        assert isinstance(text, str)
        return text
