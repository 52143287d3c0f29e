"""Axolotl's commands, each in a process of its own, as a user runs them."""

import json
import re
import subprocess
import sys

from axolotl_runs import LORA, chat, configuration, multi_turn, output_of, write_config


def guard_was_asked(out):
    return "STAR scores by test-words" in out


def test_preprocess_train_evaluate_and_merge_lora(start, tmp_path_factory, model_dir):
    folder = tmp_path_factory.mktemp("run")
    config = configuration(
        folder,
        model_dir,
        datasets=[chat(folder / "chat.jsonl", multi_turn())],
        val_set_size=4,
        micro_batch_size=2,
        **LORA,
    )
    path = write_config(folder, config)

    # Two processes at once: the second waits for the scores of the first.
    both = [start("preprocess", path) for _ in range(2)]
    outs = [output_of(process) for process in both]
    assert sum(map(guard_was_asked, outs)) == 1
    for out in outs:
        assert re.search(r"scored the train data: 8 responses in \d+ prefixes; for 8 of them", out)

    out = output_of(start("train", path, "--launcher", "python", "--learning-rate", "0.005"))
    assert not guard_was_asked(out)
    assert out.count("STAR-DSS is active: loss_type=star_dss") == 1
    for name in ("mean_score", "share_below_threshold", "ce", "kl", "kl_weight_mass"):
        assert f"star_dss/{name}" in out
    record = json.loads((folder / "out" / "star_dss.json").read_text())
    assert record["options"]["chunk_size"] == 2
    assert record["data"]["train"]["responses"] == 8
    card = (folder / "out" / "README.md").read_text()
    assert card.count("## STAR-DSS") == 1
    assert "`test-words`, one score per 2 tokens" in card
    assert (folder / "out" / "adapter_model.safetensors").is_file()

    adapter = ("--lora-model-dir", folder / "out")
    out = output_of(start("evaluate", path, "--launcher", "python", *adapter))
    assert not guard_was_asked(out)
    assert "eval_star_dss/ce" in out
    summary = (folder / "out" / "eval_summary.csv").read_text()
    assert re.search(r"^star_dss/mean_score,0\.\d+,0\.\d+$", summary, flags=re.MULTILINE)

    output_of(start("merge-lora", path, *adapter))
    assert (folder / "out" / "merged" / "model.safetensors").is_file()


def test_an_unknown_option_stops_the_command(environment, tmp_path, model_dir):
    config = configuration(tmp_path, model_dir, star_dss={"guard": "test-words", "chunk_sise": 5})
    # Run the program of this environment, also if another one is first in PATH.
    code = "from axolotl.cli.main import main; main()"
    words = ("train", str(write_config(tmp_path, config)), "--launcher", "python")
    done = subprocess.run(
        [sys.executable, "-c", code, *words],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode != 0
    out = done.stdout + done.stderr
    assert "chunk_sise" in out
    assert "Extra inputs are not permitted" in out
    assert not (tmp_path / "out" / "README.md").exists()
