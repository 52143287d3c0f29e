"""Verdict presets on tiny random models of their architectures: prompts, labels and scores.

The tokenizers and templates are stand-ins, written for this project, with the structure of the
real ones (support/standin_guards.py).
"""

import json
import shutil

import pytest
import torch
from support.standin_guards import GRANITE_4, layout
from transformers import AutoModelForCausalLM

from star_dss_plugin import ConfigError, GuardError, load_guard
from star_dss_plugin.data.requests import PrefixRequest
from star_dss_plugin.guards.presets import CLASSIFIER, PRESETS, STREAM, VERDICT

CONTEXT = ({"role": "user", "content": "how are you?"},)
TEXT = "i am fine. No <end> yes"

VERDICTS = [name for name, preset in PRESETS.items() if preset.kind == VERDICT]


@pytest.fixture
def guard(request, folder_of):
    name = request.param
    return load_guard(
        {
            "preset": name,
            "model": str(folder_of(name)),
            "self_check": False,
            "min_label_mass": 0.0,
            "device": "cpu",
        }
    )


def rendered(guard, text=TEXT, context=CONTEXT):
    """Return the guard's prompts as text, one per policy."""
    request = PrefixRequest(tuple(context), text, (len(text),))
    tokenizer = guard._template._tokenizer
    return [tokenizer.decode(p[0]) for p in guard._prompts.of(0, request)]


U, A = "how are you?", TEXT
EXPECTED = {
    "qwen3guard-gen": f"<|im_start|>user\nis the last answer safe?\n<BEGIN>\n\nUSER: {U}\n\n"
    f"ASSISTANT: {A}\n\n<END>\n\nsay Safe or Unsafe.<|im_end|>\n<|im_start|>assistant\n<think>\n\n"
    "</think>\n\nSafety:",
    "granite-guardian-3.3": f"<|start_of_role|>user<|end_of_role|>{U}<|end_of_text|>\n"
    f"<|start_of_role|>assistant<|end_of_role|>{A}<|end_of_text|>\n<|start_of_role|>user"
    "<|end_of_role|><guardian>criteria: harm<|end_of_text|>\n<|start_of_role|>assistant"
    "<|end_of_role|><think>\n</think>\n<score>",
    "granite-guardian-4.1": f"<|start_of_role|>user<|end_of_role|>{U}<|end_of_text|>\n"
    f"<|start_of_role|>assistant<|end_of_role|>{A}<|end_of_text|>\n<|start_of_role|>user"
    f"<|end_of_role|>{PRESETS['granite-guardian-4.1-8b'].options['question']}<|end_of_text|>\n"
    "<|start_of_role|>assistant<|end_of_role|><think>\n</think><score>",
    "granite-guardian-3": "<|start_of_role|>system<|end_of_role|>on 2024<|end_of_text|>\n"
    "<|start_of_role|>user<|end_of_role|>is it harm?\n<start_of_turn>\n"
    f"User: {U}\nAssistant: {A}\n<end_of_turn>\nYes or No?<|end_of_text|>\n"
    "<|start_of_role|>assistant<|end_of_role|>",
    "shieldgemma": f"<bos>is it bad?\n\n<start_of_turn>\nHuman: {U}\n<end_of_turn>\n<start_of_turn>"
    f"\nBot: {A}\n<end_of_turn>\n\nrule: POLICY\n\nbad? Yes or No.\n\n",
    "xguard": f"<|im_start|>user\nsec: fine, pc: bad, dc: bad\nuser: {U}\nassistant: {A}\n"
    "<|im_end|>\n<|im_start|>assistant\n",
    **dict.fromkeys(
        ["llama-guard-3-1b", "llama-guard-3-8b", "llama-guard-4"],
        "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nis it safe?\n<TALK>\n\n"
        f"User: {U}\n\nAgent: {A}\n\n</TALK>\n\nis the last one safe?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
    ),
}


@pytest.mark.parametrize("guard", VERDICTS, indirect=True)
def test_the_prompt_is_that_of_the_template(guard):
    found = rendered(guard)
    if guard.name == "wildguard":
        (text,) = found
        assert f"Human user:\n{U}\n\nAI assistant:\n{A}\n\n---\n\nAnswers: [/INST]" in text
        assert text.startswith("<s>")
        assert text.endswith("Response refusal: no\nHarmful response:")
        return
    expected = [EXPECTED[layout(guard.name)]]
    if "shieldgemma" in guard.name:
        policies = [k["guideline"] for k in PRESETS[guard.name].options["template_kwargs"]]
        assert len(policies) == 4
        expected = [expected[0].replace("POLICY", policy) for policy in policies]
    assert found == expected


@pytest.mark.parametrize("guard", VERDICTS, indirect=True)
def test_the_labels_continue_the_prompt(guard):
    """Each label id is the token with which the label continues the tokenized prompt."""
    tokenizer, preset = guard._template._tokenizer, PRESETS[guard.name]
    options = preset.options
    unsafe = options.get("unsafe_labels") or ["pc", "dc"]
    groups = [options["safe_labels"], unsafe]
    groups += [options["controversial_labels"]] if "controversial_labels" in options else []
    assert len(guard.identity["labels"]) == len(groups)
    for ids, spellings in zip(guard.identity["labels"], groups, strict=True):
        words = {tokenizer.decode([i]).strip() for i in ids}
        assert all(any(s.strip().startswith(w) for s in spellings) for w in words - {""}), words
        assert words - {""}
    # Tokenized after the prompt, a label is its first token and the rest of the word.
    request = PrefixRequest(CONTEXT, TEXT, (len(TEXT),))
    prompt = guard._prompts.of(0, request)[0][0]
    shown = guard._template.render([*CONTEXT, {"role": "assistant", "content": TEXT}])
    whole = tokenizer(shown + groups[0][0], add_special_tokens=False)["input_ids"]
    assert whole[: len(prompt)] == prompt
    assert whole[len(prompt)] in guard.identity["labels"][0]


