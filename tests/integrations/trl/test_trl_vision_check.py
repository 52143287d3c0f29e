"""`star-dss check` on rows with images."""

import json
from pathlib import Path

import pytest

pytest.importorskip("trl")

import trl
import yaml
from star_dss_trl.check import check
from support.vision_models import picture, smolvlm
from support.vision_runs import talks, vision_trainer
from transformers import AutoProcessor


@pytest.mark.parametrize("marked", [False, True], ids=["", "assistant_only_loss"])
def test_check_counts_the_rows_with_media(tmp_path, marked):
    model, processor = smolvlm()
    if marked:  # a template of which TRL has a variant that marks what is generated
        known = Path(trl.__file__).parent / "chat_templates" / "smolvlm.jinja"
        if not known.exists():
            pytest.skip("this TRL knows no such template")
        processor.chat_template = known.read_text(encoding="utf-8")
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
        "assistant_only_loss": marked,
    }
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(config))
    found = check(path, config, data=True)
    assert found.problems == []
    (note,) = [note for note in found.notes if note.startswith("train data")]
    assert note.endswith("; a mark in place of media in 6 rows")
    trainer = vision_trainer(tmp_path, (model, processor), talks(), assistant_only_loss=marked)
    summary = trainer.star_dss_state.summaries["train"]
    calls = summary.provenance["prefixes"]
    assert f"8 rows, 16 responses (0 without messages): {calls} guard calls" in note


def test_check_refuses_images_for_a_text_model(tmp_path, model_dir):
    data = tmp_path / "chat.jsonl"
    data.write_text(json.dumps({"messages": [], "images": ["0.png"]}) + "\n")
    config = {
        "model_name_or_path": str(model_dir),
        "dataset_name": str(data),
        "output_dir": str(tmp_path / "out"),
        "guard": "test-words",
        "bf16": False,
        "use_cpu": True,
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config))
    (problem,) = check(tmp_path / "run.yaml", config, data=True).problems
    assert "has no processor" in problem
