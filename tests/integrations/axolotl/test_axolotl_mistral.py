"""Media in conversations that mistral-common renders (`tokenizer_use_mistral_common`)."""

import pytest

pytest.importorskip("axolotl", reason="needs Axolotl: make test-axolotl")
pytest.importorskip("soundfile", reason="needs soundfile and opencv: make test-axolotl")
pytest.importorskip("cv2", reason="needs soundfile and opencv: make test-axolotl")

import torch
from axolotl.processing_strategies import ProcessingStrategy, VoxtralProcessingStrategy
from axolotl.utils.collators.mm_chat import MultiModalChatDataCollator
from axolotl.utils.mistral import HFMistralTokenizer
from axolotl_runs import ANSWERS, LORA, PROMPTS, chat, configuration, trained, trainer_of
from datasets import Dataset, Features, Json
from star_dss_axolotl.check import check
from star_dss_axolotl.media import media_rows
from support.guards import WordGuard
from support.mistral_models import feature_extractor, mistral3, write_tekken
from support.run_differences import history
from support.sounds import aligned_batch, tone
from support.vision_models import stripes
from transformers import VoxtralProcessor

from star_dss_plugin.data.columns import SCORES_COLUMN
from star_dss_plugin.errors import DataError

MEDIA = {
    "processor_type": "AutoProcessor",
    "tokenizer_use_mistral_common": True,
    "skip_prepare_dataset": True,
    "remove_unused_columns": False,
    "micro_batch_size": 4,
}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mistral3")
    mistral3(folder)
    for n in range(3):
        stripes(n).save(folder / f"{n}.png")
        tone(folder / f"{n}.wav", n)
    return folder


def rows(folder, kind="image", ending="png"):
    """Return conversations of two answers, with no, one and two media in turn."""
    made = []
    for n, (prompt, answer) in enumerate(zip(PROMPTS, ANSWERS, strict=True)):
        media = [{"type": kind, "path": str(folder / f"{i}.{ending}")} for i in range(n % 3)]
        made.append(
            {
                "messages": [
                    {"role": "system", "content": "be kind"},
                    {"role": "user", "content": [*media, {"type": "text", "text": prompt}]},
                    {"role": "assistant", "content": [{"type": "text", "text": answer}]},
                    {"role": "user", "content": "and [INST] </s>"},
                    {"role": "assistant", "content": answer + " yes"},
                ]
            }
        )
    return made


def vision_configuration(tmp_path, model, data=None, **changes):
    datasets = [chat(tmp_path / "chat.jsonl", data or rows(model))]
    return configuration(tmp_path, model, **{**MEDIA, "datasets": datasets, **changes})


def guarded(**options):
    return {"star_dss": {"guard": {"preset": "test-words", **options}, "chunk_size": 2}}


def test_answers_are_trained_and_scored(tmp_path, model, monkeypatch):
    read = []
    real = WordGuard.token_scores

    def token_scores(self, responses):
        read.extend(responses)
        return real(self, responses)

    monkeypatch.setattr(WordGuard, "token_scores", token_scores)
    trainer = trainer_of(tmp_path, vision_configuration(tmp_path, model))
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(8)])
    tokenizer = trainer.processing_class
    media = torch.isin(batch["input_ids"], torch.tensor([10, 12, 13]))
    assert media.sum() == 7 * 6
    assert (batch["labels"][media] == -100).all()
    assert (batch[SCORES_COLUMN][media] == 1).all()
    said = []
    for labels, scores in zip(batch["labels"], batch[SCORES_COLUMN], strict=True):
        trained = labels != -100
        said.append(tokenizer.decode(labels[trained].tolist()))
        assert (scores[~trained] == 1).all()
        assert bool((scores[trained] < 0.5).any()) == ("bad" in said[-1])
    assert sorted(said) == sorted(f"{answer}</s>{answer} yes</s>" for answer in ANSWERS)
    summary = trainer.star_dss_state.summaries["train"]
    assert summary.provenance["raw_contexts"] == 0
    contexts = {tuple(message["content"] for message in context) for context, _ in read}
    assert ("be kind", f"[image]\n[image]\n{PROMPTS[2]}") in contexts
    assert ("be kind", PROMPTS[3], ANSWERS[3], "and [INST] </s>") in contexts


