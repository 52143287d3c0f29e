"""Transfer labels and scores to the tokens of a host's data collator, character by character.

A row's conversation was rendered, tokenized and scored as text, with one placeholder per image. In
the collator's tokens the processor has replaced each placeholder by media tokens with white space
around them. Without these, both texts must be equal character by character, or the collator's text
must be a prefix of the row's text (if it truncates); otherwise the row is rejected.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Any

import numpy as np

from star_dss_plugin.data.columns import SCORES_COLUMN
from star_dss_plugin.data.decoding import REPLACEMENT, added_tokens, token_boundaries
from star_dss_plugin.data.templates.chat import ChatTokenizer
from star_dss_plugin.errors import DataError
from star_dss_plugin.logprobs import IGNORE_INDEX
from star_dss_plugin.visible import visible_line

__all__ = ["Alignment"]

_SHOWN = 40  # characters of each text in an error


@dataclass(frozen=True)
class _TextWithoutMedia:
    """The text of tokens without media.

    Attributes:
        text: The text without media tokens and the white space around them.
        spans: Each token's span [start, end) in `text`; empty for media tokens.
    """

    text: str
    spans: list[tuple[int, int]]


@dataclass(frozen=True, eq=False)
class Alignment:
    """Match a collator's tokens with those of the rendered conversation.

    Attributes:
        chat: The tokenizer of both.
        media: Ids of the tokens that stand for media.
    """

    chat: ChatTokenizer
    media: frozenset[int]

    def transfer(
        self, text_row: Mapping[str, Any], ids: Sequence[int], labels: Sequence[int]
    ) -> tuple[list[int], list[float]]:
        """Return labels and scores for a collator's tokens.

        Args:
            text_row: The row as text: `input_ids`, `labels` and `star_scores`.
            ids: The collator's tokens of this row, without padding.
            labels: The collator's labels for `ids`, unshifted.

        Returns:
            The labels, -100 outside assistant turns; the scores, 1 for untrained tokens. A token
            that spans two chunks has the lower of their scores.

        Raises:
            DataError: The tokens and the row have different texts, truncation removed media, or a
                label is neither -100 nor its token.
        """
        # The tokens that the processor adds around media, and a bos token that the host adds.
        inserted = (self._added_tokens & set(ids)) - set(text_row["input_ids"])
        skipped = self.media | inserted
        rendered = self._without_media(text_row["input_ids"], skipped)
        collated = self._without_media(ids, skipped)
        beginning = collated.text.rstrip(REPLACEMENT)
        if not rendered.text.startswith(beginning):
            raise _texts_differ_error(rendered.text, collated.text)
        if len(beginning) < len(rendered.text):
            self._check_truncation(text_row["input_ids"], rendered.spans, ids, len(beginning))
        trained = np.zeros(len(rendered.text) + 1, bool)
        scores = np.ones(len(rendered.text) + 1, np.float32)
        for (start, end), label, score in zip(
            rendered.spans, text_row["labels"], text_row[SCORES_COLUMN], strict=True
        ):
            if label != IGNORE_INDEX:
                trained[start:end] = True
                scores[start:end] = np.minimum(scores[start:end], np.float32(score))
        made_labels, made_scores = [IGNORE_INDEX] * len(ids), [1.0] * len(ids)
        for i, ((start, end), token, label) in enumerate(
            zip(collated.spans, ids, labels, strict=True)
        ):
            if label not in (IGNORE_INDEX, token):
                raise DataError(
                    f"The collator's label of token {i} is not the token itself. STAR-DSS needs "
                    "unshifted labels: a copy of input_ids with -100 where nothing is trained."
                )
            if label != IGNORE_INDEX and trained[start:end].any():
                made_labels[i] = token
                made_scores[i] = float(scores[start:end][trained[start:end]].min())
        return made_labels, made_scores

    def _check_truncation(
        self,
        rendered: Sequence[int],
        spans: Sequence[tuple[int, int]],
        ids: Sequence[int],
        length: int,
    ) -> None:
        """Check that truncation removed no media tokens.

        Args:
            rendered: The tokens of the row's text.
            spans: The spans of `rendered`.
            ids: The collator's tokens.
            length: Characters of the row's text that the collator kept.

        Raises:
            DataError: The model would get an image without all of its tokens.
        """
        behind = accumulate((end for _, end in spans), max)
        lost = any(
            token in self.media and end >= length
            for token, end in zip(rendered, behind, strict=True)
        )
        if lost or (ids and ids[-1] in self.media):
            raise DataError(
                f"The row was cut to {len(ids)} tokens by max_length, within or before an image, a "
                "sound or a video, of which the model would get a part or none. Raise max_length, "
                "leave it out (None), give the images a smaller size, or remove the row."
            )

    def _without_media(self, ids: Sequence[int], skipped: frozenset[int]) -> _TextWithoutMedia:
        text, ends, _ = token_boundaries(self.chat.tokenizer, ids)
        starts = [0, *ends[:-1]]
        kept = np.ones(len(text) + 1, bool)
        for start, end, token in zip(starts, ends, ids, strict=True):
            if token in skipped:
                while start > 0 and text[start - 1].isspace():
                    start -= 1
                while end < len(text) and text[end].isspace():
                    end += 1
                kept[start:end] = False
        kept[len(text) :] = False
        before = np.concatenate([[0], np.cumsum(kept)])
        spans = [
            (0, 0)
            if token in skipped
            # A token that ends inside a character has the span of that character.
            else (int(before[start]), int(before[max(end, min(start + 1, len(text)))]))
            for start, end, token in zip(starts, ends, ids, strict=True)
        ]
        letters = "".join(letter for letter, keep in zip(text, kept, strict=False) if keep)
        return _TextWithoutMedia(letters, spans)

    @cached_property
    def _added_tokens(self) -> frozenset[int]:
        return self.chat.special | frozenset(added_tokens(self.chat.tokenizer))


def _texts_differ_error(rendered: str, collated: str) -> DataError:
    same = next(
        (i for i, (a, b) in enumerate(zip(rendered, collated, strict=False)) if a != b),
        min(len(rendered), len(collated)),
    )
    shown = [visible_line(text[same : same + _SHOWN]) for text in (rendered, collated)]
    return DataError(
        f"The collator's tokens do not say what the row says, from character {same} on: the chat "
        f"template gives {shown[0]!r} and the collator {shown[1]!r}, so scores cannot be "
        "transferred. Give the row to the trainer as it is to be trained, with the template that "
        "its processor uses."
    )
