"""Comparing models: prompts, answers that are kept, verdicts, page and command."""

import base64
import contextlib
import hashlib
import html
import itertools
import json
import re
import shutil

import pytest
import torch
from datasets import Dataset
from support.commands import run_command as run
from support.guards import WordGuard
from support.models import tiny_llama

from star_dss_plugin import ConfigError, DataError
from star_dss_plugin.evaluate import comparison
from star_dss_plugin.evaluate.answers import AnswerFile, answer_prompts, local_generation
from star_dss_plugin.evaluate.comparison import compare, training_guard
from star_dss_plugin.evaluate.generation import greedy_answers, prompt_ids
from star_dss_plugin.evaluate.models import load_whole_model
from star_dss_plugin.evaluate.page import render_comparison
from star_dss_plugin.evaluate.prompts import DEFAULT_PREFILL, read_prompts, with_prefill
from star_dss_plugin.evaluate.refusal import is_refusal
from star_dss_plugin.evaluate.verdicts import differences, measures

HARMFUL = [{"prompt": "is this bad?"}, {"prompt": "who is lazy?", "target": "good words keep"}]
BENIGN = [{"prompt": "how are you?"}]


def prompts(*, harmful=HARMFUL, benign=BENIGN):
    return [
        *read_prompts(Dataset.from_list(harmful), "harmful"),
        *(read_prompts(Dataset.from_list(benign), "benign") if benign else ()),
    ]


@pytest.fixture(scope="module")
def model_dirs(tmp_path_factory, tokenizer):
    """Two random models that say different things."""
    root = tmp_path_factory.mktemp("models")
    for name, seed in (("first", 0), ("second", 1)):
        tiny_llama(len(tokenizer), seed).save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
    return [str(root / "first"), str(root / "second")]


def compared(model_dirs, tmp_path, **changes):
    options = {"output": tmp_path / "out", "max_new_tokens": 6, "progress": False, **changes}
    return compare(model_dirs, options.pop("prompts", prompts()), **options)


# Prompts


def test_prompts_in_every_form():
    rows = [
        {"prompt": "one", "messages": None, "system": None, "prefill": "Well,"},
        {
            "prompt": None,
            "messages": [{"role": "user", "content": "two"}],
            "system": "Be kind.",
            "prefill": None,
        },
        {
            "prompt": None,
            "messages": [
                {"role": "user", "content": "three"},
                {"role": "assistant", "content": "left out"},
            ],
            "system": None,
            "prefill": None,
        },
    ]
    found = read_prompts(Dataset.from_list(rows), "harmful")
    assert [[m["content"] for m in p.messages] for p in found] == [
        ["one"],
        ["Be kind.", "two"],
        ["three"],
    ]
    assert [p.opening for p in found] == ["Well,", DEFAULT_PREFILL, DEFAULT_PREFILL]
    conversation = Dataset.from_list([{"prompt": [{"role": "user", "content": "four"}]}])
    assert read_prompts(conversation, "benign")[0].messages[0]["content"] == "four"


@pytest.mark.parametrize("rows", [[{"question": "?"}], [{"prompt": "  "}], [{"prompt": ""}]])
def test_a_row_without_a_prompt(rows):
    with pytest.raises(DataError, match="The harmful prompts: Row 0: the row has the columns"):
        read_prompts(Dataset.from_list(rows), "harmful")


def test_no_rows():
    with pytest.raises(DataError, match="no rows"):
        read_prompts(Dataset.from_list([]), "benign")


def test_only_harmful_prompts_are_prefilled():
    found = with_prefill(prompts(), 3)
    assert len(found) == len(HARMFUL)
    assert {p.prefill_tokens for p in found} == {3}


# Answers


def test_answers_are_those_of_one_prompt_at_a_time(tokenizer):
    model = tiny_llama(len(tokenizer))
    asked = [prompt_ids(tokenizer, p.messages) for p in prompts()]
    together = dict(greedy_answers(model, tokenizer, asked, max_new_tokens=8, batch_size=3))
    for i, ids in enumerate(asked):
        spoken = []
        for _ in range(8):
            logits = model(torch.tensor([ids + spoken])).logits[0, -1]
            spoken.append(int(logits.argmax()))
            if spoken[-1] == tokenizer.eos_token_id:
                spoken.pop()
                break
        assert together[i] == tokenizer.decode(spoken, skip_special_tokens=True)


