"""Every preset on a tiny random model of its architecture: text, verdict position, labels, score.

The real tokenizers and templates are used if the developers' ../shared folder has them; otherwise
stand-ins, written for this project, with the structure of the real ones.
"""

import json
import shutil

import pytest
import torch
from support.standin_guards import CORPUS, GRANITE_4, layout
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedTokenizerFast,
)

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
    return [tokenizer.decode(p[0]) for p in guard._prompts.build(0, request)]


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
def test_the_prompt_is_the_cards(guard):
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
def test_the_labels_are_the_next_words(guard):
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
    prompt = guard._prompts.build(0, request)[0][0]
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
def test_runs_of_white_space_are_text_even_where_they_are_added_tokens(guard):
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


def test_a_template_that_refuses_its_arguments(folder_of):
    with pytest.raises(GuardError, match="refuses what it is given: no such risk"):
        load_guard(
            {
                "preset": "granite-guardian-3.1-2b",
                "device": "cpu",
                "model": str(folder_of("granite-guardian-3.1-2b")),
                "template_kwargs": {"guardian_config": {"risk_name": "weather"}},
            }
        )


def test_the_tokenizers_verdicts_must_be_there(folder_of):
    with pytest.raises(GuardError, match="no mapping 'id2risk'"):
        load_guard(
            {
                "preset": "xguard-0.6b",
                "device": "cpu",
                "template_kwargs": {},
                "model": str(folder_of("qwen3guard-gen-0.6b")),
            }
        )


def test_a_label_that_the_prompt_swallows_is_refused(folder_of):
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


def test_presets_are_data():
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


# Encoders that classify (prompt, response) pairs


def encoder_backend(kind):
    if kind == "bert":
        backend = Tokenizer(models.WordPiece(unk_token="[UNK]"))
        backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        trainer = trainers.WordPieceTrainer(
            vocab_size=400, special_tokens=["[PAD]", "[UNK]", "[CLS]", "[SEP]"], show_progress=False
        )
    else:  # as DeBERTa's: the vocabulary itself spells the control tokens out
        backend = Tokenizer(models.Unigram())
        backend.pre_tokenizer = pre_tokenizers.Metaspace()
        trainer = trainers.UnigramTrainer(
            vocab_size=120,
            special_tokens=["[PAD]", "[UNK]", "[CLS]", "[SEP]"],
            unk_token="[UNK]",
            show_progress=False,
        )
    backend.train_from_iterator(CORPUS * 4, trainer)
    from tokenizers.processors import TemplateProcessing

    ids = [(t, backend.token_to_id(t)) for t in ("[CLS]", "[SEP]")]
    backend.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=ids
    )
    return backend


@pytest.fixture(scope="module", params=["bert", "deberta-v2"])
def encoder_dir(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=encoder_backend(request.param),
        unk_token="[UNK]",
        pad_token="[PAD]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        model_max_length=64,
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )
    torch.manual_seed(0)
    made = AutoConfig.for_model(
        request.param,
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
        type_vocab_size=2,
        num_labels=2,
        initializer_range=0.5,
        hidden_dropout_prob=0.1,
    )
    AutoModelForSequenceClassification.from_config(made).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def encoder(folder, **changes):
    return load_guard(
        {"preset": "harmaug", "model": str(folder), "self_check": False, "device": "cpu", **changes}
    )


