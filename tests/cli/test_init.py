"""`star-dss init` writes a first run that `star-dss check` accepts, and overwrites nothing."""

import io
import json
import os
import runpy
import shlex
import shutil
import sys
from pathlib import Path

import pytest
import yaml
from support.commands import run_command
from support.init_data import FORMS, HOSTILE, write_rows

from star_dss_plugin import smollm2
from star_dss_plugin.errors import PluginError
from star_dss_plugin.hookspecs import Integration, Starter, hookimpl
from star_dss_plugin.plugins import Origin, Plugins


@pytest.fixture
def workdir(tmp_path, monkeypatch, model_dir):
    """Change to an empty folder with a model in it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    shutil.copytree(model_dir, "model")
    return tmp_path


def init(monkeypatch, host, data, *words, guard="test-words"):
    """Return the exit status of `star-dss init` for the model in this folder."""
    guards = () if guard is None else ("--guard", guard)
    given = (f"--host={host}", "--model=./model", f"--data={data}", *guards, *words)
    return run_command(monkeypatch, "init", *given)


ALL_FORMS = [*FORMS, "parquet", "splits", "scored"]


@pytest.mark.parametrize("form", ALL_FORMS)
def test_the_yaml_for_trl_is_accepted(form, workdir, monkeypatch, tokenizer, capsys):
    pytest.importorskip("trl")
    data = write_rows(Path("rows.jsonl"), form, tokenizer)
    guard = None if form == "scored" else "test-words"
    assert init(monkeypatch, "trl", data, guard=guard) == 0
    out = capsys.readouterr().out
    assert out.splitlines()[-2:] == [
        "    star-dss check run.yaml",
        "    star-dss sft --config run.yaml",
    ]
    settings = yaml.safe_load(Path("run.yaml").read_text())
    assert settings["dataset_name"] == data
    assert settings.get("guard") == guard
    assert settings["loss_type"] == "star_dss"
    assert settings["learning_rate"] == 2e-4
    assert run_command(monkeypatch, "check", "run.yaml") == 0


@pytest.mark.parametrize("form", ALL_FORMS)
def test_the_script_runs(form, workdir, monkeypatch, tokenizer, capsys):
    pytest.importorskip("trl")
    data = write_rows(Path("rows.jsonl"), form, tokenizer)
    assert init(monkeypatch, "script", data, guard=None if form == "scored" else "test-words") == 0
    assert capsys.readouterr().out.splitlines()[-1] == "    python train.py"
    runpy.run_path("train.py", run_name="__main__")
    assert "STAR-DSS is active" in capsys.readouterr().out
    assert Path("out/adapter_model.safetensors").is_file()


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_file_names_are_quoted(name, workdir, monkeypatch, tokenizer, capsys):
    pytest.importorskip("trl")
    write_rows(Path(name), "messages", tokenizer)
    guard = json.dumps({"preset": "test-words", "word": "it's: \"#\n"})
    for host, file in (("trl", f"{name}.yaml"), ("script", f"{name}.py")):
        assert init(monkeypatch, host, name, f"--output={file}", guard=guard) == 0
        last = capsys.readouterr().out.split("Next:\n")[1]
        if "\n" not in name:
            assert shlex.split(last.splitlines()[0])[-1] == file
    settings = yaml.safe_load(Path(f"{name}.yaml").read_text())
    assert settings["dataset_name"] == name
    assert settings["guard"] == json.loads(guard)
    assert run_command(monkeypatch, "check", f"./{name}.yaml") == 0
    compile(Path(f"{name}.py").read_text(), "script", "exec")
    assert f"data_files={name!r}" in Path(f"{name}.py").read_text()


def test_init_takes_the_built_in_model_and_data(workdir, monkeypatch, model_dir, capsys):
    pytest.importorskip("trl")
    monkeypatch.setattr(smollm2, "_converted_copy", lambda: model_dir)
    monkeypatch.setattr("star_dss_plugin.cli.first_rows.gguf_fingerprint", dict)
    words = ("--model", "smollm2", "--data", "demo", "--guard", "test-words")
    for host in ("trl", "script"):
        assert run_command(monkeypatch, "init", "--host", host, *words) == 0
    assert "114 rows: conversations in the column messages, of user, assistant" in (
        " ".join(capsys.readouterr().out.split())
    )
    assert run_command(monkeypatch, "check", "run.yaml", "--no-data") == 0
    assert "demo_mix.jsonl" in Path("train.py").read_text()


def test_nothing_is_overwritten(workdir, monkeypatch, tokenizer, capsys):
    pytest.importorskip("trl")
    data = write_rows(Path("rows.jsonl"), "messages", tokenizer)
    Path("run.yaml").write_text("mine")
    os.symlink("nowhere", "train.py")
    for host, file in (("trl", "run.yaml"), ("script", "train.py")):
        assert init(monkeypatch, host, data) == 2
        message = capsys.readouterr().err
        assert f"{file} exists, and nothing was written. Name another file: --output" in message
    assert Path("run.yaml").read_text() == "mine"
    assert not Path("nowhere").exists()
    assert init(monkeypatch, "trl", data, "-o", "no/such/folder.yaml") == 2
    assert "cannot be written" in capsys.readouterr().err


def write_given_rows(*given):
    """Write rows.jsonl with these rows."""
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in given))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"instruction": "a", "output": "b"},
            "Rename 'instruction' to 'prompt' and 'output' to 'completion'.",
        ),
        ({"prompt": "a", "response": "b"}, "Rename 'response' to 'completion'."),
        (
            {"instruction": "a", "input": "c", "output": "b"},
            "What 'input' holds belongs to the question: join the two first.",
        ),
        ({"a": 1}, "The columns are 'a', and no run can tell"),
        (
            {"messages": [{"role": "human", "content": "a"}]},
            "rows.jsonl: Row 0: messages[0].role is str 'human'",
        ),
        ({"messages": [{"role": "user", "content": "a"}]}, "said by the role 'assistant'"),
    ],
)
def test_rows_of_unknown_columns_or_roles_are_refused_with_advice(
    row, message, workdir, monkeypatch, capsys
):
    pytest.importorskip("trl")
    write_given_rows(row)
    assert init(monkeypatch, "trl", "rows.jsonl") == 2
    assert message in " ".join(capsys.readouterr().err.split())
    assert not Path("run.yaml").exists()


def test_wrong_arguments_are_refused_with_a_suggestion(workdir, monkeypatch, tokenizer, capsys):
    pytest.importorskip("trl")
    data = write_rows(Path("rows.jsonl"), "messages", tokenizer)
    scored = write_rows(Path("scored"), "scored", tokenizer)
    for words, message in (
        (("trl", data, "--guard", "qwen3gard-gen-0.6b"), "Did you mean 'qwen3guard-gen-0.6b'"),
        (("trl", data, "--guard", "{}"), "nothing in it lacks model, safe_labels"),
        (("tlr", data), "Unknown --host 'tlr'. Did you mean 'trl'?"),
        (("trl", data, "--model", "no model"), "'no model' is no folder here, and no id"),
        (("trl", data, "--model", "."), "has no config.json"),
        (("trl", "no.jsonl"), "there is no file or folder of this name"),
        (("trl", scored), "is scored already, and --guard is 'test-words'"),
    ):
        assert init(monkeypatch, *words) == 2
        assert message in " ".join(capsys.readouterr().err.split())
    assert not Path("run.yaml").exists()


@pytest.mark.parametrize(
    ("flag", "value", "message"),
    [
        ("--model", "", "No model is named"),
        ("--model", " ", "No model is named"),
        ("--model", "rows.jsonl", "is a file"),
        ("--data", "", "No data is named"),
    ],
)
def test_empty_names_and_files_as_models_are_refused(
    flag, value, message, workdir, monkeypatch, capsys
):
    Path("rows.jsonl").write_text('{"prompt": "hello", "completion": " hi"}\n')
    given = {"--host": "script", "--model": "model", "--data": "rows.jsonl", "--guard": "demo"}
    line = [word for pair in ({**given, flag: value}).items() for word in pair]
    assert run_command(monkeypatch, "init", *line) == 2
    assert message in capsys.readouterr().err


def test_missing_arguments_are_named_without_a_terminal(workdir, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    assert run_command(monkeypatch, "init", "--model", "./model") == 2
    assert "--host, --data: not given, and there is no terminal" in (
        " ".join(capsys.readouterr().err.split())
    )


def test_a_terminal_is_asked_until_the_answer_is_valid(workdir, monkeypatch, tokenizer, capsys):
    pytest.importorskip("trl")
    data = write_rows(Path("rows.jsonl"), "messages", tokenizer)
    answers = iter(["tlr", "trl", "./model", "no.jsonl", data, "qwen", "test-words"])
    monkeypatch.setattr("star_dss_plugin.cli.init.sys.stdin.isatty", lambda: True, raising=False)
    monkeypatch.setattr("typer.prompt", lambda *_, **__: next(answers))
    assert run_command(monkeypatch, "init") == 0
    assert "Did you mean 'trl'" in capsys.readouterr().err
    assert next(answers, None) is None
    settings = yaml.safe_load(Path("run.yaml").read_text())
    assert (settings["model_name_or_path"], settings["guard"]) == ("./model", "test-words")


def test_an_integration_can_bring_its_own_starter(workdir, monkeypatch, tokenizer, capsys):
    class Toy:
        def __init__(self, starter):
            self.starter = starter

        @hookimpl
        def star_dss_register_integrations(self, register):
            toy = Integration(
                host="pytest",
                versions=">=1",
                install="pytest",
                trainer=dict,
                options=dict,
                configuration="a toy",
                claims=lambda raw: False,
                check="toy:check",
                starters=self.starter,
            )
            register("toy", toy)

    def write(start):
        return f"{start.model} {start.form}"

    starter = Starter("toy.txt", write, ("toy {file}",))
    plugins = Plugins.discover()
    with pytest.raises(PluginError, match="starter 'trl', which another integration has"):
        plugins.register(Toy({"trl": starter}), Origin("toy", "toy", "1"))
    with pytest.raises(PluginError, match="starters.'toy'.='nothing'"):
        plugins.register(Toy({"toy": Starter("toy.txt", "nothing", ())}), Origin("t", "t", "1"))
    plugins = Plugins.discover()
    plugins.register(Toy({"toy": starter}), Origin("toy", "toy", "1"))
    monkeypatch.setattr("star_dss_plugin.plugins.load_plugins", lambda: plugins)
    write_rows(Path("rows.jsonl"), "messages", tokenizer)
    assert init(monkeypatch, "toy", "rows.jsonl", guard="demo") == 0
    assert Path("toy.txt").read_text() == "./model messages"
    assert "    toy toy.txt" in capsys.readouterr().out
