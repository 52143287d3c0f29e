"""Convert rows with images, audio or video to tokenized rows of text, which a guard can read.

A host tokenizes rows with media in its data collator, because only there an image becomes pixels
and a number of tokens. Scoring comes before that and needs only the text, so a row's conversation
is rendered with the template's placeholder for each image and then treated as a row of text.
`alignment.py` transfers the labels and scores of the text's tokens to the collator's tokens.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from datasets import Dataset, Features, Json, List, Value
from transformers import ProcessorMixin

from star_dss_plugin.data.columns import SCORES_COLUMN, TEXT_COLUMN
from star_dss_plugin.data.conversations import MEDIA
from star_dss_plugin.data.decoding import added_tokens
from star_dss_plugin.data.media import without_decoding
from star_dss_plugin.data.rows import check_trained, with_row_number
from star_dss_plugin.data.templates.chat import ChatTokenizer
from star_dss_plugin.data.tokenization import tokenize_row
from star_dss_plugin.errors import DataError
from star_dss_plugin.validation import shortened

__all__ = ["MediaRows", "media_tokens", "with_text_column"]

logger = logging.getLogger(__name__)

_TEXT_FEATURE = {
    "row": Value("int64"),
    "media": List(Value("string")),
    "input_ids": List(Value("int64")),
    "labels": List(Value("int64")),
    SCORES_COLUMN: List(Value("float32")),
}


@dataclass(frozen=True, eq=False)
class MediaRows:
    """How a host reads rows with media.

    Attributes:
        chat: The processor's tokenizer and its chat template.
        media: Ids of the tokens that stand for media, see `media_tokens`.
        messages: Returns a row's conversation as the host passes it to its processor: `messages`,
            or `prompt` and `completion`.
        assistant_only_loss: Whether only text within `{% generation %}` is trained.
        kinds: Part types that the collator loads; any other part must be text.
    """

    chat: ChatTokenizer
    media: frozenset[int]
    messages: Callable[[Mapping[str, Any]], Mapping[str, Sequence[Mapping[str, Any]]]]
    assistant_only_loss: bool = False
    kinds: tuple[str, ...] = ("image",)

    def text_rows(self, dataset: Dataset, name: str) -> Dataset:
        """Convert rows with media to tokenized rows of text.

        Args:
            dataset: Raw rows. Files that they name are not opened, and images are not decoded.
            name: The data set's name in messages: "train", "eval", …

        Returns:
            As many rows, with `input_ids`, `labels` (assistant turns are trained), `media` (the
            kinds of media in the row) and the conversation, in which a media part has only its
            type.

        Raises:
            DataError: A row cannot be read; the error has its number.
        """
        if SCORES_COLUMN in dataset.column_names:
            raise DataError(
                f"The {name} data set brings {SCORES_COLUMN}, one score for each token, and its "
                "rows get their tokens in the data collator. Remove the column, and set a guard."
            )
        conversations: list[dict[str, Any]] = []
        ids, labels = [], []
        media: list[list[str]] = []
        for i, row in enumerate(map(dict, without_decoding(dataset))):
            conversation, kinds = with_row_number(i, self._conversation, row)
            tokenized = with_row_number(
                i,
                tokenize_row,
                conversation,
                self.chat,
                assistant_only_loss=self.assistant_only_loss,
            )
            conversations.append(conversation)
            media.append(kinds)
            ids.append(tokenized["input_ids"])
            labels.append(tokenized["labels"])
        check_trained(labels)
        if counts := Counter(kind for kinds in media for kind in kinds):
            marks = [MEDIA[kind] for kind in sorted(counts)]
            logger.warning(
                "In %d of %d rows of the %s data the guard reads %s in place of media (%s): it "
                "judges the text alone, and does not know what an image or a sound adds to it.",
                sum(map(bool, media)),
                len(media),
                name,
                f"the mark{'s'[: len(marks) - 1]} {' and '.join(marks)}",
                ", ".join(_count(counts[kind], kind) for kind in sorted(counts)),
            )
        columns = {key for conversation in conversations for key in conversation}
        return Dataset.from_dict(
            {
                **{key: [c.get(key) for c in conversations] for key in sorted(columns)},
                "media": [sorted(set(kinds)) for kinds in media],
                "input_ids": ids,
                "labels": labels,
            },
            features=Features(
                {
                    **{key: Json() for key in sorted(columns)},
                    "media": List(Value("string")),
                    "input_ids": List(Value("int64")),
                    "labels": List(Value("int64")),
                }
            ),
        )

    def _conversation(self, row: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
        """Return a row's conversation without its media, and the kind of each medium."""
        try:
            given = self.messages(row)
        except (ValueError, TypeError, LookupError, AttributeError) as error:  # the host's own code
            raise DataError(f"The trainer's collator could not read the row: {error}") from error
        kinds: list[str] = []
        conversation: dict[str, Any] = {}
        for column, messages in given.items():
            conversation[column] = []
            for message in messages:
                content = message.get("content")
                parts = content if isinstance(content, list) else []
                here = [kind for kind in map(self._kind, parts) if kind]
                if here and message.get("role") == "assistant":
                    raise DataError(
                        "An assistant's turn holds an image, a sound or a video, which no guard "
                        "reads and no language model says. Move it to the turn before, or remove "
                        "the row."
                    )
                kinds += here
                if isinstance(content, list):
                    message = {**message, "content": [_without_media(part) for part in parts]}
                self._check_spelling(message)
                conversation[column].append(dict(message))
        return conversation, kinds

    def _kind(self, part: Any) -> str | None:
        """Return a content part's kind of media; None if it is text.

        Raises:
            DataError: The part is neither text nor media that the host's collator loads.
        """
        if not isinstance(part, Mapping):
            raise DataError(
                f"A part of a content is {type(part).__name__}; it must be a mapping with 'type'."
            )
        kind = part.get("type")
        if kind in self.kinds:
            return str(kind)
        if kind != "text" or not isinstance(part.get("text"), str):
            raise DataError(
                f"A part of a content has the type {shortened(kind)}, of which the trainer's "
                "collator makes neither words nor media: the model would see nothing, or an empty "
                f"place. The collator takes {', '.join(['text', *self.kinds])}. Change the part, "
                "or remove the row."
            )
        named = sorted(set(MEDIA) & {key for key, value in part.items() if value is not None})
        if named:
            raise DataError(
                f"A part of a content is text and has {named[0]!r} too, of which some chat "
                "templates make a place for media. Give it as a part of its own."
            )
        return None

    def _check_spelling(self, message: Mapping[str, Any]) -> None:
        """Reject text that spells a media token, which the processor would take for an image."""
        for text in _strings_in(message):
            for token in self._media_spellings:
                if token in text:
                    raise DataError(
                        f"A message's text spells {token}, which the processor would take for an "
                        "image, a sound or a video that is not there. Remove it from the text, or "
                        "give the image as a part of its own ({'type': 'image'})."
                    )

    @property
    def _media_spellings(self) -> list[str]:
        tokens = self.chat.tokenizer.convert_ids_to_tokens(sorted(self.media))
        return [str(token) for token in tokens if token]


