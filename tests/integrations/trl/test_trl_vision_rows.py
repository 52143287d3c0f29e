"""Rows with images in TRL: which tokens are trained and scored, and what the guard reads."""

import pytest

pytest.importorskip("trl")

import torch
from datasets import Dataset
from star_dss_trl import StarDSSTrainer
from support.guards import WordGuard
from support.trl_runs import ANSWERS, PROMPTS, arguments
from support.vision_models import MAKE, picture, smolvlm
from support.vision_runs import batch_of, each_model, talk, talks, vision_trainer

from star_dss_plugin.data.columns import SCORES_COLUMN


@each_model
def test_assistant_turns_are_trained_and_scored(tmp_path, name):
    trainer = vision_trainer(tmp_path, MAKE[name](), talks())
    tokenizer = trainer.processing_class.tokenizer
    batch = batch_of(trainer, range(8))
    end = "<|im_end|>" if name == "smolvlm" else "<end_of_turn>"
    for row, answer in enumerate(ANSWERS):
        trained = batch["labels"][row] != -100
        said = tokenizer.decode(batch["labels"][row][trained])
        assert said == f"{answer}{end}{answer} yes{end}"
        scores = batch[SCORES_COLUMN][row]
        assert (scores[~trained] == 1).all()
        if "bad" in answer:
            assert (scores[trained] < 0.5).any()
        else:
            assert (scores[trained] > 0.5).all()


def test_the_guard_reads_a_mark_where_an_image_stood(tmp_path, monkeypatch):
    read = []
    real = WordGuard.token_scores

    def token_scores(self, responses):
        read.extend(responses)
        return real(self, responses)

    monkeypatch.setattr(WordGuard, "token_scores", token_scores)
    vision_trainer(tmp_path, smolvlm(), Dataset.from_list([talk("how are you?", "i am fine", 2)]))
    contexts = sorted(([m["content"] for m in context], text) for context, text in read)
    first = "[image]\n[image]\nhow are you?"
    assert contexts == [
        ([first], "i am fine"),
        ([first, "i am fine", "and how are you?"], "i am fine yes"),
    ]


def test_rows_are_cut_with_their_scores(tmp_path):
    data = Dataset.from_list([talk(p, a, 0) for p, a in zip(PROMPTS, ANSWERS, strict=True)])
    model, processor = smolvlm()
    args = arguments(tmp_path, max_length=40)
    trainer = StarDSSTrainer(model, args=args, train_dataset=data, processing_class=processor)
    whole = vision_trainer(tmp_path, smolvlm(), data)
    cut, full = batch_of(trainer, range(8)), batch_of(whole, range(8))
    assert cut["input_ids"].shape[1] == 40 < full["input_ids"].shape[1]
    for column in ("labels", SCORES_COLUMN):
        assert torch.equal(cut[column], full[column][:, :40])


@each_model
def test_an_empty_answer_trains_its_end(tmp_path, name):
    trainer = vision_trainer(
        tmp_path, MAKE[name](), Dataset.from_list([talk("hello", ""), talk("is", "2")])
    )
    batch = batch_of(trainer, [0, 1])
    tokenizer = trainer.processing_class.tokenizer
    said = tokenizer.decode(batch["labels"][0][batch["labels"][0] != -100])
    assert said.endswith(tokenizer.eos_token)
    assert "yes" in said


@each_model
def test_an_answer_quoted_in_the_question_is_trained_in_its_own_turn(tmp_path, name):
    answer = "it's bad"
    rows = [talk(f"who said {answer} and {answer}?", answer), talk("hello", "2")]
    trainer = vision_trainer(tmp_path, MAKE[name](), Dataset.from_list(rows))
    batch = batch_of(trainer, [0])
    trained = batch["labels"][0] != -100
    tokenizer = trainer.processing_class.tokenizer
    end = "<|im_end|>" if name == "smolvlm" else "<end_of_turn>"
    assert tokenizer.decode(batch["labels"][0][trained]) == f"{answer}{end}{answer} yes{end}"
    first = int(trained.nonzero()[0])
    before = tokenizer.decode(batch["input_ids"][0][:first])
    assert before.count(answer) == 2


@each_model
def test_images_in_the_middle_of_several_turns(tmp_path, name):
    row = talk("hello", "2", 1)
    row["messages"][2]["content"] = [
        {"type": "text", "text": "and "},
        *[{"type": "image", "text": None}] * 2,
        {"type": "text", "text": " bad?"},
    ]
    row["images"] = [picture(n) for n in range(3)]
    trainer = vision_trainer(tmp_path, MAKE[name](), Dataset.from_list([row, talk("is", "no", 0)]))
    batch = batch_of(trainer, [0, 1])
    tokenizer = trainer.processing_class.tokenizer
    said = tokenizer.decode(batch["labels"][0][batch["labels"][0] != -100])
    end = "<|im_end|>" if name == "smolvlm" else "<end_of_turn>"
    assert said == f"2{end}2 yes{end}"
    trainer.train()
