"""`star-dss check` on TRL configurations (for Axolotl's: tests/integrations/axolotl)."""

import importlib.util
import json
from pathlib import Path

import pytest
import yaml

pytest.importorskip("trl")

import trl
from datasets import Dataset, load_from_disk
from star_dss_trl import StarDSSConfig, StarDSSTrainer
from star_dss_trl.sft import parse
from support.models import tiny_llama
from support.template_conversations import tokenizer_for
from typer.testing import CliRunner

from star_dss_plugin import ConfigError, PluginError
from star_dss_plugin.cli.app import app
from star_dss_plugin.cli.check import check_config
from star_dss_plugin.data.reading import read_dataset
from star_dss_plugin.data.templates.chat import ChatTokenizer
from star_dss_plugin.options import StarDSSOptions
from star_dss_plugin.training.preflight import describe_stream, estimate

runner = CliRunner()


def configuration(tmp_path, model_dir, **changes):
    rows = [
        {
            "messages": [
                {"role": "user", "content": "is this bad?"},
                {"role": "assistant", "content": "no! it is a word"},
            ]
        }
    ] * 3
    (tmp_path / "chat.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {
        "model_name_or_path": str(model_dir),
        "dataset_name": str(tmp_path / "chat.jsonl"),
        "output_dir": str(tmp_path / "out"),
        "use_cpu": True,
        "bf16": False,
        "guard": "test-words",
        "chunk_size": 2,
        **changes,
    }


def run(tmp_path, config, *flags):
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(config))
    return runner.invoke(app, ["check", str(path), *flags])


def test_a_good_configuration(tmp_path, model_dir):
    result = run(tmp_path, configuration(tmp_path, model_dir))
    assert result.exit_code == 0, result.output
    assert "train data: 3 rows, 3 responses (0 without messages)" in result.output
    assert "guard calls" in result.output


@pytest.mark.parametrize(
    ("guard", "said"),
    [
        ("qwen3guard-gen-0.6b", "4 guard calls; {tokens} tokens of conversation where prefixes"),
        ({"preset": "qwen3guard-gen-0.6b"}, "and about 476 of the guard's own words"),
        ("qwen3guard-stream-0.6b", "one pass over each, {tokens} tokens of conversation in all"),
        ("xguard-0.6b", "and the guard's own words before and after it"),
    ],
)
def test_what_scoring_would_read(tokenizer, guard, said):
    ids = tokenizer("is this bad? no! it is a word")["input_ids"]
    rows = Dataset.from_dict({"input_ids": [ids], "labels": [[-100] * (len(ids) - 8) + ids[-8:]]})
    options = StarDSSOptions(guard=guard, chunk_size=2)
    assert said.format(tokens=len(ids)) in estimate(rows, ChatTokenizer(tokenizer), options)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"chunk_sise": 2}, "did you mean 'chunk_size'?"),
        ({"chunk_sise": 2, "guards": "x"}, "'guards' (did you mean 'guard'?)"),
        ({"guard": "test-word"}, "Did you mean 'test-words'"),
        ({"guard": None}, "No guard was given"),
        ({"kl_coef": -1.0}, "kl_coef is -1.0"),
        ({"loss_type": "nll", "guard": None}, "with which nothing is shaped"),
        ({"eval_packing": True}, "eval_packing is on and packing is off"),
        ({"packing": True, "packing_strategy": "wrapped", "loss_type": "static"}, "at the end"),
        ({"dataset_name": "absent.jsonl"}, "absent.jsonl"),
        ({"eval_strategy": "steps", "eval_steps": 1}, "no split 'test' (it has train)"),
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor is 0.1"),
    ],
)
def test_a_problem_is_named_and_fails(tmp_path, model_dir, change, message):
    config = {
        k: v for k, v in configuration(tmp_path, model_dir, **change).items() if v is not None
    }
    result = run(tmp_path, config)
    assert result.exit_code == 1, result.output
    assert message in result.output


@pytest.fixture(scope="module")
def known_template(tmp_path_factory):
    """Return a model with a template that marks nothing, and of which TRL has a variant."""
    source = Path(trl.__file__).parent / "chat_templates" / "qwen3.jinja"
    tokenizer = tokenizer_for(source.read_text(encoding="utf-8"))
    folder = tmp_path_factory.mktemp("known")
    tokenizer.save_pretrained(folder)
    tiny_llama(len(tokenizer)).save_pretrained(folder)
    return folder


