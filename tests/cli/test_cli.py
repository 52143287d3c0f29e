"""The command line: what it prints and writes, and its errors."""

import json

import pytest
from datasets import load_from_disk
from support.commands import run_command as run

from star_dss_plugin import __version__
from star_dss_plugin.data.reading import read_dataset

ROWS = [
    {
        "messages": [
            {"role": "user", "content": "is this bad?"},
            {"role": "assistant", "content": "no! it is a bad word."},
        ]
    }
] * 2


@pytest.fixture
def chat_file(tmp_path):
    """Return a file of two conversations."""
    path = tmp_path / "chat.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in ROWS))
    return path


def test_score_writes_a_data_set(monkeypatch, capsys, chat_file, model_dir, tmp_path):
    out = tmp_path / "scored"
    code = run(
        monkeypatch,
        "score",
        chat_file,
        "--guard",
        "test-words",
        "--tokenizer",
        model_dir,
        "-o",
        out,
        "--chunk-size",
        3,
        "-q",
    )
    assert code == 0
    assert "2 responses" in capsys.readouterr().out
    scored = load_from_disk(str(out))
    assert len(scored[0]["star_scores"]) == len(scored[0]["input_ids"]) == len(scored[0]["labels"])
    assert json.loads((out / "star_dss.json").read_text())["chunk_size"] == 3
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".scored")] == []
    assert (
        run(
            monkeypatch,
            "score",
            chat_file,
            "--guard",
            "test-words",
            "--tokenizer",
            model_dir,
            "-o",
            out,
        )
        == 2
    )
    assert "exists" in capsys.readouterr().err


def test_shards_have_the_rows_of_a_whole_data_set(
    monkeypatch, capsys, chat_file, model_dir, tmp_path
):
    common = ["score", chat_file, "--guard", "test-words", "--tokenizer", model_dir, "-q"]
    assert run(monkeypatch, *common, "-o", tmp_path / "plain") == 0
    assert run(monkeypatch, *common, "-o", tmp_path / "shards", "--shard-rows", 1) == 0
    one, other = capsys.readouterr().out.splitlines()
    assert one.removeprefix(str(tmp_path / "plain")) == other.removeprefix(str(tmp_path / "shards"))
    found = read_dataset(str(tmp_path / "shards"))
    assert found.to_list() == load_from_disk(str(tmp_path / "plain")).to_list()
    html = tmp_path / "report.html"
    assert run(monkeypatch, "report", tmp_path / "shards", "-o", html) == 0
    assert "test-words" in html.read_text()


@pytest.mark.parametrize("kind", ["parquet", "folder", "json-guard"])
def test_score_reads_parquet_folders_and_guards_in_json(
    monkeypatch, chat_file, model_dir, tmp_path, kind
):
    from datasets import load_dataset

    data, guard = chat_file, "test-words"
    if kind == "parquet":
        data = tmp_path / "chat.parquet"
        load_dataset("json", data_files=str(chat_file), split="train").to_parquet(str(data))
    elif kind == "folder":
        data = tmp_path / "folder"
        load_dataset("json", data_files=str(chat_file), split="train").save_to_disk(str(data))
    else:
        guard = json.dumps({"preset": "test-words", "word": "no"})
    out = tmp_path / "out"
    assert (
        run(monkeypatch, "score", data, "--guard", guard, "--tokenizer", model_dir, "-o", out) == 0
    )
    assert min(load_from_disk(str(out))[0]["star_scores"]) == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"--guard": "qwen3guard"}, "Did you mean 'qwen3guard-gen-"),
        ({"--guard": None}, "No guard was given"),
        ({"--guard": "{bad"}, "not valid JSON"),
        ({"--segmenter": "tokenz"}, "Did you mean 'tokens'"),
        ({"--tokenizer": "no/such-model"}, "tokenizer 'no/such-model' cannot be loaded"),
        ({"data": "missing.jsonl"}, "missing.jsonl cannot be read"),
        ({"data": "text.txt"}, "is a .txt file"),
        ({"--num-workers": 2}, "--num-workers is for a Ray cluster"),
        ({"--shard-rows": 2, "--score-cache-dir": "c"}, "share no cache"),
        ({"--engine": "vllm"}, "takes no engine"),
    ],
)
def test_score_refuses_wrong_arguments(
    monkeypatch, capsys, chat_file, model_dir, tmp_path, changes, message
):
    (tmp_path / "text.txt").write_text("x")
    monkeypatch.chdir(tmp_path)
    options = {
        "data": chat_file,
        "--guard": "test-words",
        "--tokenizer": model_dir,
        "-o": tmp_path / "o",
    }
    options |= changes
    data = options.pop("data")
    argv = [x for pair in options.items() if pair[1] is not None for x in pair]
    assert run(monkeypatch, "score", data, *argv) == 2
    err = " ".join(capsys.readouterr().err.split())
    assert message in err
    assert "Traceback" not in err
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize(
    ("output", "message"),
    [("x" * 5000, "File name too long"), ("chat.jsonl/scored", "File exists")],
)
def test_score_names_an_output_that_cannot_be_written(
    monkeypatch, capsys, chat_file, model_dir, tmp_path, output, message
):
    argv = ["score", chat_file, "--guard", "test-words", "--tokenizer", model_dir, "-q"]
    assert run(monkeypatch, *argv, "-o", tmp_path / output) == 2
    err = " ".join(capsys.readouterr().err.split())
    assert message in err
    assert "Traceback" not in err


def test_plugins_lists_everything(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "200")
    assert run(monkeypatch, "plugins") == 0
    out = capsys.readouterr().out
    for word in (
        "star_dss_register_guards",
        "qwen3guard-gen-0.6b",
        "demo",
        "tokens",
        "kl_only",
        "trl",
        __version__,
    ):
        assert word in out


def test_version_and_help_are_printed(monkeypatch, capsys):
    assert run(monkeypatch, "--version") == 0
    assert __version__ in capsys.readouterr().out
    assert run(monkeypatch, "--help") == 0
    assert "score" in capsys.readouterr().out


def test_sft_rejects_misspelt_options(monkeypatch, capsys, tmp_path):
    pytest.importorskip("trl")
    config = tmp_path / "run.yaml"
    config.write_text(
        "model_name_or_path: m\ndataset_name: d\noutput_dir: o\nguard: demo\nuse_cpu: true\n"
        "bf16: false\nchunk_sise: 3\n"
    )
    assert run(monkeypatch, "sft", "--config", config) == 2
    assert "chunk_sise" in capsys.readouterr().err
