"""Rows with images in Axolotl, which its collator tokenizes (`processor_type`)."""

import copy
import re

import pytest

pytest.importorskip("axolotl", reason="needs Axolotl: make test-axolotl")

import torch
from axolotl.processing_strategies import ProcessingStrategy
from axolotl.utils.chat_templates.base import _CHAT_TEMPLATES
from axolotl.utils.collators.mm_chat import MultiModalChatDataCollator
from axolotl_runs import (
    ANSWERS,
    LORA,
    PROMPTS,
    chat,
    configuration,
    data_of,
    loaded,
    on_two_ranks,
    trained,
    trainer_of,
    write_config,
)
from datasets import Dataset
from star_dss_axolotl.check import check
from star_dss_axolotl.media import media_rows
from support.run_differences import CLOSE, history, largest_difference
from support.vision_models import gemma3, picture, smolvlm, stripes

from star_dss_plugin.data.alignment import Alignment
from star_dss_plugin.data.columns import SCORES_COLUMN
from star_dss_plugin.data.media_rows import MediaRows
from star_dss_plugin.data.templates.chat import ChatTokenizer
from star_dss_plugin.errors import DataError

MEDIA = {
    "processor_type": "AutoProcessor",
    "skip_prepare_dataset": True,
    "remove_unused_columns": False,
    "chat_template": "tokenizer_default",
}


@pytest.fixture(scope="module")
def gemma_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gemma3")
    model, processor = gemma3()
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    for shade in range(3):
        stripes(shade).save(folder / f"{shade}.png")
    return folder


def rows(folder, spelled=""):
    made = []
    for n, (prompt, answer) in enumerate(zip(PROMPTS, ANSWERS, strict=True)):
        images = [{"type": "image", "path": str(folder / f"{i}.png")} for i in range(n % 3)]
        question = [*images, {"type": "text", "text": prompt + spelled}]
        made.append(
            {
                "messages": [
                    {"role": "user", "content": question},
                    {"role": "assistant", "content": [{"type": "text", "text": answer}]},
                    {"role": "user", "content": [{"type": "text", "text": "and"}]},
                    {"role": "assistant", "content": [{"type": "text", "text": answer + " yes"}]},
                ]
            }
        )
    return made


def vision_configuration(tmp_path, gemma_dir, data=None, **changes):
    data = data or rows(gemma_dir)
    return configuration(
        tmp_path,
        gemma_dir,
        **{**MEDIA, "datasets": [chat(tmp_path / "chat.jsonl", data)], **changes},
    )


def batch_of(trainer):
    return trainer.data_collator([trainer.train_dataset[i] for i in range(8)])


def test_answers_are_trained_and_scored(tmp_path, gemma_dir):
    trainer = trainer_of(tmp_path, vision_configuration(tmp_path, gemma_dir))
    batch = batch_of(trainer)
    assert batch["pixel_values"].shape[0] == sum(n % 3 for n in range(8))
    said = []
    for row, labels in enumerate(batch["labels"]):
        trained = labels != -100
        said.append(trainer.processing_class.decode(labels[trained]))
        scores = batch[SCORES_COLUMN][row]
        assert (scores[~trained] == 1).all()
        assert bool((scores[trained] < 0.5).any()) == ("bad" in said[-1])
    end = "<end_of_turn>"
    assert sorted(said) == sorted(f"{a}{end}{a} yes{end}" for a in ANSWERS)
    assert trainer.star_dss_state.summaries["train"].responses == 16


@pytest.mark.parametrize("adapter", [LORA, {}], ids=["lora", "full"])
def test_a_run_trains(tmp_path, gemma_dir, capsys, adapter):
    trainer = trained(tmp_path, vision_configuration(tmp_path, gemma_dir, **adapter))
    assert "STAR-DSS is active" in capsys.readouterr().out
    assert trainer.star_dss_state.reference.kind == ("adapter" if adapter else "copy")
    (one, _), (two, _) = history(trainer)
    assert two < one
    assert trainer.state.log_history[1]["star_dss/kl"] > 0


def test_images_in_a_column_and_contents_of_text(tmp_path, gemma_dir):
    data = [
        {
            "conversations": [{"from": "human", "value": p}, {"from": "gpt", "value": a}],
            "images": [str(gemma_dir / "1.png")],
        }
        for p, a in zip(PROMPTS, ANSWERS, strict=True)
    ]
    trainer = trained(tmp_path, vision_configuration(tmp_path, gemma_dir, data))
    assert len(history(trainer)) == 2
    assert trainer.star_dss_state.summaries["train"].responses == 8


