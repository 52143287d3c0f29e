"""Read rows with images as TRL's vision collator does, and reject media that it does not read."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from datasets import Dataset
from transformers import AutoProcessor, ProcessorMixin
from trl.data_utils import is_conversational, prepare_multimodal_messages

from star_dss_plugin.data.conversations import MEDIA, conversation_of
from star_dss_plugin.data.media import without_decoding
from star_dss_plugin.data.media_rows import MediaRows, media_tokens
from star_dss_plugin.data.rows import with_row_number
from star_dss_plugin.data.templates.chat import ChatTokenizer
from star_dss_plugin.errors import ConfigError, DataError
from star_dss_plugin.smollm2 import resolve_model

__all__ = ["has_images", "load_processor", "make_media_rows", "reject_media"]


def has_images(columns: Iterable[str]) -> bool:
    """Return whether TRL treats rows with these columns as rows with images."""
    return bool({"image", "images"} & set(columns))


def load_processor(name: str) -> ProcessorMixin:
    """Load a model's processor without running remote code.

    Args:
        name: Hugging Face Hub id or folder.

    Raises:
        ConfigError: The model has no processor, or it cannot be loaded.
    """
    try:
        found = AutoProcessor.from_pretrained(resolve_model(name), trust_remote_code=False)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise ConfigError(
            f"The processor of {name!r} cannot be loaded: {error}. Rows with images need a model "
            "that reads them."
        ) from error
    if not isinstance(found, ProcessorMixin):  # of a text model AutoProcessor loads the tokenizer
        raise ConfigError(
            f"{name!r} has no processor: it reads text alone, and the rows hold images. Name a "
            "model that reads them, or remove the column."
        )
    return found


def make_media_rows(processor: Any, template: str | None, assistant_only_loss: bool) -> MediaRows:
    """Return the reader of rows with images for TRL's vision collator.

    Args:
        processor: The model's processor.
        template: The chat template that TRL uses; None: the processor's own.
        assistant_only_loss: TRL's option of that name.
    """
    chat = ChatTokenizer(processor.tokenizer, template or processor.chat_template)
    return MediaRows(chat, media_tokens(processor, chat), _conversation, assistant_only_loss)


def _conversation(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return a row's messages as TRL's collator passes them to the processor.

    Raises:
        ValueError: The row is no conversation, or has more or fewer images than placeholders.
    """
    single = row.get("image")
    images = row.get("images") if single is None else [single]
    if row.get("messages") is not None:
        return {"messages": prepare_multimodal_messages(row["messages"], images=images)}
    if row.get("prompt") is None or row.get("completion") is None or not is_conversational(row):
        raise ValueError(
            f"it has {sorted(name for name in row if row[name] is not None)}, and rows with images "
            "must be conversations: messages, or a prompt and a completion of messages"
        )
    return {
        "prompt": prepare_multimodal_messages(row["prompt"], images=images),
        "completion": prepare_multimodal_messages(row["completion"]),
    }


def reject_media(dataset: Any, processor: Any, name: str) -> Any:
    """Check that no row that TRL tokenizes as text holds media.

    TRL would keep the placeholder tokens of the media without the media themselves: the model would
    be trained on answers about an image or a sound that it does not get.

    Args:
        dataset: A data set or a stream, as the user gave it.
        processor: The processor that tokenizes it; with a tokenizer nothing is checked.
        name: Name of the data ("train", "eval", …) for messages.

    Returns:
        The data set; a stream is returned as one that checks each row when it is read.

    Raises:
        DataError: A row holds media; its number is in the message.
    """
    if not isinstance(processor, ProcessorMixin):
        return dataset
    check = _media_check(name)
    if isinstance(dataset, Dataset):
        for i, row in enumerate(without_decoding(dataset)):
            with_row_number(i, check, row)
        return dataset

    def checked(row: dict[str, Any], i: int) -> dict[str, Any]:
        with_row_number(i, check, row)
        return row

    return dataset.map(checked, with_indices=True)


def _media_check(name: str) -> Callable[[Mapping[str, Any]], None]:
    def check(row: Mapping[str, Any]) -> None:
        said = [conversation_of(row), row.get("prompt"), row.get("completion")]
        for messages in said:
            for message in messages if isinstance(messages, list) else ():
                content = message.get("content") if isinstance(message, Mapping) else None
                for part in content if isinstance(content, list) else ():
                    kind = part.get("type") if isinstance(part, Mapping) else None
                    if kind in MEDIA:
                        raise DataError(
                            f"A message of the {name} data holds a part of type {kind!r}, and TRL "
                            "opens only images, and only from a column 'images' (or 'image') that "
                            "the first row has: it would train the answer without the medium. Put "
                            "images into that column, in the order of their parts; train on sounds "
                            "and videos with Axolotl (processor_type)."
                        )

    return check
