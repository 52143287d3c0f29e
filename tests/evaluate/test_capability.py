"""Capability through lm-eval: the prompts of our task definitions, and the command."""

import json
import math
import sys

import pytest
import torch
from support.commands import run_command
from support.models import tiny_llama

pytest.importorskip("lm_eval", reason="needs the extra evaluate (lm-eval)")

from star_dss_plugin import ConfigError, DataError
from star_dss_plugin.evaluate import capability
from star_dss_plugin.evaluate.capability import compared, open_tasks, run_tasks

pytestmark = pytest.mark.slow

COLOURS = ["red", "green", "blue"]
CHOICES = [
    {"prompt": f"the {thing} is {{{{good}}}}?", "choices": COLOURS[: 2 + k % 2], "answer": k % 2}
    for k, thing in enumerate(["fox", "dog", "word", "world", "response", "user", "system"])
]
WORKED = [
    {"prompt": f"1,000 + {k} = ?", "response": f"it is\n#### 1,00{k}", "answer": f"1,00{k}"}
    for k in range(8)
]


@pytest.fixture
def task_files(tmp_path):
    """Return a file of multiple-choice tasks and one of worked tasks, by name."""
    for name, rows in (("choices", CHOICES), ("worked", WORKED)):
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / f"{name}.jsonl").write_text(text)
    return {name: tmp_path / f"{name}.jsonl" for name in ("choices", "worked")}


def log_likelihood(model, tokenizer, context, continuation):
    """Return the log-probability of a continuation, from one forward pass."""
    start = len(tokenizer(context).input_ids)
    ids = tokenizer(context + continuation, return_tensors="pt").input_ids
    with torch.no_grad():
        logps = model(ids).logits[0].log_softmax(-1)
    return sum(float(logps[i - 1, ids[0, i]]) for i in range(start, ids.shape[1]))


def test_choices_are_scored_like_those_of_arc(model, tokenizer, task_files):
    """Compared with one forward pass per choice, with exactly this prompt."""
    right, normed = [], []
    for row in CHOICES:
        context = f"Question: {row['prompt']}\nAnswer:"
        each = [log_likelihood(model, tokenizer, context, f" {c}") for c in row["choices"]]
        right.append(each.index(max(each)) == row["answer"])
        by_length = [x / len(c) for x, c in zip(each, row["choices"])]
        normed.append(by_length.index(max(by_length)) == row["answer"])
    with open_tasks(data={"colours": task_files["choices"]}) as tasks:
        found = run_tasks(model.eval(), tokenizer, tasks)
    numbers = found["results"]["file:colours"]
    share = sum(right) / len(right)
    assert 0 < share < 1  # otherwise the comparison shows little
    assert numbers["acc,none"] == pytest.approx(share)
    assert numbers["acc_norm,none"] == pytest.approx(sum(normed) / len(normed))
    expected = math.sqrt(share * (1 - share) / (len(right) - 1))
    assert numbers["acc_stderr,none"] == pytest.approx(expected)
    assert found["n-shot"]["file:colours"] == 0


def test_worked_answers_are_prompted_and_extracted_like_those_of_gsm8k(
    model, tokenizer, task_files, monkeypatch
):
    from lm_eval.models.huggingface import HFLM

    requested = []

    def generate_until(self, requests, **kwargs):
        requested.extend(requests)
        answers = []
        for k, request in enumerate(requests):
            truth = request.doc["answer"].replace(",", "")
            answer = [f"so\n#### {truth}.", f"I say {truth}", "#### 7", ""][k % 4]
            answers.append(f" {answer}")
        return answers

    monkeypatch.setattr(HFLM, "generate_until", generate_until)
    with open_tasks(data={"sums": task_files["worked"]}) as tasks:
        found = run_tasks(model, tokenizer, tasks)
    numbers = found["results"]["file:sums"]
    assert numbers["exact_match,strict-match"] == 2 / 8
    assert numbers["exact_match,flexible-extract"] == 4 / 8
    assert found["n-shot"]["file:sums"] == 5
    for request in requested:
        context, settings = request.args
        assert settings["do_sample"] is False
        *shots, last = context.split("\n\n")
        assert last == f"Question: {request.doc['prompt']}\nAnswer:"
        assert len(shots) == len(set(shots)) == 5
        known = {f"Question: {r['prompt']}\nAnswer: {r['response']}" for r in WORKED}
        own_example = f"Question: {request.doc['prompt']}\nAnswer: {request.doc['response']}"
        assert set(shots) <= known - {own_example}