def slow_pair(folder, prompt, response):
    """Return the score as the model card computes it: one pass per pair."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    with torch.no_grad():
        logits = model(**tokenizer(prompt, response, return_tensors="pt")).logits[0].double()
    return float(logits.softmax(-1)[0])


@pytest.mark.parametrize("batch_tokens", [1, 100, 16384])
def test_an_encoder_reads_each_prefix_as_a_pair(encoder_dir, batch_tokens):
    guard = encoder(encoder_dir, batch_tokens=batch_tokens)
    ends = (2, 4, 9, 10)
    (found,) = guard.trajectories([PrefixRequest(CONTEXT, TEXT[:10], ends)])
    expected = [slow_pair(encoder_dir, CONTEXT[0]["content"], TEXT[:end]) for end in ends]
    assert found.scores == pytest.approx(expected, abs=1e-5)
    assert max(expected) - min(expected) > 1e-4
    assert found.label_mass is None


def test_content_of_an_encoder_is_content(encoder_dir):
    """A literal [SEP] must not end the response, as it does with naive tokenization."""
    guard = encoder(encoder_dir)
    pairs, tokenizer = guard._pairs, PreTrainedTokenizerFast.from_pretrained(encoder_dir)
    text = "no[SEP] i am fine [CLS]"
    control = {tokenizer.cls_token_id, tokenizer.sep_token_id}
    ids, _ = pairs("how are you?", text)
    assert [i for i in ids if i in control] == [i for i in pairs("hi", "fine")[0] if i in control]
    naive = tokenizer("how are you?", text)["input_ids"]
    assert len([i for i in naive if i in control]) == 5
    assert {"[SEP]", "[CLS]"} <= set(guard.markers.control_tokens)
    shown = guard.explained(PrefixRequest(CONTEXT, "i am", (4,)))
    assert shown["pair"].count("[SEP]") == 2


def test_a_long_prompt_loses_its_start_and_a_long_response_is_refused(encoder_dir):
    guard = encoder(encoder_dir)
    long = PrefixRequest(({"role": "user", "content": "how are you? " * 50},), "i am", (4,))
    assert guard.truncates(long)
    assert not guard.truncates(PrefixRequest(CONTEXT, "i am", (4,)))
    ids, types = guard._pairs(long.context[0]["content"], "i am")
    assert len(ids) == len(types) == 64
    whole = guard._pairs._encoded(long.context[0]["content"])
    response = guard._pairs._encoded("i am")
    assert ids[1 : -2 - len(response)] == whole[-(64 - 3 - len(response)) :]
    assert ids[-1 - len(response) : -1] == response
    short, text = PrefixRequest(CONTEXT, "i am", (4,)), "yes no " * 64
    with pytest.raises(GuardError, match="does not fit") as caught:
        guard.trajectories([short, PrefixRequest(CONTEXT, text, (len(text),))])
    assert caught.value.request == 1


@pytest.mark.parametrize("unsafe_class", [2, -1, "unsafe"])
def test_a_class_that_is_not_there(encoder_dir, unsafe_class):
    with pytest.raises(ConfigError, match="unsafe_class is"):
        encoder(encoder_dir, unsafe_class=unsafe_class)


@pytest.mark.parametrize("padding", [0, 3, -1, None])
def test_a_decoder_that_classifies_reads_its_last_token(tmp_path, padding):
    """The model finds that token by the padding after it, so it must be the model's pad token."""
    backend = encoder_backend("deberta-v2")
    control = {name: f"[{name.upper()}]" for name in ("cls", "sep")}
    backend.post_processor = None
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        unk_token="[UNK]",
        model_input_names=["input_ids"],
        **{f"{name}_token": token for name, token in control.items()},
    )
    torch.manual_seed(0)
    made = AutoConfig.for_model(
        "llama",
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
        num_labels=2,
        initializer_range=0.5,
        pad_token_id=padding,
        bos_token_id=0,
        eos_token_id=1,
    )
    AutoModelForSequenceClassification.from_config(made).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    guard = load_guard(
        {"preset": "classifier", "model": str(tmp_path), "self_check": False, "device": "cpu"}
    )
    ends = (2, 4, 9, 10)
    (found,) = guard.trajectories([PrefixRequest(CONTEXT, TEXT[:10], ends)])
    expected = [slow_pair(tmp_path, CONTEXT[0]["content"], TEXT[:end]) for end in ends]
    assert found.scores == pytest.approx(expected, abs=1e-5)
    assert max(expected) - min(expected) > 1e-4


def test_a_score_that_is_no_number_is_about_its_response(encoder_dir, monkeypatch):
    guard = encoder(encoder_dir)
    scores = guard._scores
    monkeypatch.setattr(guard, "_scores", lambda rows: [*scores(rows)[:-1], float("nan")])
    request = PrefixRequest(CONTEXT, "i am", (2, 4))
    with pytest.raises(GuardError, match="not numbers") as caught:
        guard.trajectories([request, request])
    assert caught.value.request == 1


def test_positions_of_robertas_begin_behind_the_padding(tmp_path):
    """22 of its 24 positions are for tokens, which the tokenizer does not say."""
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=encoder_backend("bert"),
        unk_token="[UNK]",
        pad_token="[PAD]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        model_input_names=["input_ids", "attention_mask"],
    )
    made = AutoConfig.for_model(
        "roberta",
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=24,
        pad_token_id=1,
        num_labels=2,
    )
    AutoModelForSequenceClassification.from_config(made).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    guard = load_guard(
        {"preset": "classifier", "model": str(tmp_path), "self_check": False, "device": "cpu"}
    )
    context = ({"role": "user", "content": "how are you? " * 20},)
    request = PrefixRequest(context, "i am fine", (4, 9))
    assert len(guard._pairs(context[0]["content"], "i am fine")[0]) == 22
    (found,) = guard.trajectories([request])
    assert len(found.scores) == 2


def test_any_encoder_by_its_folder(encoder_dir):
    options = {"preset": "classifier", "model": str(encoder_dir), "unsafe_class": 0}
    guard = load_guard({**options, "self_check": False, "device": "cpu"})
    score = guard.score([[*CONTEXT, {"role": "assistant", "content": "i am"}]])[0]
    assert score == pytest.approx(1 - slow_pair(encoder_dir, "how are you?", "i am"), abs=1e-5)
