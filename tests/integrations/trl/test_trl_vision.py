"""Vision-language data in TRL: scored as text before training, laid onto the collator's tokens."""

import json
import subprocess
import sys

import pytest

pytest.importorskip("trl")

import torch
import yaml
from datasets import Dataset, Features, Image, Json, List
from peft import LoraConfig, get_peft_model
from star_dss_trl import StarDSSTrainer
from star_dss_trl.check import check
from support.guards import WordGuard
from support.models import tiny_llama
from support.paths import TESTS
from support.trl_runs import ANSWERS, PROMPTS, Stop, arguments, history, lora_config
from support.vision_models import MAKE, gemma3, picture, smolvlm
from transformers import AutoProcessor
from trl import SFTConfig, SFTTrainer

from star_dss_plugin import attach
from star_dss_plugin.data.columns import SCORES_COLUMN
from star_dss_plugin.errors import ConfigError, DataError
from star_dss_plugin.training.late import Carriers, LateCollator


def talk(prompt, answer, images=1):
    parts = [{"type": "image", "text": None}] * images
    return {
        "messages": [
            {"role": "user", "content": [*parts, {"type": "text", "text": prompt}]},
            {"role": "assistant", "content": [{"type": "text", "text": answer}]},
            {"role": "user", "content": [{"type": "text", "text": "and " + prompt}]},
            {"role": "assistant", "content": [{"type": "text", "text": answer + " yes"}]},
        ],
        "images": [picture(30 * n) for n in range(images)],
    }


def talks():
    counts = [1, 0, 2, 1, 3, 1, 0, 1]
    return Dataset.from_list(
        [talk(p, a, n) for p, a, n in zip(PROMPTS, ANSWERS, counts, strict=True)]
    )


def asked_and_answered():
    """Rows of a prompt and a completion whose contents are texts, as TRL takes them too."""
    return Dataset.from_list(
        [
            {
                "prompt": [{"role": "user", "content": p}],
                "completion": [{"role": "assistant", "content": a}],
                "images": [picture(30 * n)],
            }
            for n, (p, a) in enumerate(zip(PROMPTS, ANSWERS, strict=True))
        ]
    )


def make(tmp_path, parts, data, peft_config=None, **changes):
    model, processor = parts
    return StarDSSTrainer(
        model,
        args=arguments(tmp_path, max_length=None, **changes),
        train_dataset=data,
        processing_class=processor,
        peft_config=peft_config,
    )


def batch_of(trainer, rows):
    return trainer.data_collator([trainer.train_dataset[i] for i in rows])


def numbers(trainer):
    """Return losses and gradient norms, step by step."""
    return [number for step in history(trainer) for number in step]


