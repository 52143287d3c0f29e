"""Rows with sounds in Axolotl, with a tiny Qwen2-Audio."""

import wave

import numpy as np
import pytest

pytest.importorskip("axolotl", reason="needs Axolotl: make test-axolotl")

import torch
from axolotl.processing_strategies import ProcessingStrategy, RoleBoundary
from axolotl.utils.collators.mm_chat import MultiModalChatDataCollator
from axolotl_runs import (
    ANSWERS,
    LORA,
    PROMPTS,
    chat,
    configuration,
    output_of,
    trained,
    trainer_of,
    write_config,
)
from datasets import Dataset, Features, Json
from star_dss_axolotl.media import media_rows
from support.run_differences import history
from support.sounds import aligned_batch, tone
from support.vision_models import qwen2_audio

from star_dss_plugin.data.columns import SCORES_COLUMN
from star_dss_plugin.errors import DataError

SOUNDS = {
    "processor_type": "AutoProcessor",
    "type_of_model": "Qwen2AudioForConditionalGeneration",
    "skip_prepare_dataset": True,
    "remove_unused_columns": False,
    "chat_template": "tokenizer_default",
    "micro_batch_size": 4,
    "dataloader_num_workers": 0,  # each worker would import the packages that read sounds
}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    # Axolotl loads no processor for Qwen2-Audio, but it does for a folder of this name.
    folder = tmp_path_factory.mktemp("pixtral")
    model, processor = qwen2_audio()
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    for n in range(2):
        tone(folder / f"{n}.wav", n)
    return folder


def rows(folder):
    """Return conversations with no, one and two sounds in turn."""
    made = []
    for n, (prompt, answer) in enumerate(zip(PROMPTS, ANSWERS, strict=True)):
        sounds = [{"type": "audio", "path": str(folder / f"{i}.wav")} for i in range(n % 3)]
        made.append(
            {
                "messages": [
                    {"role": "user", "content": [*sounds, {"type": "text", "text": prompt}]},
                    {"role": "assistant", "content": [{"type": "text", "text": answer}]},
                    {"role": "user", "content": [{"type": "text", "text": "and"}]},
                    {"role": "assistant", "content": [{"type": "text", "text": answer + " yes"}]},
                ]
            }
        )
    return made


def audio_configuration(tmp_path, model, data=None, **changes):
    datasets = [chat(tmp_path / "chat.jsonl", data or rows(model))]
    return configuration(tmp_path, model, **{**SOUNDS, "datasets": datasets, **changes})


def read_wave(name, sampling_rate, **_):
    """Read a sound without the package that transformers needs for it."""
    with wave.open(name) as file:
        assert file.getframerate() == sampling_rate
        return np.frombuffer(file.readframes(-1), np.int16).astype(np.float32) / 32768


def test_the_guard_reads_marks_and_sounds_are_neither_trained_nor_scored(
    tmp_path, model, monkeypatch, caplog
):
    """The test uses Axolotl's collator and needs no package that reads sounds."""
    monkeypatch.setattr("transformers.processing_utils.load_audio", read_wave)
    whole, processor = qwen2_audio()
    collator = MultiModalChatDataCollator(
        processor.tokenizer, ProcessingStrategy(processor, processor.chat_template)
    )
    raw = Dataset.from_list(rows(model), features=Features({"messages": Json()}))
    read = media_rows(collator)
    text = read.text_rows(raw, "train")
    assert text[2]["messages"][0]["content"][:2] == [{"type": "audio"}] * 2
    batch = aligned_batch(collator, read, raw)
    assert "In 5 of 8 rows of the train data the guard reads the mark [audio]" in caplog.text
    assert "(7 audio)" in caplog.text
    assert len(batch["input_features"]) == 7
    sounds = batch["input_ids"] == processor.tokenizer.convert_tokens_to_ids("<|AUDIO|>")
    assert sounds.sum() > 7
    assert (batch["labels"][sounds] == -100).all()
    assert (batch[SCORES_COLUMN][sounds] == 1).all()
    for row, answer in enumerate(ANSWERS):
        trained = batch["labels"][row] != -100
        said = processor.tokenizer.decode(batch["labels"][row][trained])
        assert said == f"{answer}<|im_end|>{answer} yes<|im_end|>"
        assert (batch[SCORES_COLUMN][row][trained] == 0.5).all()
    batch.pop(SCORES_COLUMN)
    assert float(whole(**batch).loss) > 0


@pytest.fixture
def reader():
    """Skip the test if transformers has no package that reads sounds."""
    pytest.importorskip("librosa", reason="needs librosa, which reads sounds")


# librosa imports these modules of the standard library.
ignore_deprecations = pytest.mark.filterwarnings("ignore:'(aifc|audioop|sunau)' is deprecated")


@pytest.fixture
def answers_alone(monkeypatch):
    """Let Axolotl train the assistant's turns only; on its own it trains the questions, too.

    Its setting for that, `role_boundaries`, raises a TypeError.
    """

    def boundaries(self):
        start, end = map(self.processor.tokenizer.encode, ("<|im_start|>assistant\n", "<|im_end|>"))
        return [RoleBoundary("assistant", start, end)]

    monkeypatch.setattr(ProcessingStrategy, "_build_role_boundaries", boundaries)


@ignore_deprecations
@pytest.mark.usefixtures("reader", "answers_alone")
def test_safe_scores_train_as_plain_finetuning_and_low_scores_do_not(tmp_path, model):
    def guard(**options):
        return {"star_dss": {"guard": {"preset": "test-words", **options}, "chunk_size": 2}}

    found = {}
    for name, changes in {
        "plain": {"plugins": [], "star_dss": None},
        "safe": guard(word="nobody says this", safe=1.0),
        "unsafe": guard(),
    }.items():
        folder = tmp_path / name
        folder.mkdir()
        found[name] = history(
            trained(folder, audio_configuration(folder, model, **LORA, **changes))
        )
    torch.testing.assert_close(torch.tensor(found["safe"]), torch.tensor(found["plain"]))
    assert abs(found["unsafe"][0][0] - found["plain"][0][0]) > 0.1


@ignore_deprecations
@pytest.mark.usefixtures("reader")
def test_a_missing_sound_stops_the_run_and_names_the_row(tmp_path, model):
    data = rows(model)
    data[4]["messages"][0]["content"][0]["path"] = str(tmp_path / "gone.wav")
    trainer = trainer_of(tmp_path, audio_configuration(tmp_path, model, data))
    said = [row["messages"][1]["content"][0]["text"] for row in trainer.train_dataset]
    row = said.index(ANSWERS[4])
    with pytest.raises(DataError, match=f"Row {row}: .*check its path and format"):
        trainer.data_collator([trainer.train_dataset[i] for i in range(8)])


@pytest.mark.slow
@pytest.mark.usefixtures("reader")
def test_the_command_trains_on_sounds(tmp_path, model, start):
    config = write_config(tmp_path, audio_configuration(tmp_path, model, **LORA))
    out = output_of(start("train", config, "--launcher", "python"))
    assert "the guard reads the mark [audio]" in out
    assert "star_dss/ce_unweighted" in out