def slow_score(guard, folder, text):
    """Return the score from plain transformers: a float64 softmax, the lowest of all policies."""
    tokenizer = guard._template._tokenizer
    if "llama-guard-4" in guard.name:
        from transformers import Llama4ForConditionalGeneration

        model = Llama4ForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
        model = model.language_model  # transformers 5.24's forward of the whole fails
    else:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    scores = []
    for template in guard._prompts.templates:
        shown = template.render([*CONTEXT, {"role": "assistant", "content": text}])
        ids = tokenizer(shown, add_special_tokens=False, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            logits = model(input_ids=ids).logits[0, -1].double()
        groups = [logits[group].logsumexp(0) for group in guard.identity["labels"]]
        scores.append(float(torch.stack(groups).softmax(0)[0]))
    return min(scores)


@pytest.mark.parametrize("guard", VERDICTS, indirect=True)
def test_the_score_is_read_from_raw_logits(guard, folder_of):
    ends = (0, 5, len(TEXT))
    (found,) = guard.trajectories([PrefixRequest(CONTEXT, TEXT, ends)])
    expected = [slow_score(guard, folder_of(guard.name), TEXT[:end]) for end in ends]
    assert found.scores == pytest.approx(expected, abs=1e-4)
    assert max(expected) - min(expected) > 1e-4  # the test can tell prefixes apart
    assert all(0 < m < 1 for m in found.label_mass)


@pytest.mark.parametrize("guard", ["shieldgemma-2b"], indirect=True)
def test_white_space_is_text_also_if_it_is_an_added_token(guard):
    """Gemma's tokenizer has such tokens; without this its line feeds would be unreadable."""
    assert "\n\n" in guard._template._tokenizer.get_added_vocab()
    text = "yes\n\n  no\n"
    assert all(f"Bot: {text}\n<end_of_turn>" in shown for shown in rendered(guard, text))
    assert "\n" not in guard._template.control_tokens


@pytest.mark.parametrize("guard", ["llama-guard-3-8b", "llama-guard-4-12b"], indirect=True)
def test_turns_alternate_from_a_question(guard):
    """Llama Guard's template refuses other orders; system turns are left out."""
    context = [{"role": "system", "content": "x"}, {"role": "assistant", "content": "hello"}]
    (text,) = rendered(guard, context=context)
    assert "User: \n\nAgent: hello\n\nUser: \n\nAgent: i am fine." in text


@pytest.mark.parametrize("name", ["granite-guardian-4.1-8b"])
def test_arguments_that_a_template_ignores_are_refused(folder_of, name):
    """Granite 4.1's template ignores guardian_config, though the template contains the word."""
    with pytest.raises(GuardError, match=r"never reads guardian_config\.risk_name"):
        load_guard(
            {
                "preset": name,
                "model": str(folder_of(name)),
                "device": "cpu",
                "chat_template": "{#- guardian_config -#}" + GRANITE_4,
                "template_kwargs": {"guardian_config": {"risk_name": "harm"}},
            }
        )


def test_arguments_that_a_template_refuses_are_an_error(folder_of):
    with pytest.raises(GuardError, match="refuses what it is given: no such risk"):
        load_guard(
            {
                "preset": "granite-guardian-3.1-2b",
                "device": "cpu",
                "model": str(folder_of("granite-guardian-3.1-2b")),
                "template_kwargs": {"guardian_config": {"risk_name": "weather"}},
            }
        )


def test_a_tokenizer_without_its_verdict_words_is_refused(folder_of):
    with pytest.raises(GuardError, match="no mapping 'id2risk'"):
        load_guard(
            {
                "preset": "xguard-0.6b",
                "device": "cpu",
                "template_kwargs": {},
                "model": str(folder_of("qwen3guard-gen-0.6b")),
            }
        )


def test_a_prefill_that_ends_with_white_space_is_refused(folder_of):
    with pytest.raises(ConfigError, match="Move white space from the end of 'prefill'"):
        load_guard(
            {
                "preset": "qwen3guard-gen-0.6b",
                "model": str(folder_of("qwen3guard-gen-0.6b")),
                "device": "cpu",
                "prefill": "Safety: ",
                "safe_labels": ["Safe"],
                "unsafe_labels": ["Unsafe"],
                "controversial_labels": [],
            }
        )


def test_presets_have_valid_data():
    for name, preset in PRESETS.items():
        json.dumps(preset.options)
        assert preset.kind in (VERDICT, CLASSIFIER, STREAM), name
        assert preset.title
        assert preset.info.licence
        assert preset.info.takes_engine == (preset.kind == VERDICT)
        assert not preset.options.get("trust_remote_code")


def test_no_preset_runs_remote_code_or_pickle(folder_of, tmp_path):
    folder = tmp_path / "pickled"
    shutil.copytree(folder_of("qwen3guard-gen-0.6b"), folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    guard = load_guard({"preset": "qwen3guard-gen-0.6b", "model": str(folder), "device": "cpu"})
    with pytest.raises(GuardError, match="cannot be loaded"):
        guard.score([[*CONTEXT, {"role": "assistant", "content": "fine"}]])
