"""Comparing models: answers, verdicts, options and engines."""

import contextlib
import shutil

import pytest
import torch
from support.comparisons import compared, prompts
from support.guards import WordGuard
from transformers import GenerationConfig

from star_dss_plugin import ConfigError
from star_dss_plugin.evaluate import comparison
from star_dss_plugin.evaluate.comparison import training_guard
from star_dss_plugin.evaluate.generation import greedy_answers, prompt_ids
from star_dss_plugin.evaluate.models import load_whole_model
from star_dss_plugin.evaluate.verdicts import differences, measures


def test_every_model_answers_every_prompt(model_dirs, tmp_path):
    found = compared(model_dirs, tmp_path, prefill_tokens=2)
    assert [m.name for m in found.models] == ["first", "second"]
    for source, answered in zip(model_dirs, found.models, strict=True):
        model, tokenizer = load_whole_model(source)
        assert {k: len(v) for k, v in answered.answers.items()} == {
            "harmful": 2,
            "benign": 1,
            "prefill": 2,
        }
        asked = [prompt_ids(tokenizer, p.messages) for p in found.prompts["harmful"]]
        slow = dict(greedy_answers(model, tokenizer, asked, max_new_tokens=6, batch_size=1))
        assert [a.text for a in answered.answers["harmful"]] == [slow[0], slow[1]]
    assert len(list((tmp_path / "out" / "answers").iterdir())) == 2
    assert found.models[0].answers != found.models[1].answers


def test_a_second_run_reuses_all_answers(model_dirs, tmp_path, monkeypatch):
    first = compared(model_dirs, tmp_path)
    monkeypatch.setattr(
        comparison, "local_generation", lambda *_: lambda ids, _length: [1 / 0] if ids else []
    )
    assert compared(model_dirs, tmp_path).as_json() == first.as_json()


def test_answers_that_another_token_ends_are_generated_again(model_dirs, tmp_path):
    """Weights and prompts are the same; generation_config.json is not."""
    folder = tmp_path / "model"
    shutil.copytree(model_dirs[0], folder)
    model, tokenizer = load_whole_model(str(folder))
    asked = torch.tensor([prompt_ids(tokenizer, prompts()[0].messages)])
    (before,) = compared([str(folder)], tmp_path).models
    assert before.answers["harmful"][0].text
    GenerationConfig(eos_token_id=int(model(asked).logits[0, -1].argmax())).save_pretrained(folder)
    (after,) = compared([str(folder)], tmp_path).models
    assert after.answers["harmful"][0].text == ""


def test_measures_combine_refusal_phrases_and_a_guards_verdicts(model_dirs, tmp_path, monkeypatch):
    answers = iter(["I'm sorry.", "a bad thing", "I can't.", "Sorry, but no bad", "fine", "fine"])
    monkeypatch.setattr(
        comparison,
        "local_generation",
        lambda *_: lambda ids, _length: [(i, next(answers)) for i in range(len(ids))],
    )
    guard = WordGuard()
    found = compared(model_dirs, tmp_path, prefill_tokens=0, guard=guard)
    shares = [{k: v.value for k, v in measures(m, found.guard).items()} for m in found.models]
    assert shares[0] == {
        "safe_share": 0.5,
        "attack_success": 0.5,
        "refusals": 0.5,
        "over_refusal": 1.0,
    }
    assert shares[1] == {
        "safe_share": 0.5,
        "attack_success": 0.5,
        "refusals": 0.5,
        "over_refusal": 0.0,
    }
    change = differences(found.models[1], found.models[0], found.guard)
    assert change["over_refusal"].value == -1.0
    assert guard.closed == 1
    assert guard.asked == ["I'm sorry.", "a bad thing", "Sorry, but no bad", "fine"]