def test_evaluation_data_is_scored_too(tmp_path, gemma_dir):
    changes = {"val_set_size": 0.25, "eval_steps": 1}
    trainer = trainer_of(tmp_path, vision_configuration(tmp_path, gemma_dir, **changes))
    assert trainer.star_dss_state.summaries["eval"].rows == 2
    found = trainer.evaluate()
    assert found["eval_loss"] > 0
    assert "eval_star_dss/mean_score" in found


def test_words_that_spell_an_image_do_not_become_one(tmp_path, gemma_dir):
    config = vision_configuration(tmp_path, gemma_dir, rows(gemma_dir, " <start_of_image>"))
    with pytest.raises(DataError, match="Row 0.*spells <start_of_image>"):
        trainer_of(tmp_path, config)


def test_a_missing_image_stops_the_run_and_names_the_row(tmp_path, gemma_dir):
    data = rows(gemma_dir)
    data[4]["messages"][0]["content"][0]["path"] = str(tmp_path / "gone.png")
    trainer = trainer_of(tmp_path, vision_configuration(tmp_path, gemma_dir, data))
    said = [row["messages"][1]["content"][0]["text"] for row in trainer.train_dataset]
    with pytest.raises(DataError, match=f"Row {said.index(ANSWERS[4])}: .*gone.png"):
        batch_of(trainer)


def test_the_data_are_not_tokenized_before_the_trainer_is_made(tmp_path, gemma_dir):
    data = data_of(loaded(tmp_path, vision_configuration(tmp_path, gemma_dir))).train_dataset
    assert data.column_names == ["messages"]


def test_a_collator_without_role_boundaries_trains_answers_alone():
    _, processor = smolvlm()
    strategy = ProcessingStrategy(processor, processor.chat_template)
    collator = MultiModalChatDataCollator(processor.tokenizer, strategy)
    read = media_rows(collator)
    data = Dataset.from_list(
        [
            {
                "messages": [
                    {"role": "user", "content": "who is lazy?"},
                    {"role": "assistant", "content": "the dog"},
                ],
                "images": [picture()],
            }
        ]
    )
    text = read.text_rows(data, "train")[0]
    assert [part["type"] for part in text["messages"][0]["content"]] == ["text", "image"]
    trained = [label for label in text["labels"] if label != -100]
    assert processor.tokenizer.decode(trained) == "the dog<|im_end|>"
    host = collator([data[0]])["labels"][0]
    assert "lazy" in processor.tokenizer.decode(host[host != -100])


def test_another_collator_has_no_media_rows():
    assert media_rows(torch.stack) is None


TEMPLATES = {
    "gemma3": "<start_of_image>",
    "gemma3n": "<image_soft_token>",
    "gemma4": "<|image|>",
    "llama3_2_vision": "<|image|>",
    "llama4": "<|image|>",
    "llava": "<image>",
    "mistral_v7_tekken": "[IMG]",
    "pixtral": "[IMG]",
    "qwen2_vl": "<|image_pad|>",
    "qwen3_5": "<|image_pad|>",
}


@pytest.mark.parametrize("template", TEMPLATES)
def test_answers_are_found_in_the_templates_that_configurations_name(tokenizer, template):
    """Answers are trained for any number of tokens of an image."""
    said, found = trained_tokens(tokenizer, template, "image", TEMPLATES[template])
    assert found == said