@pytest.fixture
def model_folder(tmp_path, tokenizer):
    folder = tmp_path / "text-model"
    tiny_llama(len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(params=sorted(MAKE))
def name(request):
    return request.param


def test_what_assistants_say_is_trained_and_scored(tmp_path, name):
    trainer = make(tmp_path, MAKE[name](), talks())
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


@pytest.mark.parametrize("data", [talks, asked_and_answered])
def test_a_run(tmp_path, capsys, caplog, name, data):
    trainer = make(tmp_path, MAKE[name](), data())
    trainer.train()
    assert "STAR-DSS is active" in capsys.readouterr().out
    found = history(trainer)
    assert len(found) == 3
    assert found[-1][0] < found[0][0]
    assert "the guard reads the mark [image]" in caplog.text


def test_text_rows_train_as_they_do_without_a_processor(tmp_path):
    rows = [talk(p, a, 0) for p, a in zip(PROMPTS, ANSWERS, strict=True)]
    model, processor = smolvlm()
    late = make(tmp_path, (model, processor), Dataset.from_list(rows))
    tokenizer = processor.tokenizer
    tokenizer.chat_template = processor.chat_template
    plain = StarDSSTrainer(
        smolvlm()[0],
        args=arguments(tmp_path, max_length=None),
        train_dataset=Dataset.from_list([{"messages": row["messages"]} for row in rows]),
        processing_class=tokenizer,
    )
    assert plain.star_dss_state.reference.kind == "precomputed"
    assert late.star_dss_state.reference.kind == "copy"
    one, two = batch_of(late, range(8)), batch_of(plain, range(8))
    for column in ("input_ids", "labels", SCORES_COLUMN):
        assert torch.equal(one[column], two[column])
    late.train()
    plain.train()
    assert numbers(late) == pytest.approx(numbers(plain), abs=1e-6)
    assert late.state.log_history[-2]["star_dss/kl"] > 0


def test_the_guard_reads_a_mark_where_an_image_stood(tmp_path, monkeypatch):
    read = []
    real = WordGuard.token_scores

    def token_scores(self, responses):
        read.extend(responses)
        return real(self, responses)

    monkeypatch.setattr(WordGuard, "token_scores", token_scores)
    make(tmp_path, smolvlm(), Dataset.from_list([talk("how are you?", "i am fine", 2)]))
    contexts = sorted(([m["content"] for m in context], text) for context, text in read)
    first = "[image]\n[image]\nhow are you?"
    assert contexts == [
        ([first], "i am fine"),
        ([first, "i am fine", "and how are you?"], "i am fine yes"),
    ]


@pytest.mark.parametrize("estimator", ["k2", "full"])
def test_an_adapter_is_switched_off_for_the_reference(tmp_path, name, estimator):
    trainer = make(tmp_path, MAKE[name](), talks(), lora_config(), kl_estimator=estimator)
    assert trainer.star_dss_state.reference.kind == "adapter"
    trainer.train()
    assert len(history(trainer)) == 3


def test_a_named_reference_reads_images_too(tmp_path, name):
    parts = MAKE[name]()
    folder = tmp_path / "start"
    parts[0].save_pretrained(folder)
    parts[1].tokenizer.save_pretrained(folder)
    trainer = make(tmp_path, parts, talks(), reference=str(folder))
    assert trainer.star_dss_state.reference.kind == "model"
    trainer.train()
    copied = make(tmp_path, MAKE[name](), talks(), reference="copy")
    copied.train()
    assert numbers(trainer) == pytest.approx(numbers(copied), abs=1e-5)


def test_nothing_can_be_computed_before_there_are_tokens(tmp_path):
    with pytest.raises(ConfigError, match="in the data collator"):
        make(tmp_path, smolvlm(), talks(), reference="precomputed")


def test_rows_are_cut_with_their_scores(tmp_path):
    data = Dataset.from_list([talk(p, a, 0) for p, a in zip(PROMPTS, ANSWERS, strict=True)])
    model, processor = smolvlm()
    args = arguments(tmp_path, max_length=40)
    trainer = StarDSSTrainer(model, args=args, train_dataset=data, processing_class=processor)
    whole = make(tmp_path, smolvlm(), data)
    cut, full = batch_of(trainer, range(8)), batch_of(whole, range(8))
    assert cut["input_ids"].shape[1] == 40 < full["input_ids"].shape[1]
    for column in ("labels", SCORES_COLUMN):
        assert torch.equal(cut[column], full[column][:, :40])


@pytest.mark.parametrize("token", ["<image>", "<fake_token_around_image>"])
def test_words_that_spell_an_image_do_not_become_one(tmp_path, token):
    rows = [talk("hello", "2"), talk(f"is {token} bad?", "no")]
    with pytest.raises(DataError, match=f"Row 1.*spells {token}"):
        make(tmp_path, smolvlm(), Dataset.from_list(rows))


def test_an_image_that_an_assistant_says_is_refused(tmp_path):
    row = talk("hello", "2")
    row["messages"][1]["content"].insert(0, {"type": "image", "text": None})
    row["images"] *= 2
    with pytest.raises(DataError, match="Row 1.*assistant's turn holds an image"):
        make(tmp_path, smolvlm(), Dataset.from_list([talk("hello", "2"), row]))


def test_images_that_are_not_there_are_refused(tmp_path):
    row = talk("hello", "2", 2)
    row["images"].pop()
    with pytest.raises(DataError, match="Row 0.*Number of images"):
        make(tmp_path, smolvlm(), Dataset.from_list([row]))


def test_texts_without_messages_are_refused(tmp_path):
    data = Dataset.from_list([{"text": "<image> what is it?", "images": [picture()]}])
    with pytest.raises(DataError, match="must be conversations"):
        make(tmp_path, smolvlm(), data)


def test_an_empty_answer_trains_its_end(tmp_path, name):
    trainer = make(tmp_path, MAKE[name](), Dataset.from_list([talk("hello", ""), talk("is", "2")]))
    batch = batch_of(trainer, [0, 1])
    tokenizer = trainer.processing_class.tokenizer
    said = tokenizer.decode(batch["labels"][0][batch["labels"][0] != -100])
    assert said.endswith(tokenizer.eos_token)
    assert "yes" in said


def test_a_row_that_changed_stops_the_run_with_its_number(tmp_path):
    trainer = make(tmp_path, smolvlm(), talks())

    def change(row, i):
        if i == 3:
            row["messages"][1]["content"][0]["text"] += " really"
        return row

    trainer.train_dataset = trainer.train_dataset.map(change, with_indices=True)
    batch_of(trainer, [2])
    with pytest.raises(DataError, match=r"Row 3.*do not say what the row says.*really"):
        batch_of(trainer, [3])


def test_scores_that_changed_stop_the_run(tmp_path):
    trainer = make(tmp_path, smolvlm(), talks())

    def change(row):
        row["star_text"]["star_scores"] = [1.0] * len(row["star_text"]["star_scores"])
        return row

    trainer.train_dataset = trainer.train_dataset.map(change)
    with pytest.raises(DataError, match="not one that was scored"):
        trainer.train()


def test_rows_that_were_not_scored_stop_the_run(tmp_path):
    trainer = make(tmp_path, smolvlm(), talks())
    trainer.train_dataset = talks()
    with pytest.raises(DataError, match="was not scored"):
        trainer.train()


def test_evaluation_data_is_scored_too(tmp_path):
    model, processor = smolvlm()
    trainer = StarDSSTrainer(
        model,
        args=arguments(tmp_path, max_length=None),
        train_dataset=talks(),
        eval_dataset=talks().select(range(4)),
        processing_class=processor,
    )
    one = trainer.evaluate()
    two = trainer.evaluate(talks().select(range(4)))
    assert one["eval_loss"] == pytest.approx(two["eval_loss"], abs=1e-6)
    assert trainer.star_dss_state.summaries["eval"].responses == 8


def test_adapters_on_both_towers_train(tmp_path):
    config = LoraConfig(r=4, target_modules="all-linear", exclude_modules=["lm_head"])
    trainer = make(tmp_path, gemma3(), talks(), config)
    trainer.train()
    assert len(history(trainer)) == 3


def test_attach_says_who_trains_on_images(tmp_path):
    model, processor = smolvlm()
    args = arguments(tmp_path, SFTConfig, max_length=None)
    trainer = SFTTrainer(model, args, train_dataset=talks(), processing_class=processor)
    with pytest.raises(DataError, match="Rows with images need StarDSSTrainer"):
        attach(trainer, guard="test-words")


def test_a_resumed_run_goes_on_as_if_it_had_not_stopped(tmp_path):
    whole = make(tmp_path / "whole", smolvlm(), talks(), max_steps=4)
    whole.train()
    steps = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    first = make(tmp_path / "parts", smolvlm(), talks(), **steps)
    first.add_callback(Stop())
    first.train()
    second = make(tmp_path / "parts", smolvlm(), talks(), **steps)
    second.train(resume_from_checkpoint=True)
    assert numbers(second) == pytest.approx(numbers(whole), abs=1e-5)


RANK = """
import sys, warnings
from pathlib import Path
sys.path[:0] = {paths!r}
from support.guards import WordsPlugin
from star_dss_plugin.plugins import Origin, load_plugins
load_plugins().register(WordsPlugin(), Origin("tests", "star-dss-tests", "0"))
from test_trl_vision import make, numbers, smolvlm, talks
trainer = make(
    Path(sys.argv[1]), smolvlm(), talks(), per_device_train_batch_size=2, dataloader_num_workers=1
)
trainer.train()
if trainer.is_world_process_zero():
    print("NUMBERS", *numbers(trainer))
"""


@pytest.mark.slow
def test_two_ranks_with_workers_train_as_one_process(tmp_path):
    alone = make(tmp_path / "alone", smolvlm(), talks())
    alone.train()
    script = tmp_path / "rank.py"
    script.write_text(RANK.format(paths=[str(TESTS), str(TESTS / "integrations" / "trl")]))
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [sys.executable, *launch, str(script), str(tmp_path / "two")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("NUMBERS")]
    assert list(map(float, line.split()[1:])) == pytest.approx(numbers(alone), abs=1e-5)


def test_an_adapter_of_the_vision_tower_that_was_trained_is_no_fresh_one(tmp_path):
    """Words alone do not pass through it, so the trained adapter would look like a new one."""
    model, processor = gemma3()
    config = LoraConfig(r=4, target_modules=r".*vision_tower.*q_proj")
    model = get_peft_model(model, config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    trainer = make(tmp_path, (model, processor), talks())
    assert trainer.star_dss_state.reference.kind == "copy"


def test_scores_of_tokens_that_are_not_there_are_refused(tmp_path):
    data = talks().add_column("star_scores", [[1.0]] * 8)
    with pytest.raises(DataError, match="brings star_scores"):
        make(tmp_path, smolvlm(), data)


OTHERS = {
    "audio": {"type": "audio", "audio": "a.wav", "text": None},
    "audio-url": {"type": "audio_url", "audio_url": "a.wav", "text": None},
    "video": {"type": "video", "video": "a.mp4", "text": None},
    "image-url": {"type": "image_url", "image_url": "a.png", "text": None},
    "file": {"type": "file", "file": "a.pdf", "text": None},
    "nothing": {"type": "text", "text": None},
}


@pytest.mark.parametrize("kind", OTHERS)
def test_parts_that_the_collator_makes_nothing_of_are_refused(tmp_path, kind):
    rows = [talk("hello", "2"), talk("is", "no")]
    rows[1]["messages"][0]["content"].append(OTHERS[kind])
    words = f"Row 1.*the type '{OTHERS[kind]['type']}', of which .* neither words nor media"
    with pytest.raises(DataError, match=words):
        make(tmp_path, smolvlm(), rows_as_they_are(rows))


def rows_as_they_are(rows):
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
        make(tmp_path, smolvlm(), rows_as_they_are(rows))


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("kind", ["audio", "video", "image"])
def test_media_that_trl_does_not_open_are_refused(tmp_path, kind, stream):
    """Without a column of images TRL keeps their tokens, and drops what they stand for."""
    rows = [talk("hello", "2", 0), talk("is", "no", 0)]
    rows[1]["messages"][0]["content"].append({"type": kind, kind: "a.file", "text": None})
    data = Dataset.from_list([{"messages": row["messages"]} for row in rows])
    with pytest.raises(DataError, match=f"Row 1.*a part of type '{kind}', and TRL opens images"):
        make(tmp_path, smolvlm(), data.to_iterable_dataset() if stream else data)


def test_check_says_what_the_guard_would_read(tmp_path):
    model, processor = smolvlm()
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    try:
        AutoProcessor.from_pretrained(tmp_path / "model")
    except (ImportError, ValueError) as error:
        pytest.skip(f"this transformers loads no image processor without torchvision: {error}")
    picture().save(tmp_path / "0.png")
    with (tmp_path / "chat.jsonl").open("w") as file:
        for row in talks().remove_columns("images"):
            images = [part for part in row["messages"][0]["content"] if part["type"] == "image"]
            row["images"] = [str(tmp_path / "0.png")] * len(images)
            file.write(json.dumps(row) + "\n")
    config = {
        "model_name_or_path": str(tmp_path / "model"),
        "dataset_name": str(tmp_path / "chat.jsonl"),
        "output_dir": str(tmp_path / "out"),
        "guard": "test-words",
        "chunk_size": 2,
        "bf16": False,
        "use_cpu": True,
    }
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(config))
    found = check(path, config, data=True)
    assert found.problems == []
    (note,) = [note for note in found.notes if note.startswith("train data")]
    assert note.endswith("; a mark in place of media in 6 rows")
    trainer = make(tmp_path, (model, processor), talks())
    summary = trainer.star_dss_state.summaries["train"]
    calls = summary.provenance["prefixes"]
    assert f"8 rows, 16 responses (0 without messages): {calls} guard calls" in note


def test_check_says_that_a_model_of_text_reads_no_images(tmp_path, model_folder):
    data = tmp_path / "chat.jsonl"
    data.write_text(json.dumps({"messages": [], "images": ["0.png"]}) + "\n")
    config = {
        "model_name_or_path": model_folder,
        "dataset_name": str(data),
        "output_dir": str(tmp_path / "out"),
        "guard": "test-words",
        "bf16": False,
        "use_cpu": True,
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config))
    (problem,) = check(tmp_path / "run.yaml", config, data=True).problems
    assert "has no processor" in problem


