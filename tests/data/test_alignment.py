"""Scores of a rendered conversation on the tokens that a processor made of it."""

import re

import pytest
from datasets import Dataset
from support.models import tokenized

from star_dss_plugin.data.alignment import Alignment
from star_dss_plugin.data.conversations import text_of
from star_dss_plugin.data.media_rows import MediaRows
from star_dss_plugin.data.templates.chat import ChatTokenizer
from star_dss_plugin.errors import DataError


def ids_of(tokenizer, pieces):
    """Return the tokens of pieces that are tokenized one by one."""
    return [token for piece in pieces for token in tokenized(tokenizer, piece)]


@pytest.fixture
def image_token(tokenizer):
    """Return the id of `<|endoftext|>`, which stands for an image in these tests."""
    return tokenizer.convert_tokens_to_ids("<|endoftext|>")


@pytest.fixture
def alignment(tokenizer, image_token):
    """Return the alignment that skips image tokens."""
    return Alignment(ChatTokenizer(tokenizer), frozenset([image_token]))


def text_row(tokenizer, before, answer, score=0.25):
    """Return a row of text: `answer` is trained, and its last token has a lower score."""
    head, trained = ids_of(tokenizer, before), ids_of(tokenizer, answer)
    return {
        "input_ids": head + trained,
        "labels": [-100] * len(head) + trained,
        "star_scores": [1.0] * len(head) + [score] * (len(trained) - 1) + [0.125],
    }


def test_image_tokens_and_surrounding_white_space_are_skipped(tokenizer, alignment):
    sign = "<|endoftext|>"
    row = text_row(
        tokenizer, ["<|im_start|>user\n", sign, "who?<|im_end|>"], ["the dog", "<|im_end|>"]
    )
    ids = ids_of(
        tokenizer,
        ["<|im_start|>user\n", "\n\n", sign, "\n", sign, "\n\n", "who?<|im_end|>the dog<|im_end|>"],
    )
    labels, scores = alignment.transfer(row, ids, ids)
    trained = len(ids_of(tokenizer, ["the dog<|im_end|>"]))
    assert labels == [-100] * (len(ids) - trained) + ids[-trained:]
    assert scores == [1.0] * (len(ids) - trained) + [0.25] * (trained - 1) + [0.125]


def test_other_tokens_of_the_same_text_get_the_scores_of_their_characters(tokenizer, alignment):
    row = text_row(tokenizer, ["a"], ["the lazy dog"])
    letters = [tokenizer.convert_tokens_to_ids(c) for c in "athe"]
    ids = letters + ids_of(tokenizer, [" lazy dog"])
    labels, scores = alignment.transfer(row, ids, ids)
    assert labels == [-100, *ids[1:]]
    assert scores[1:4] == [0.25] * 3
    assert scores[-1] == 0.125


def test_a_token_across_a_chunk_boundary_has_the_lower_score(tokenizer, alignment):
    letters = [tokenizer.convert_tokens_to_ids(c) for c in "the"]
    row = {"input_ids": letters, "labels": letters, "star_scores": [0.75, 0.5, 0.25]}
    (whole,) = ids_of(tokenizer, ["the"])
    assert alignment.transfer(row, [whole], [whole]) == ([whole], [0.25])


def test_characters_of_several_tokens_keep_their_scores(tokenizer, alignment):
    row = text_row(tokenizer, ["a"], ["né 漢字 🙂", "<|im_end|>"])
    assert alignment.transfer(row, row["input_ids"], row["input_ids"]) == (
        row["labels"],
        row["star_scores"],
    )
    # The row is cut within the last character before the end of the turn.
    ids = row["input_ids"][:-2]
    assert alignment.transfer(row, ids, ids) == (row["labels"][:-2], row["star_scores"][:-2])


def test_tokens_without_a_host_label_get_no_label(tokenizer, alignment):
    row = text_row(tokenizer, ["a"], ["the dog", "<|im_end|>"])
    labels = [*row["labels"][:-1], -100]
    found = alignment.transfer(row, row["input_ids"], labels)
    assert found == (labels, [*row["star_scores"][:-1], 1.0])


def test_tokens_of_another_text_are_refused(tokenizer, alignment):
    row = text_row(tokenizer, ["a"], ["the dog"])
    ids = ids_of(tokenizer, ["athe cat"])
    with pytest.raises(DataError, match=re.escape("from character 5 on")):
        alignment.transfer(row, ids, ids)
    more = [*row["input_ids"], *ids_of(tokenizer, [" barks"])]
    with pytest.raises(DataError, match="' barks'"):
        alignment.transfer(row, more, more)


def test_shifted_labels_are_refused(tokenizer, alignment):
    row = text_row(tokenizer, ["a"], ["the dog"])
    ids = row["input_ids"]
    with pytest.raises(DataError, match="unshifted labels"):
        alignment.transfer(row, ids, [*ids[1:], -100])


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (None, ""),
        ("words", "words"),
        ([{"type": "text", "text": "a "}, {"type": "text", "text": "b"}], "a b"),
        ([{"type": "image"}, {"type": "text", "text": "what?"}], "[image]\nwhat?"),
        ([{"type": "text", "text": "what?\n"}, {"type": "image", "text": None}], "what?\n[image]"),
        (
            [{"type": "image_url"}, {"type": "audio"}, {"type": "video"}],
            "[image]\n[audio]\n[video]",
        ),
        ([{"type": "thinking", "text": None}], ""),
    ],
)
def test_content_parts_without_text_become_marks(content, text):
    assert text_of(content) == text


def test_a_row_that_the_hosts_collator_cannot_read_is_named(tokenizer):
    """Axolotl takes the first image of an empty list."""
    rows = MediaRows(ChatTokenizer(tokenizer), frozenset(), lambda row: row["images"][0])
    with pytest.raises(DataError, match="^Row 0: The trainer's collator could not read the row"):
        rows.text_rows(Dataset.from_list([{"images": []}]), "train")
