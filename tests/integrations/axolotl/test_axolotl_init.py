"""`star-dss init --host axolotl` writes YAMLs that `star-dss check` accepts."""

import json
import shutil
from pathlib import Path

import pytest

pytest.importorskip("axolotl", reason="needs Axolotl: make test-axolotl")

import yaml
from support.commands import run_command
from support.init_data import FORMS, HOSTILE, write_rows

from star_dss_plugin import smollm2


@pytest.fixture
def working_folder(tmp_path, monkeypatch, model_dir):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(model_dir, "model")
    return tmp_path


def init(monkeypatch, data, *words, guard="test-words"):
    guards = () if guard is None else ("--guard", guard)
    given = ("--host=axolotl", "--model=./model", f"--data={data}", *guards, *words)
    return run_command(monkeypatch, "init", *given)


@pytest.mark.parametrize("form", [*FORMS, "parquet", "scored"])
def test_the_yaml_is_accepted(form, working_folder, monkeypatch, tokenizer, capsys):
    data = write_rows(Path("rows.jsonl"), form, tokenizer)
    guard = None if form == "scored" else "test-words"
    assert init(monkeypatch, data, guard=guard) == 0
    assert capsys.readouterr().out.splitlines()[-3:] == [
        "    star-dss check config.yaml",
        "    axolotl preprocess config.yaml",
        "    axolotl train config.yaml",
    ]
    settings = yaml.safe_load(Path("config.yaml").read_text())
    assert settings["star_dss"].get("guard") == guard
    assert run_command(monkeypatch, "check", "config.yaml") == 0, capsys.readouterr().err
    assert "train data: " in capsys.readouterr().out


@pytest.mark.parametrize("name", HOSTILE)
def test_file_names_are_quoted(name, working_folder, monkeypatch, tokenizer, capsys):
    write_rows(Path(name), "messages", tokenizer)
    guard = json.dumps({"preset": "test-words", "word": "it's: \"#\n"})
    assert init(monkeypatch, name, f"--output={name}.yaml", guard=guard) == 0
    settings = yaml.safe_load(Path(f"{name}.yaml").read_text())
    assert settings["datasets"][0]["path"] == name
    assert settings["star_dss"]["guard"] == json.loads(guard)
    assert run_command(monkeypatch, "check", f"./{name}.yaml", "--no-data") == 0


def test_messages_in_two_columns_are_refused(working_folder, monkeypatch, capsys):
    row = {
        "prompt": [{"role": "user", "content": "a"}],
        "completion": [{"role": "assistant", "content": "b"}],
    }
    Path("rows.jsonl").write_text(json.dumps(row) + "\n")
    assert init(monkeypatch, "rows.jsonl") == 2
    assert "Put them together in a column messages" in capsys.readouterr().err
    assert not Path("config.yaml").exists()


def test_the_packages_own_model_and_data(working_folder, monkeypatch, model_dir, capsys):
    monkeypatch.setattr(smollm2, "_converted_copy", lambda: model_dir)
    monkeypatch.setattr("star_dss_plugin.cli.first_rows.gguf_fingerprint", dict)
    words = ("--model", "smollm2", "--data", "demo", "--guard", "test-words")
    assert run_command(monkeypatch, "init", "--host", "axolotl", *words) == 0
    assert run_command(monkeypatch, "check", "config.yaml") == 0, capsys.readouterr().err
    assert "train data: " in capsys.readouterr().out
