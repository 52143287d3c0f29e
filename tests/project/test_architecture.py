"""The page on the architecture matches the code: functions, their order, and the layers."""

import json
import pkgutil
import re
import sys
import tomllib

import pytest
import torch
from support.paths import ROOT
from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments

from star_dss_plugin import attach, score_dataset
from star_dss_plugin.data.reading import read_dataset

PAGE = (ROOT / "docs" / "architecture.md").read_text()
CALLS = re.findall(r"^\| (\d+) \| `([\w.]+)` \|", PAGE, flags=re.MULTILINE)


def resolved(name):
    """Return the object of this name within the package."""
    return pkgutil.resolve_name(f"star_dss_plugin.{name}")


def test_the_calls_are_numbered():
    assert [int(number) for number, _ in CALLS] == list(range(1, len(CALLS) + 1))
    assert len(CALLS) > 10


def test_modules_and_functions_in_the_text_exist():
    package = ROOT / "star_dss_plugin"
    for path in re.findall(r"`([\w/]+(?:\.py|/))`", PAGE):
        inside = path.removeprefix("star_dss_plugin/")
        assert (package / inside).exists() or (ROOT / path).exists(), path
    for name in re.findall(r"`([a-z_]+(?:\.\w+)+)`", PAGE):
        if not name.endswith((".py", ".toml")):
            assert callable(resolved(name)), name


@pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true")
def test_scoring_and_training_call_these_functions_in_this_order(
    tmp_path, model, tokenizer, folder_of
):
    """A run makes the calls of the table in this order, among others."""
    codes = {}
    for _, name in CALLS:
        function = resolved(name)
        codes[getattr(function, "__wrapped__", function).__code__] = name
    guard = {
        "preset": "qwen3guard-gen-0.6b",
        "model": str(folder_of("qwen3guard-gen-0.6b")),
        "self_check": False,  # its weights are random
        "min_label_mass": 0.0,
    }
    rows = [{"prompt": "is this bad?", "completion": " no! it is a word"}] * 2
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    order = []

    def note(frame, event, _):
        if event == "call" and (name := codes.get(frame.f_code)):
            order.append(name)

    sys.setprofile(note)
    try:
        rows = read_dataset(str(tmp_path / "rows.jsonl"))
        data = score_dataset(rows, tokenizer, guard=guard, guard_device="cpu", progress=False)
        trainer = Trainer(
            model,
            args=TrainingArguments(
                str(tmp_path / "out"), max_steps=1, report_to="none", use_cpu=True
            ),
            train_dataset=data,
            data_collator=DataCollatorForSeq2Seq(tokenizer),
            processing_class=tokenizer,
        )
        attach(trainer, reference="copy")
        trainer.train()
    finally:
        sys.setprofile(None)
    later_calls = iter(order)
    for _, name in CALLS:
        assert name in later_calls, f"{name} is not called after the functions above it"
    assert torch.isfinite(torch.tensor(trainer.state.log_history[-1]["train_loss"]))


def test_the_layers_are_those_of_the_contract():
    text = PAGE[PAGE.index("| layer |") : PAGE.index("Heavy packages")]
    documented = [
        set(re.findall(r"`(\w+)`", row.split("|")[1])) for row in text.splitlines()[2:] if row
    ]
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]
    (layers,) = (c["layers"] for c in settings["contracts"] if c["type"] == "layers")
    contract = [
        {name.strip().removeprefix("star_dss_plugin.") for name in layer.split("|")}
        for layer in layers
    ]
    assert documented == contract


def test_every_module_has_a_layer():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]
    (layers,) = (c["layers"] for c in settings["contracts"] if c["type"] == "layers")
    named = {name.strip().removeprefix("star_dss_plugin.") for s in layers for name in s.split("|")}
    package = ROOT / "star_dss_plugin"
    there = {path.stem for path in package.glob("*.py")} - {"__init__"}
    there |= {path.parent.name for path in package.glob("*/__init__.py")}
    assert named - {"star_dss_trl", "star_dss_axolotl"} == there