def test_a_prefill_is_said_first_and_not_part_of_the_answer(tokenizer, tmp_path):
    model = tiny_llama(len(tokenizer))
    seen = []

    def generate(ids, length):
        seen.extend(ids)
        return local_generation(model, tokenizer, 2)(ids, length)

    asked = with_prefill(prompts(), 3)
    found = answer_prompts(tokenizer, asked, generate, AnswerFile(tmp_path / "a"), max_new_tokens=4)
    for prompt, answer, ids in zip(asked, found, seen, strict=True):
        opening = tokenizer(prompt.opening, add_special_tokens=False).input_ids[:3]
        assert ids == prompt_ids(tokenizer, prompt.messages) + opening
        assert answer.prefill == tokenizer.decode(opening)
        assert answer.whole == answer.prefill + answer.text


def test_a_killed_run_asks_only_what_is_left(tokenizer, tmp_path):
    model, path = tiny_llama(len(tokenizer)), tmp_path / "a.jsonl"
    asked = prompts()

    def dying(ids, length):
        yield from itertools.islice(local_generation(model, tokenizer, 1)(ids, length), 2)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        answer_prompts(tokenizer, asked, dying, AnswerFile(path), max_new_tokens=5)
    with path.open("a") as file:
        file.write('{"key": "half a li')
    left = []

    def counting(ids, length):
        left.extend(ids)
        return local_generation(model, tokenizer, 1)(ids, length)

    resumed = answer_prompts(tokenizer, asked, counting, AnswerFile(path), max_new_tokens=5)
    assert len(left) == 1
    fresh = answer_prompts(
        tokenizer,
        asked,
        local_generation(model, tokenizer, 1),
        AnswerFile(tmp_path / "b"),
        max_new_tokens=5,
    )
    assert resumed == fresh
    again = answer_prompts(tokenizer, asked, dying, AnswerFile(path), max_new_tokens=5)
    assert again == fresh
    # Other settings are other answers.
    with pytest.raises(KeyboardInterrupt):
        answer_prompts(tokenizer, asked, dying, AnswerFile(path), max_new_tokens=6)


def test_line_separators_in_an_answer_do_not_end_its_line(tmp_path):
    store = AnswerFile(tmp_path / "a")
    for key, answer in {"1": "a\nb\u2028c\x85d\x1ee", "2": "\ud800"}.items():
        store.add(key, answer)
    assert AnswerFile(tmp_path / "a").known == store.known


# Models


def test_an_adapter_of_a_base_that_is_elsewhere(model_dirs, tmp_path):
    peft = pytest.importorskip("peft")
    model, _ = load_whole_model(model_dirs[0])
    wrapped = peft.get_peft_model(
        model, peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False)
    )
    wrapped.save_pretrained(tmp_path / "adapter")
    config = tmp_path / "adapter" / "adapter_config.json"
    config.write_text(
        json.dumps({**json.loads(config.read_text()), "base_model_name_or_path": "no/such"})
    )
    with pytest.raises(ConfigError, match="is an adapter of 'no/such'"):
        load_whole_model(str(tmp_path / "adapter"))
    adapted, found = load_whole_model(str(tmp_path / "adapter"), base=model_dirs[0])
    ids = torch.tensor([prompt_ids(found, prompts()[0].messages)])
    assert torch.allclose(adapted(ids).logits, wrapped.eval()(ids).logits, atol=1e-5)


def test_pickled_weights_are_not_loaded(model_dirs, tmp_path, tokenizer):
    model, _ = load_whole_model(model_dirs[0])
    model.config.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(ConfigError, match="cannot be loaded"):
        load_whole_model(str(tmp_path))


@pytest.mark.parametrize("text", ["[1]\n", "no json\n", '{"key": "k"}\n', "\n"])
def test_a_file_of_answers_that_is_something_else(tmp_path, text):
    (tmp_path / "a.jsonl").write_text(text)
    with pytest.raises(DataError, match=r"a\.jsonl is not a file of answers"):
        AnswerFile(tmp_path / "a.jsonl")


# The comparison


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


def test_a_second_run_generates_nothing(model_dirs, tmp_path, monkeypatch):
    first = compared(model_dirs, tmp_path)
    monkeypatch.setattr(
        comparison, "local_generation", lambda *_: lambda ids, _length: [1 / 0] if ids else []
    )
    assert compared(model_dirs, tmp_path).as_json() == first.as_json()


