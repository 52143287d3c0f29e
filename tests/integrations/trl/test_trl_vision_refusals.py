"""Rows with images that are refused."""

import pytest

pytest.importorskip("trl")

from datasets import Dataset, Features, Image, Json, List
from star_dss_trl import StarDSSTrainer
from support.trl_runs import arguments
from support.vision_models import MAKE, picture, smolvlm
from support.vision_runs import batch_of, each_model, talk, talks, vision_trainer
from trl import SFTConfig, SFTTrainer

from star_dss_plugin import attach
from star_dss_plugin.errors import ConfigError, DataError


@pytest.mark.parametrize("token", ["<image>", "<fake_token_around_image>"])
def test_words_that_spell_an_image_do_not_become_one(tmp_path, token):
    rows = [talk("hello", "2"), talk(f"is {token} bad?", "no")]
    with pytest.raises(DataError, match=f"Row 1.*spells {token}"):
        vision_trainer(tmp_path, smolvlm(), Dataset.from_list(rows))


@each_model
def test_an_answer_that_spells_an_image_is_refused(tmp_path, name):
    token = {"smolvlm": "<image>", "gemma3": "<start_of_image>"}[name]
    rows = [talk("hello", "2"), talk("is", f"it's {token}")]
    with pytest.raises(DataError, match=f"Row 1.*spells {token}"):
        vision_trainer(tmp_path, MAKE[name](), Dataset.from_list(rows))


def test_an_image_that_an_assistant_says_is_refused(tmp_path):
    row = talk("hello", "2")
    row["messages"][1]["content"].insert(0, {"type": "image", "text": None})
    row["images"] *= 2
    with pytest.raises(DataError, match="Row 1.*assistant's turn holds an image"):
        vision_trainer(tmp_path, smolvlm(), Dataset.from_list([talk("hello", "2"), row]))


def test_a_missing_image_is_refused(tmp_path):
    row = talk("hello", "2", 2)
    row["images"].pop()
    with pytest.raises(DataError, match="Row 0.*Number of images"):
        vision_trainer(tmp_path, smolvlm(), Dataset.from_list([row]))


def test_texts_without_messages_are_refused(tmp_path):
    data = Dataset.from_list([{"text": "<image> what is it?", "images": [picture()]}])
    with pytest.raises(DataError, match="must be conversations"):
        vision_trainer(tmp_path, smolvlm(), data)


def test_a_row_that_changed_stops_the_run_with_its_number(tmp_path):
    trainer = vision_trainer(tmp_path, smolvlm(), talks())

    def change(row, i):
        if i == 3:
            row["messages"][1]["content"][0]["text"] += " really"
        return row

    trainer.train_dataset = trainer.train_dataset.map(change, with_indices=True)
    batch_of(trainer, [2])
    with pytest.raises(DataError, match=r"Row 3.*do not say what the row says.*really"):
        batch_of(trainer, [3])


def test_scores_that_changed_stop_the_run(tmp_path):
    trainer = vision_trainer(tmp_path, smolvlm(), talks())

    def change(row):
        row["star_text"]["star_scores"] = [1.0] * len(row["star_text"]["star_scores"])
        return row

    trainer.train_dataset = trainer.train_dataset.map(change)
    with pytest.raises(DataError, match="not one that was scored"):
        trainer.train()


def test_rows_that_were_not_scored_stop_the_run(tmp_path):
    trainer = vision_trainer(tmp_path, smolvlm(), talks())
    trainer.train_dataset = talks()
    with pytest.raises(DataError, match="was not scored"):
        trainer.train()


def test_attach_names_the_trainer_for_rows_with_images(tmp_path):
    model, processor = smolvlm()
    args = arguments(tmp_path, SFTConfig, max_length=None)
    trainer = SFTTrainer(model, args, train_dataset=talks(), processing_class=processor)
    with pytest.raises(DataError, match="Rows with images need StarDSSTrainer"):
        attach(trainer, guard="test-words")


def test_a_column_of_scores_is_refused(tmp_path):
    data = talks().add_column("star_scores", [[1.0]] * 8)
    with pytest.raises(DataError, match="brings star_scores"):
        vision_trainer(tmp_path, smolvlm(), data)


def test_a_precomputed_reference_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="in the data collator"):
        vision_trainer(tmp_path, smolvlm(), talks(), reference="precomputed")


OTHERS = {
    "audio": {"type": "audio", "audio": "a.wav", "text": None},
    "audio-url": {"type": "audio_url", "audio_url": "a.wav", "text": None},
    "video": {"type": "video", "video": "a.mp4", "text": None},
    "image-url": {"type": "image_url", "image_url": "a.png", "text": None},
    "file": {"type": "file", "file": "a.pdf", "text": None},
    "nothing": {"type": "text", "text": None},
}


@pytest.mark.parametrize("kind", OTHERS)
def test_parts_of_unsupported_types_are_refused(tmp_path, kind):
    rows = [talk("hello", "2"), talk("is", "no")]
    rows[1]["messages"][0]["content"].append(OTHERS[kind])
    words = f"Row 1.*the type '{OTHERS[kind]['type']}', of which .* neither words nor media"
    with pytest.raises(DataError, match=words):
        vision_trainer(tmp_path, smolvlm(), rows_with_own_keys(rows))


def rows_with_own_keys(rows):
    """Return rows whose parts keep their own keys, in place of all keys with None."""
    return (
        Dataset.from_list(
            [{"messages": row["messages"]} for row in rows], features=Features({"messages": Json()})
        )
        .add_column("images", [[]] * len(rows))
        .map(
            lambda row, i: {"images": rows[i]["images"]},
            with_indices=True,
            features=Features({"messages": Json(), "images": List(Image())}),
        )
    )


def test_a_text_part_that_names_an_image_too_is_refused(tmp_path):
    rows = [talk("hello", "2"), talk("is", "no")]
    rows[1]["messages"][0]["content"][1]["image"] = "a.png"
    with pytest.raises(DataError, match="Row 1.*is text and has 'image' too"):
        vision_trainer(tmp_path, smolvlm(), rows_with_own_keys(rows))


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("kind", ["audio", "video", "image"])
def test_media_that_trl_does_not_open_are_refused(tmp_path, kind, stream):
    """Without a column of images TRL keeps the tokens of media, and drops the media."""
    rows = [talk("hello", "2", 0), talk("is", "no", 0)]
    rows[1]["messages"][0]["content"].append({"type": kind, kind: "a.file", "text": None})
    data = Dataset.from_list([{"messages": row["messages"]} for row in rows])
    with pytest.raises(
        DataError, match=f"Row 1.*a part of type '{kind}', and TRL opens only images"
    ):
        vision_trainer(tmp_path, smolvlm(), data.to_iterable_dataset() if stream else data)


@each_model
def test_a_row_that_is_cut_within_its_images_is_refused_with_its_number(tmp_path, name):
    """An image of many tokens fills max_length before the question and the answer."""
    rows = [talk("hello", "2", 0), talk("is", "no", 3)]
    model, processor = MAKE[name]()
    trainer = StarDSSTrainer(
        model,
        args=arguments(tmp_path, max_length=24),
        train_dataset=Dataset.from_list(rows),
        processing_class=processor,
    )
    batch_of(trainer, [0])
    with pytest.raises(DataError, match="Row 1.*max_length"):
        batch_of(trainer, [0, 1])