class OtherRanks:
    """What a run on two processes has beside its batches."""

    def __init__(self, trainer):
        self.carriers = Carriers()
        self.carriers.add(trainer.train_dataset)
        inner = trainer.data_collator
        args = (inner.inner, inner.alignment, inner.known)
        self.collator = LateCollator(*args, self.carriers)


def test_a_batch_without_images_gets_one_where_others_wait_for_it(tmp_path, name):
    """The row that brings it trains nothing."""
    trainer = make(tmp_path, MAKE[name](), talks(), reference="copy")
    collator = OtherRanks(trainer).collator
    rows = [trainer.train_dataset[i] for i in (1, 6)]
    plain, carried = trainer.data_collator(rows), collator(rows)
    assert "pixel_values" not in plain
    assert len(carried["pixel_values"])
    assert carried["input_ids"].shape[0] == 3
    width = plain["input_ids"].shape[1]
    for column in ("input_ids", "labels", SCORES_COLUMN):
        assert torch.equal(carried[column][:2, :width], plain[column])
    assert (carried["labels"][2] == -100).all()
    assert (carried[SCORES_COLUMN][2] == 1).all()
    images = collator([trainer.train_dataset[i] for i in (0, 1)])
    assert images["input_ids"].shape[0] == 2
    losses, passed = [], []
    for batch in (plain, carried, images):
        trainer.model.zero_grad()
        loss = trainer.compute_loss(trainer.model, trainer._prepare_inputs(dict(batch)))
        loss.backward()
        losses.append(float(loss))
        passed.append({n for n, p in trainer.model.named_parameters() if p.grad is not None})
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)
    assert passed[0] < passed[1] == passed[2]