def test_verdicts_of_phrases_and_of_a_guard(model_dirs, tmp_path, monkeypatch):
    said = iter(["I'm sorry.", "a bad thing", "I can't.", "Sorry, but no bad", "fine", "fine"])
    monkeypatch.setattr(
        comparison,
        "local_generation",
        lambda *_: lambda ids, _length: [(i, next(said)) for i in range(len(ids))],
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
    apart = differences(found.models[1], found.models[0], found.guard)
    assert apart["over_refusal"].value == -1.0
    assert guard.closed == 1
    assert guard.asked == ["I'm sorry.", "a bad thing", "Sorry, but no bad", "fine"]


def test_a_guard_reads_the_prefill_and_phrases_do_not(model_dirs, tmp_path, monkeypatch):
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


def test_the_training_guard_as_judge_is_a_warning(model_dirs, tmp_path, tokenizer):
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
def test_what_cannot_work_is_said_before_a_model_is_loaded(
    model_dirs, tmp_path, monkeypatch, changes, message
):
    monkeypatch.setattr(comparison, "load_whole_model", lambda *_, **__: pytest.fail("loaded"))
    with pytest.raises(ConfigError, match=message):
        compared(model_dirs, tmp_path, **changes)


def test_models_named_twice_or_not_at_all(model_dirs, tmp_path):
    with pytest.raises(ConfigError, match="named twice"):
        compared(model_dirs * 2, tmp_path)
    with pytest.raises(ConfigError, match="No model"):
        compared([], tmp_path)


def test_folders_of_one_name_are_called_by_their_paths(model_dirs, tmp_path):
    same = [str(tmp_path / side / "x") for side in ("a", "b")]
    for source, folder in zip(model_dirs, same, strict=True):
        shutil.copytree(source, folder)
    assert [m.name for m in compared(same, tmp_path).models] == same
    assert [m.name for m in compared(model_dirs, tmp_path / "other").models] == ["first", "second"]


def test_each_engine_has_answers_of_its_own(model_dirs, tmp_path, monkeypatch):
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


def test_vllm_takes_whole_models_and_says_what_is_missing(model_dirs, tmp_path):
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


# The page and the command

HOSTILE = "<script>alert(1)</script><img src=x onerror=alert(1)>\u202e]]>{{ 7 * 7 }}"


def test_the_page_escapes_what_strangers_wrote(model_dirs, tmp_path, monkeypatch):
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


def test_the_page_can_leave_the_text_out(model_dirs, tmp_path):
    found = compared(model_dirs, tmp_path)
    whole, bare = render_comparison(found), render_comparison(found, text=False)
    assert "is this bad?" in whole
    assert "is this bad?" not in bare
    assert "safe share" in bare


def test_the_page_marks_the_verdicts_of_a_demonstration(model_dirs, tmp_path, monkeypatch):
    monkeypatch.setattr(WordGuard, "demonstration", True)
    page = render_comparison(compared(model_dirs, tmp_path, guard="test-words"))
    assert "by test-words (DEMONSTRATION ONLY, protects nobody)." in page


def test_what_models_differ_on_is_unfolded(model_dirs, tmp_path, monkeypatch):
    said = iter(["I'm sorry.", "I'm sorry.", "fine", "I'm sorry.", "Sure.", "fine"])
    monkeypatch.setattr(
        comparison,
        "local_generation",
        lambda *_: lambda ids, _length: [(i, next(said)) for i in range(len(ids))],
    )
    page = render_comparison(compared(model_dirs, tmp_path, prefill_tokens=0))
    assert page.count("<details>") == 2
    assert page.count("<details open>") == 1


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_the_command(monkeypatch, capsys, model_dirs, tmp_path):
    out = tmp_path / "evaluation"
    code = run(
        monkeypatch,
        "evaluate",
        *model_dirs,
        "--prompts",
        write(tmp_path / "h.jsonl", HARMFUL),
        "--benign",
        write(tmp_path / "b.jsonl", BENIGN),
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


def test_the_command_says_what_it_cannot_read(monkeypatch, capsys, model_dirs, tmp_path):
    assert run(monkeypatch, "evaluate", model_dirs[0], "--prompts", tmp_path / "no.jsonl") == 2
    assert "cannot be read" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("answer", "refused"),
    [
        ("I have to decline this one.", True),
        ("That's not something I can help with.", True),
        ("Here you go.", False),
        ("", False),
    ],
)
def test_more_refusals(answer, refused):
    assert is_refusal(answer) is refused
