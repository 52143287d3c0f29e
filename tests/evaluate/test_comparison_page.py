"""The page of a comparison, and `star-dss evaluate`."""

import base64
import hashlib
import html
import json
import re

from support.commands import run_command as run
from support.comparisons import BENIGN, HARMFUL, compared, prompts
from support.guards import WordGuard

from star_dss_plugin.evaluate import comparison
from star_dss_plugin.evaluate.page import render_comparison

HOSTILE = "<script>alert(1)</script><img src=x onerror=alert(1)>\u202e]]>{{ 7 * 7 }}"


def test_the_page_escapes_prompts_and_answers(model_dirs, tmp_path, monkeypatch):
    monkeypatch.setattr(
        comparison,
        "local_generation",
        lambda *_: lambda ids, _length: [(i, HOSTILE) for i in range(len(ids))],
    )
    found = compared(
        model_dirs, tmp_path, prompts=prompts(harmful=[{"prompt": HOSTILE, "target": HOSTILE}])
    )
    page = render_comparison(found)
    assert "<script" not in page
    assert "<img" not in page
    assert "\u202e" not in page
    assert "⟨U+202E⟩" in page
    assert "{{ 7 * 7 }}" in page
    # One style sheet, and its hash is the one that the policy allows.
    [policy] = re.findall(r'Content-Security-Policy" content="([^"]+)"', page)
    [digest] = re.findall(r"default-src 'none'; style-src 'sha256-([^']+)'", html.unescape(policy))
    [style] = re.findall(r"<style>(.*?)</style>", page, flags=re.DOTALL)
    assert base64.b64encode(hashlib.sha256(style.encode()).digest()).decode() == digest


def test_the_page_can_omit_the_text(model_dirs, tmp_path):
    found = compared(model_dirs, tmp_path)
    whole, bare = render_comparison(found), render_comparison(found, text=False)
    assert "is this bad?" in whole
    assert "is this bad?" not in bare
    assert "safe share" in bare


def test_the_page_marks_the_verdicts_of_a_demonstration_guard(model_dirs, tmp_path, monkeypatch):
    monkeypatch.setattr(WordGuard, "demonstration", True)
    page = render_comparison(compared(model_dirs, tmp_path, guard="test-words"))
    assert "by test-words (DEMONSTRATION ONLY, protects nobody)." in page


def test_the_page_unfolds_prompts_on_which_models_differ(model_dirs, tmp_path, monkeypatch):
    answers = iter(["I'm sorry.", "I'm sorry.", "fine", "I'm sorry.", "Sure.", "fine"])
    monkeypatch.setattr(
        comparison,
        "local_generation",
        lambda *_: lambda ids, _length: [(i, next(answers)) for i in range(len(ids))],
    )
    page = render_comparison(compared(model_dirs, tmp_path, prefill_tokens=0))
    assert page.count("<details>") == 2
    assert page.count("<details open>") == 1


# The command


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_evaluate_writes_results_and_a_page(monkeypatch, capsys, model_dirs, tmp_path):
    out = tmp_path / "evaluation"
    code = run(
        monkeypatch,
        "evaluate",
        *model_dirs,
        "--prompts",
        write_rows(tmp_path / "h.jsonl", HARMFUL),
        "--benign",
        write_rows(tmp_path / "b.jsonl", BENIGN),
        "-o",
        out,
        "--guard",
        "test-words",
        "--max-new-tokens",
        4,
        "-q",
    )
    assert code == 0
    printed = capsys.readouterr().out
    assert "first" in printed
    assert "vs first" in printed
    found = json.loads((out / "results.json").read_text())
    assert [m["name"] for m in found["models"]] == ["first", "second"]
    assert set(found["models"][0]["measures"]) == {
        "safe_share",
        "attack_success",
        "refusals",
        "prefill_safe_share",
        "prefill_attack_success",
        "prefill_refusals",
        "over_refusal",
    }
    assert "is this bad?" not in (out / "results.json").read_text()
    assert "is this bad?" in (out / "answers.html").read_text()


def test_evaluate_names_a_file_that_cannot_be_read(monkeypatch, capsys, model_dirs, tmp_path):
    assert run(monkeypatch, "evaluate", model_dirs[0], "--prompts", tmp_path / "no.jsonl") == 2
    assert "cannot be read" in capsys.readouterr().err