def test_safe_scores_train_as_plain_finetuning_and_low_scores_do_not(tmp_path, model):
    found = {}
    for name, changes in {
        "plain": {"plugins": [], "star_dss": None},
        "safe": guarded(word="nobody says this", safe=1.0),
        "unsafe": guarded(),
    }.items():
        folder = tmp_path / name
        folder.mkdir()
        found[name] = history(
            trained(folder, vision_configuration(folder, model, **LORA, **changes))
        )
    torch.testing.assert_close(torch.tensor(found["safe"]), torch.tensor(found["plain"]))
    assert abs(found["unsafe"][0][0] - found["plain"][0][0]) > 0.1


def test_check_counts_the_rows_with_media(tmp_path, model):
    found = check(tmp_path / "config.yaml", vision_configuration(tmp_path, model), data=True)
    assert found.problems == []
    (note,) = [note for note in found.notes if note.startswith("train data")]
    assert "8 rows, 16 responses (0 without messages)" in note
    assert note.endswith("; a mark in place of media in 5 rows")


@pytest.mark.parametrize("token", ["[IMG]", "[IMG_END]", "[BEGIN_AUDIO]"])
def test_words_that_spell_a_medium_are_refused(tmp_path, model, token):
    data = rows(model)
    data[3]["messages"][3]["content"] = f"what is {token}?"
    with pytest.raises(DataError, match=rf"Row \d.*spells \{token}"):
        trainer_of(tmp_path, vision_configuration(tmp_path, model, data))


def test_a_row_that_mistral_common_refuses_is_named(tmp_path, model):
    data = rows(model)
    data[3]["messages"].pop()
    with pytest.raises(DataError, match=r"Row \d: Mistral's own code.*cannot make tokens of"):
        trainer_of(tmp_path, vision_configuration(tmp_path, model, data))


def test_the_guard_reads_marks_and_sounds_of_voxtral_are_not_trained(tmp_path, model, caplog):
    """Axolotl 0.19 to 0.21 fail on such rows, so the test makes tokenizer and collator itself."""
    write_tekken(tmp_path)
    tokenizer = HFMistralTokenizer.from_pretrained(str(tmp_path))
    processor = VoxtralProcessor(feature_extractor(), tokenizer)
    strategy = VoxtralProcessingStrategy(processor, "none")
    assert isinstance(strategy, ProcessingStrategy)
    collator = MultiModalChatDataCollator(tokenizer, strategy)
    features = Features({"messages": Json()})
    data = rows(model, "audio", "wav")
    with pytest.raises(DataError, match="Row 1: .*System messages are not yet allowed when audio"):
        media_rows(collator).text_rows(Dataset.from_list(data, features=features), "train")
    for row in data:
        row["messages"].pop(0)
    batch = aligned_batch(
        collator, media_rows(collator), Dataset.from_list(data, features=features)
    )
    assert "In 5 of 8 rows of the train data the guard reads the mark [audio]" in caplog.text
    assert len(batch["input_features"]) == 7
    sounds = torch.isin(batch["input_ids"], torch.tensor([24, 25]))
    assert sounds.sum() > 7 * 2
    assert (batch["labels"][sounds] == -100).all()
    assert (batch[SCORES_COLUMN][sounds] == 1).all()
    for labels, scores, answer in zip(batch["labels"], batch[SCORES_COLUMN], ANSWERS, strict=True):
        trained = labels != -100
        assert tokenizer.decode(labels[trained].tolist()) == f"{answer}</s>{answer} yes</s>"
        assert (scores[trained] == 0.5).all()
