"""The scripts and YAML files in examples/ run as a user starts them."""

import json
import runpy
import sys

import pytest
from support.paths import ROOT

pytest.importorskip("trl")

EXAMPLES = ROOT / "examples"
PAIRS = [("how are you?", "i am fine, thank you."), ("is this bad?", "no! a bad word.")] * 3


@pytest.fixture
def data(tmp_path):
    """Return a file of conversations and one of prompts with completions, by name."""
    chat, plain = tmp_path / "chat.jsonl", tmp_path / "plain.jsonl"
    chat.write_text(
        "".join(
            json.dumps(
                {"messages": [{"role": "user", "content": p}, {"role": "assistant", "content": a}]}
            )
            + "\n"
            for p, a in PAIRS
        )
    )
    plain.write_text(
        "".join(json.dumps({"prompt": p, "completion": " " + a}) + "\n" for p, a in PAIRS)
    )
    return {"chat": chat, "plain": plain}


@pytest.mark.parametrize(
    ("script", "kind"),
    [
        ("trl_trainer", "chat"),
        ("attach_to_sft_trainer", "chat"),
        ("attach_to_sft_trainer", "plain"),
        ("plain_trainer", "plain"),
        ("own_loop", "chat"),
    ],
)
def test_examples_run(script, kind, data, model_dir, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        sys,
        "argv",
        [
            script,
            "--model",
            str(model_dir),
            "--data",
            str(data[kind]),
            "--guard",
            "test-words",
            "--max-steps",
            "1",
        ],
    )
    runpy.run_path(str(EXAMPLES / f"{script}.py"), run_name="__main__")
    out = capsys.readouterr().out
    assert ("STAR-DSS is active" in out) or (script == "own_loop" and "step 0: loss" in out)


@pytest.mark.parametrize("name", ["sft", "streaming"])
def test_the_yaml_of_star_dss_sft(name, data, model_dir, tmp_path, monkeypatch, capsys):
    from star_dss_trl import sft

    text = (EXAMPLES / f"{name}.yaml").read_text()
    for key, value in (
        ("model_name_or_path", model_dir),
        ("dataset_name", data["chat"]),
        ("max_steps", 1),
        ("guard", "test-words"),
        ("output_dir", tmp_path / "out"),
    ):
        lines = text.splitlines()
        text = "\n".join(f"{key}: {value}" if x.startswith(f"{key}:") else x for x in lines)
    config = tmp_path / "run.yaml"
    steps = "" if "max_steps" in text else "max_steps: 1\n"
    config.write_text(text + f"\n{steps}use_cpu: true\nbf16: false\n")
    sft.main(["--config", str(config), "--kl_coef", "0.25"])
    out = capsys.readouterr().out
    assert "kl_coef=0.25" in out
    assert ("the training data is a stream" in out) == (name == "streaming")
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()