def test_every_model_gets_the_same_examples(tokenizer, task_files):
    with open_tasks(data={"sums": task_files["worked"]}, num_fewshot=2) as tasks:
        settings = {"num_fewshot": 2, "limit": 2}
        first = run_tasks(tiny_llama(len(tokenizer)), tokenizer, tasks, **settings)
        again = run_tasks(tiny_llama(len(tokenizer)), tokenizer, tasks, **settings)
    assert first["results"] == again["results"]
    assert first["n-samples"]["file:sums"] == {"original": 8, "effective": 2}
    json.dumps(first, allow_nan=False)


def test_a_group_replaces_its_subtasks():
    def results(shift):
        return {
            "results": {
                "mmlu": {"alias": "mmlu", "acc,none": 0.5 + shift, "acc_stderr,none": 0.01},
                "mmlu_law": {"acc,none": 0.4, "acc_stderr,none": None, "sample_len": 3},
                "sums": {"exact_match,strict-match": 0.25, "exact_match_stderr,strict-match": None},
            },
            "group_subtasks": {"mmlu": ["mmlu_law"], "sums": []},
            "n-shot": {"sums": 5},
            "n-samples": {"sums": {"original": 9, "effective": 4}},
        }

    other = results(0.1)
    del other["results"]["sums"]
    group, sums = compared([results(0), other])
    assert (group.task, group.metric, group.shots, group.rows) == ("mmlu", "acc", None, None)
    assert group.values == ((0.5, 0.01), (0.6, 0.01))
    assert (sums.metric, sums.shots, sums.rows) == ("exact_match (strict-match)", 5, 4)
    assert sums.values == ((0.25, None), None)


def with_row(row):
    """Return two valid rows and this one."""
    return [*CHOICES[:2], row]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "no rows|cannot be read"),
        (with_row({**CHOICES[0], "answer": 2}), "Row 2: .*counted from 0"),
        (with_row({**CHOICES[0], "answer": -1}), "Row 2: .*counted from 0"),
        (with_row({**CHOICES[0], "choices": ["one"]}), "Row 2: .*two or more"),
        (with_row({**CHOICES[0], "prompt": " "}), "Row 2: .*'prompt' must be a text"),
        ([{"prompt": "x", "answer": "2"}], "'response' and 'answer'"),
        ([{"prompt": "x", "response": "2", "answer": 2}], "'response' and 'answer'"),
        (WORKED[:5], "5 rows, too few for 5 examples"),
    ],
)
def test_unusable_rows_are_refused(tmp_path, rows, message):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(DataError, match=message), open_tasks(data={"mine": path}):
        pass


def test_missing_tasks_and_files_are_refused(tmp_path, task_files):
    def refused(*args, **kwargs):
        with pytest.raises((ConfigError, DataError)) as caught, open_tasks(*args, **kwargs):
            pass
        return str(caught.value)

    assert "No task was given" in refused()
    assert "does not exist" in refused(data={"x": tmp_path / "x.jsonl"})
    (tmp_path / "x.csv").write_text("prompt")
    assert "is not a .jsonl file" in refused(data={"x": tmp_path / "x.csv"})


def test_unknown_lm_eval_tasks_are_refused(monkeypatch):
    # HF_HUB_OFFLINE is set for all tests.
    with (
        pytest.raises(ConfigError, match=r"'gsm8k' cannot be loaded.*--tasks-data"),
        open_tasks(["gsm8k"]),
    ):
        pass

    class Few:
        all_tasks = ["arc_easy", "gsm8k", "mmlu"]

    monkeypatch.setattr("lm_eval.tasks.TaskManager", lambda **_: Few())
    with (
        pytest.raises(ConfigError, match=r"no task 'gsm8kk'. Did you mean 'gsm8k'\?"),
        open_tasks(["gsm8kk"]),
    ):
        pass