def test_a_row_that_is_cut_within_its_images_is_refused_with_its_number(tmp_path, name):
    """An image of many tokens fills max_length, and what is asked and answered comes after it."""
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


def test_an_answer_that_the_question_holds_is_found_where_it_is_said(tmp_path, name):
    answer = "it's bad"
    rows = [talk(f"who said {answer} and {answer}?", answer), talk("hello", "2")]
    trainer = make(tmp_path, MAKE[name](), Dataset.from_list(rows))
    batch = batch_of(trainer, [0])
    trained = batch["labels"][0] != -100
    tokenizer = trainer.processing_class.tokenizer
    end = "<|im_end|>" if name == "smolvlm" else "<end_of_turn>"
    assert tokenizer.decode(batch["labels"][0][trained]) == f"{answer}{end}{answer} yes{end}"
    first = int(trained.nonzero()[0])
    before = tokenizer.decode(batch["input_ids"][0][:first])
    assert before.count(answer) == 2


def test_images_in_the_middle_of_several_turns(tmp_path, name):
    row = talk("hello", "2", 1)
    row["messages"][2]["content"] = [
        {"type": "text", "text": "and "},
        *[{"type": "image", "text": None}] * 2,
        {"type": "text", "text": " bad?"},
    ]
    row["images"] = [picture(n) for n in range(3)]
    trainer = make(tmp_path, MAKE[name](), Dataset.from_list([row, talk("is", "no", 0)]))
    batch = batch_of(trainer, [0, 1])
    tokenizer = trainer.processing_class.tokenizer
    said = tokenizer.decode(batch["labels"][0][batch["labels"][0] != -100])
    end = "<|im_end|>" if name == "smolvlm" else "<end_of_turn>"
    assert said == f"2{end}2 yes{end}"
    trainer.train()


def test_an_answer_that_spells_an_image_is_refused(tmp_path, name):
    token = {"smolvlm": "<image>", "gemma3": "<start_of_image>"}[name]
    rows = [talk("hello", "2"), talk("is", f"it's {token}")]
    with pytest.raises(DataError, match=f"Row 1.*spells {token}"):
        make(tmp_path, MAKE[name](), Dataset.from_list(rows))