def _strings_in(message: Mapping[str, Any]) -> Iterator[str]:
    """Yield every string in a message except its role, at any depth."""
    pending: list[Any] = [value for key, value in message.items() if key != "role"]
    while pending:
        value = pending.pop()
        if isinstance(value, str):
            yield value
        elif isinstance(value, Mapping):
            pending += value.values()
        elif isinstance(value, list | tuple):
            pending += value


def _without_media(part: Mapping[str, Any]) -> dict[str, Any]:
    """Return a content part without its media: a media part keeps only its type."""
    if part.get("type") in MEDIA:
        return {"type": part["type"]}
    return {key: value for key, value in part.items() if value is not None}


def with_text_column(dataset: Dataset, scored: Dataset) -> Dataset:
    """Return raw rows with the column `star_text`: the tokens, labels and scores of their text.

    Args:
        dataset: The raw rows.
        scored: The result of `text_rows`, with `star_scores`.
    """
    names = ["media", "input_ids", "labels", SCORES_COLUMN]
    plain = scored.with_format(None).select_columns(names)
    column = [{"row": i, **row} for i, row in enumerate(plain)]
    if TEXT_COLUMN in dataset.column_names:
        dataset = dataset.remove_columns(TEXT_COLUMN)
    return dataset.add_column(TEXT_COLUMN, column, feature=_TEXT_FEATURE)


def _count(number: int, kind: str) -> str:
    plural = "" if number == 1 or kind == "audio" else "s"
    return f"{number} {kind}{plural}"


_PROBE = ("user", "assistant", "user", "assistant")


def media_tokens(processor: ProcessorMixin, chat: ChatTokenizer) -> frozenset[int]:
    """Return the ids of the tokens that stand for media in a processor's text.

    They are the tokens that the processor and the tokenizer have as attributes (`image_token`,
    `boi_token`, `audio_token`, …), without those that conversations of text contain too, such as
    end-of-turn tokens.

    Args:
        processor: The model's processor.
        chat: The processor's tokenizer and its chat template.
    """
    tokenizer = chat.tokenizer
    known = {str(token): i for i, token in added_tokens(tokenizer).items()}
    known |= {
        str(token): int(i)
        for token, i in zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True)
    }
    own = {**tokenizer.special_tokens_map, **vars(processor)}
    named = {
        known[str(value)]
        for name, value in own.items()
        if name.endswith(("token", "tag")) and str(value) in known
    }
    return frozenset(named - _text_tokens(chat))


def _text_tokens(chat: ChatTokenizer) -> set[int]:
    """Return the ids of the tokens in a conversation of text, and of bos, eos, pad and the like."""
    tokenizer = chat.tokenizer
    names = ("bos", "eos", "pad", "unk", "sep", "cls", "mask")
    ordinary = {getattr(tokenizer, f"{name}_token_id") for name in names}
    for content in ([{"type": "text", "text": "a"}], "a"):
        messages = [{"role": role, "content": content} for role in _PROBE]
        try:
            return ordinary | set(chat.encode(chat.render(messages)).ids)
        except DataError:
            continue
    return ordinary