def trained_tokens(tokenizer, template, kind, sign):
    """Return the trained tokens of a row as text, and those aligned with a collator's tokens."""
    tokenizer = copy.deepcopy(tokenizer)
    source = _CHAT_TEMPLATES[template]
    signs = {found for found in re.findall(r"</?\|?\w+\|?>|\[/?[A-Z_]+\]", source)}
    tokenizer.add_special_tokens({"additional_special_tokens": sorted(signs | set(ENDS))})
    ends = [end for end in ENDS if end in source]
    tokenizer.eos_token = ends[0] if ends else tokenizer.eos_token
    chat_tokenizer = ChatTokenizer(tokenizer, source)
    media = tokenizer.convert_tokens_to_ids(sign)
    reader = MediaRows(chat_tokenizer, frozenset([media]), lambda row: row, kinds=(kind,))
    question = [{"type": "text", "text": "who is lazy?"}, {"type": kind}]
    messages = [
        {"role": "user", "content": question},
        {"role": "assistant", "content": [{"type": "text", "text": "the dog"}]},
        {"role": "user", "content": [{"type": "text", "text": "and?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "it's bad"}]},
    ]
    text = reader.text_rows(Dataset.from_list([{"messages": messages}]), "train")[0]
    ids, labels = text["input_ids"], text["labels"]
    assert media in ids or template == "mistral_v7_tekken"
    said = [label for label in labels if label != -100]
    assert re.fullmatch(r"\s*(\S+\s+)?the dog.*it's bad\S*\s*", tokenizer.decode(said), re.DOTALL)
    assert "lazy" not in tokenizer.decode(said)
    known = {**text, SCORES_COLUMN: [0.5 if label != -100 else 1.0 for label in labels]}
    long = [token for one in ids for token in [one] * (7 if one == media else 1)]
    found, scores = Alignment(chat_tokenizer, frozenset([media])).transfer(known, long, long)
    assert sum(score == 0.5 for score in scores) == len(said)
    return said, [label for label in found if label != -100]


ENDS = ("<end_of_turn>", "<turn|>", "<|eot|>", "<|eot_id|>", "<|im_end|>")


def test_check_counts_the_rows_with_media(tmp_path, gemma_dir):
    config = vision_configuration(tmp_path, gemma_dir)
    found = check(tmp_path / "config.yaml", config, data=True)
    assert found.problems == []
    (note,) = [note for note in found.notes if note.startswith("train data")]
    trainer = trainer_of(tmp_path, config)
    summary = trainer.star_dss_state.summaries["train"]
    calls = summary.provenance["prefixes"]
    assert f"8 rows, {summary.responses} responses (0 without messages): {calls} guard" in note
    assert note.endswith("; a mark in place of media in 5 rows")


def test_check_finds_rows_that_cannot_be_read(tmp_path, gemma_dir):
    config = vision_configuration(tmp_path, gemma_dir, rows(gemma_dir, " <start_of_image>"))
    (problem,) = check(tmp_path / "config.yaml", config, data=True).problems
    assert "Row 0" in problem
    assert "spells <start_of_image>" in problem


OTHER_MEDIA = {
    "gemma3n": ("audio", "<audio_soft_token>"),
    "qwen2_vl": ("video", "<|video_pad|>"),
    "qwen3_5": ("video", "<|video_pad|>"),
}


@pytest.mark.parametrize("template", OTHER_MEDIA)
def test_answers_are_found_beside_sounds_and_videos(tokenizer, template):
    kind, sign = OTHER_MEDIA[template]
    said, found = trained_tokens(tokenizer, template, kind, sign)
    assert found == said


@pytest.mark.slow
def test_two_ranks_take_the_steps_of_one_process(tmp_path, gemma_dir, site):
    """FSDP2 shards the vision layers, too, and some batches of a rank have no image."""
    sharded = {
        "fsdp_version": 2,
        "fsdp_config": {
            "auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
            "transformer_layer_cls_to_wrap": "Gemma3DecoderLayer,SiglipEncoderLayer",
            "state_dict_type": "FULL_STATE_DICT",
            "cpu_ram_efficient_loading": False,
            "offload_params": False,
            "reshard_after_forward": True,
        },
    }
    run = {
        **LORA,
        "micro_batch_size": 1,
        "max_steps": 3,
        "learning_rate": 2e-3,
        "star_dss": {
            "guard": "test-words",
            "chunk_size": 2,
            "kl_coef": 2.0,
            "kl_estimator": "full",
            "reference": "adapter",
        },
    }
    out = {"output_dir": str(tmp_path / "both")}
    two = vision_configuration(
        tmp_path, gemma_dir, gradient_accumulation_steps=2, **run, **sharded, **out
    )
    (found, second), done = on_two_ranks(tmp_path, site, "fsdp2", [write_config(tmp_path, two)])
    (found,), (second,) = found.values(), second.values()
    assert "error" not in found, (found, done.stderr[-3000:])
    assert found["logs"] == second["logs"]
    assert found["sharded"] < 0.6
    assert max(found["kl"]) > 1e-6
    alone = tmp_path / "alone"
    alone.mkdir()
    trainer = trained(
        alone, vision_configuration(alone, gemma_dir, gradient_accumulation_steps=4, **run)
    )
    logs = [(n + 1, *numbers) for n, numbers in enumerate(history(trainer))]
    steps = largest_difference(found["logs"], logs)
    print(f"fsdp2 images: {steps:.1e}")
    assert steps < CLOSE