def test_assistant_only_loss_with_a_template_that_trl_replaces(tmp_path, known_template):
    config = configuration(tmp_path, known_template, assistant_only_loss=True)
    result = run(tmp_path, config)
    assert result.exit_code == 0, result.output
    args = StarDSSConfig(
        **{name: config[name] for name in ("output_dir", "use_cpu", "bf16", "guard", "chunk_size")},
        assistant_only_loss=True,
    )
    rows = read_dataset(config["dataset_name"])
    trainer = StarDSSTrainer(str(known_template), args=args, train_dataset=rows)
    out = tmp_path / "scored"
    flags = ["--guard", "test-words", "--chunk-size", "2", "--assistant-only-loss", "-q"]
    command = ["score", config["dataset_name"], "--tokenizer", str(known_template), "-o", str(out)]
    result = runner.invoke(app, [*command, *flags])
    assert result.exit_code == 0, result.output
    scored = load_from_disk(out)
    for column in ("input_ids", "labels", "star_scores"):
        assert list(scored[column]) == list(trainer.train_dataset[column])


@pytest.mark.parametrize(
    ("row", "changes", "problem"),
    [
        ({"input_ids": [5, 6, 7]}, {}, None),
        ({"input_ids": [5, 6, 7]}, {"assistant_only_loss": True}, "TRL takes it for conversations"),
        ({"text": "hi"}, {"assistant_only_loss": True}, "TRL takes it for conversations"),
        (
            {
                "conversations": [
                    {"from": "user", "value": "a"},
                    {"from": "assistant", "value": "b"},
                ]
            },
            {"assistant_only_loss": True},
            "TRL takes it for conversations",
        ),
    ],
    ids=["tokens", "marked tokens", "text", "from and value"],
)
def test_check_stops_where_the_trainer_does(tmp_path, known_template, row, changes, problem):
    config = configuration(tmp_path, known_template, **changes)
    Path(config["dataset_name"]).write_text(json.dumps(row) + "\n")
    result = run(tmp_path, config)
    path = tmp_path / "run.yaml"
    if problem is None:
        assert result.exit_code == 0, result.output
        _, args, *_ = parse(["--config", str(path)])
        StarDSSTrainer(str(known_template), args=args, train_dataset=Dataset.from_list([row]))
    else:
        assert result.exit_code == 1
        assert problem in " ".join(result.output.split())
        _, args, *_ = parse(["--config", str(path)])
        with pytest.raises(ValueError, match="not conversational"):
            StarDSSTrainer(str(known_template), args=args, train_dataset=Dataset.from_list([row]))


def test_a_file_that_is_no_configuration(tmp_path):
    path = tmp_path / "list.yaml"
    path.write_text("- a\n- b\n")
    assert runner.invoke(app, ["check", str(path)]).exit_code != 0
    assert runner.invoke(app, ["check", str(tmp_path / "absent.yaml")]).exit_code != 0


@pytest.mark.skipif(importlib.util.find_spec("axolotl") is not None, reason="Axolotl is installed")
def test_a_missing_host_is_named(tmp_path):
    path = tmp_path / "axolotl.yaml"
    path.write_text("base_model: x\nstar_dss: {guard: demo}\n")
    with pytest.raises(PluginError, match=r"star-dss-plugin\[axolotl\]"):
        check_config(path, data=False)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"guard: \xff", "cannot be read: 'utf-8' codec"),
        (b"a: 2001-99-99", "cannot be read: month must be in 1..12"),
        (b"a: 0b_", "cannot be read: invalid literal"),
        (b"[" * 5000, "cannot be read"),
        (b"1: 2", "has the key 1"),
        (b"env: 3", "not valid"),
    ],
)
def test_yaml_that_no_parser_likes(tmp_path, data, message):
    path = tmp_path / "run.yaml"
    path.write_bytes(data)
    try:
        said = " ".join(check_config(path, data=False).problems)
    except ConfigError as error:
        said = str(error)
    assert message in said


def test_a_stream_is_not_counted(tmp_path, model_dir):
    config = configuration(tmp_path, model_dir, dataset_streaming=True, max_steps=2)
    result = run(tmp_path, config)
    assert result.exit_code == 0, result.output
    said = " ".join(result.output.split())
    assert "train data: a stream, scored 512 rows at a time while the model waits" in said


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, "Set max_steps"),
        ({"max_steps": 2, "guard": None}, "guard"),
        ({"max_steps": 2, "reference": "precomputed"}, "reference is 'precomputed' and the train"),
    ],
)
def test_what_a_stream_needs_is_said_before(tmp_path, model_dir, changes, words):
    config = configuration(tmp_path, model_dir, dataset_streaming=True) | changes
    result = run(tmp_path, config)
    assert result.exit_code == 1
    assert words in " ".join(result.output.split())


def test_a_stream_with_scores_has_nothing_to_score():
    stream = Dataset.from_list([{"star_scores": [1.0]}]).to_iterable_dataset()
    assert "brings its scores" in describe_stream(stream, StarDSSOptions())
    rows = Dataset.from_list([{"input_ids": [1]}]).to_iterable_dataset()
    assert "reads no scores" in describe_stream(rows, StarDSSOptions(loss_type="sft"))