def test_a_file_may_have_the_name_of_an_lm_eval_task(tmp_path, task_files):
    with open_tasks(
        data={"gsm8k": task_files["worked"], "a b/../c": task_files["choices"]}
    ) as tasks:
        assert tasks.names == ("file:gsm8k", "file:a b/../c")


def test_tasks_that_run_generated_code_are_refused():
    class Unsafe:
        UNSAFE_CODE = True

    class Manager:
        def load(self, names):
            return {"tasks": {names[0]: Unsafe()}}

        def load_task_or_group(self, names):
            return {"group": {names[0]: Unsafe()}}

    with pytest.raises(ConfigError, match="never confirms"):
        capability._check_loads(Manager(), "humaneval")


def test_a_file_whose_name_is_a_pattern_is_refused(tmp_path):
    """lm-eval takes the name for a pattern, which matches rows1.jsonl instead."""
    for name in ("rows[1].jsonl", "rows1.jsonl"):
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in CHOICES))
    with (
        pytest.raises(DataError, match="read as a pattern"),
        open_tasks(data={"mine": tmp_path / "rows[1].jsonl"}),
    ):
        pass


def test_a_missing_lm_eval_is_named_with_its_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(ConfigError, match=r"star-dss-plugin\[evaluate\]"):
        capability.check_lm_eval()


def run(monkeypatch, *argv):
    """Return the exit status of `star-dss capability` with these arguments."""
    return run_command(monkeypatch, "capability", *argv)


def test_capability_compares_models(
    monkeypatch, capsys, task_files, model_dir, tokenizer, tmp_path
):
    other = tmp_path / "other"
    tiny_llama(len(tokenizer), seed=1).save_pretrained(other)
    tokenizer.save_pretrained(other)
    out = tmp_path / "new" / "capability.json"
    files = [x for name, path in task_files.items() for x in ("--tasks-data", f"{name}={path}")]
    common = ("--limit", 3, "--device", "cpu", "--num-fewshot", 1, "-o", out)
    monkeypatch.setenv("COLUMNS", "200")
    assert run(monkeypatch, model_dir, other, *files, *common) == 0
    printed = capsys.readouterr().out
    for word in ("choices", "acc_norm", "exact_match (strict-match)", "±", "only the first 3 rows"):
        assert word in printed
    found = json.loads(out.read_text())
    assert list(found["models"]) == [str(model_dir), str(other)]
    for one in found["models"].values():
        assert one["n-samples"]["file:choices"]["effective"] == 3
        assert one["n-shot"] == {"file:choices": 1, "file:worked": 1}
    assert found["options"]["limit"] == 3


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "No task was given"),
        (["--tasks-data", "x.jsonl"], "NAME=FILE.jsonl"),
        (["--tasks-data", "a=x.jsonl", "--tasks-data", "a=y.jsonl"], "a name of its own"),
        (["model"], "given twice"),
        (["-o", "."], "is a folder"),
        (["--device", "abacus"], "device is 'abacus'"),
    ],
)
def test_capability_refuses_wrong_options(monkeypatch, capsys, model_dir, argv, message):
    argv = [model_dir if x == "model" else x for x in argv]
    assert run(monkeypatch, model_dir, *argv) == 2
    assert message in " ".join(capsys.readouterr().err.split())


def test_capability_refuses_an_output_that_cannot_be_written_before_a_model_is_loaded(
    monkeypatch, capsys, task_files, tmp_path
):
    (tmp_path / "file").write_text("")
    output = tmp_path / "file" / "capability.json"
    data = ("--tasks-data", f"sums={task_files['worked']}")
    assert run(monkeypatch, tmp_path / "no-model", *data, "-o", output) == 2
    assert f"{output} cannot be written" in capsys.readouterr().err