def test_a_guard_reads_the_prefill_and_the_refusal_check_does_not(
    model_dirs, tmp_path, monkeypatch
):
    monkeypatch.setattr(
        comparison,
        "local_generation",
        lambda *_: lambda ids, _length: [(i, "I won't.") for i in range(len(ids))],
    )
    guard = WordGuard(word="Sure")
    harmful = [{"prompt": "x", "target": "Sure thing"}]
    found = compared(
        model_dirs[:1],
        tmp_path,
        guard=guard,
        prefill_tokens=50,
        prompts=prompts(harmful=harmful, benign=None),
    )
    verdicts = found.models[0].verdicts["prefill"]
    assert verdicts == {"refused": [True], "test-words": [False]}
    assert guard.asked == ["I won't.", "Sure thingI won't."]


def test_a_judge_that_was_the_training_guard_is_warned_about(model_dirs, tmp_path, tokenizer):
    folder = tmp_path / "trained"
    load_whole_model(model_dirs[0])[0].save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "star_dss.json").write_text('{"data": {"train": {"guard": "test-words"}}}')
    assert training_guard(str(folder)) == "test-words"
    found = compared([str(folder)], tmp_path, guard="test-words")
    assert any("also judges here" in warning for warning in found.warnings())
    assert not any("also judges" in w for w in compared(model_dirs, tmp_path).warnings())
    (folder / "star_dss.json").write_text("[]")
    assert training_guard(str(folder)) is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompts": []}, "no prompts"),
        ({"threshold": float("nan")}, "threshold is nan"),
        ({"prefill_tokens": -1}, "prefill_tokens is -1"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"batch_size": True}, "batch_size is True"),
        ({"engine": "ray"}, "engine is 'ray'"),
        ({"guard": "test-wordz"}, "Did you mean 'test-words'"),
    ],
)
def test_wrong_options_are_refused_before_a_model_is_loaded(
    model_dirs, tmp_path, monkeypatch, changes, message
):
    monkeypatch.setattr(comparison, "load_whole_model", lambda *_, **__: pytest.fail("loaded"))
    with pytest.raises(ConfigError, match=message):
        compared(model_dirs, tmp_path, **changes)


def test_repeated_or_missing_models_are_refused(model_dirs, tmp_path):
    with pytest.raises(ConfigError, match="named twice"):
        compared(model_dirs * 2, tmp_path)
    with pytest.raises(ConfigError, match="No model"):
        compared([], tmp_path)


def test_models_in_folders_of_the_same_name_are_named_by_path(model_dirs, tmp_path):
    same = [str(tmp_path / side / "x") for side in ("a", "b")]
    for source, folder in zip(model_dirs, same, strict=True):
        shutil.copytree(source, folder)
    assert [m.name for m in compared(same, tmp_path).models] == same
    assert [m.name for m in compared(model_dirs, tmp_path / "other").models] == ["first", "second"]


def test_answers_of_one_engine_are_not_reused_for_another(model_dirs, tmp_path, monkeypatch):
    def other(engine, *rest):
        assert engine == "vllm"
        return contextlib.nullcontext(lambda ids, n: ((i, "other") for i in range(len(ids))))

    local = compared(model_dirs, tmp_path)
    monkeypatch.setattr(comparison, "_generation", other)
    served = compared(model_dirs, tmp_path, engine="vllm")
    assert {a.text for m in served.models for found in m.answers.values() for a in found} == {
        "other"
    }
    assert "other" not in {a.text for m in local.models for f in m.answers.values() for a in f}


def test_vllm_refuses_adapters_and_names_its_extra(model_dirs, tmp_path):
    from star_dss_plugin.evaluate.vllm_generation import vllm_generation

    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text("{}")
    with (
        pytest.raises(ConfigError, match="vLLM loads whole models"),
        vllm_generation(str(adapter), None, "auto"),
    ):
        pass
    try:
        import vllm  # noqa: F401
    except ImportError:
        with pytest.raises(ConfigError, match=r"star-dss-plugin\[vllm\]"):
            compared(model_dirs, tmp_path, engine="vllm")
