"""Classifier guards: encoders of (prompt, response) pairs, and decoders that classify."""

import pytest
import torch
from support.standin_guards import CORPUS
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from tokenizers.processors import TemplateProcessing
from transformers import AutoConfig, AutoModelForSequenceClassification, PreTrainedTokenizerFast

from star_dss_plugin import ConfigError, GuardError, load_guard
from star_dss_plugin.data.requests import PrefixRequest

CONTEXT = ({"role": "user", "content": "how are you?"},)
TEXT = "i am fine."


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


def load_encoder(folder, **changes):
    return load_guard(
        {"preset": "harmaug", "model": str(folder), "self_check": False, "device": "cpu", **changes}
    )


def slow_pair_score(folder, prompt, response):
    """Return the score as the model card computes it: one pass per pair."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    with torch.no_grad():
        logits = model(**tokenizer(prompt, response, return_tensors="pt")).logits[0].double()
    return float(logits.softmax(-1)[0])


@pytest.mark.parametrize("batch_tokens", [1, 100, 16384])
def test_an_encoder_reads_each_prefix_as_a_pair(encoder_dir, batch_tokens):
    guard = load_encoder(encoder_dir, batch_tokens=batch_tokens)
    ends = (2, 4, 9, 10)
    (found,) = guard.trajectories([PrefixRequest(CONTEXT, TEXT, ends)])
    expected = [slow_pair_score(encoder_dir, CONTEXT[0]["content"], TEXT[:end]) for end in ends]
    assert found.scores == pytest.approx(expected, abs=1e-5)
    assert max(expected) - min(expected) > 1e-4
    assert found.label_mass is None


def test_control_tokens_in_a_response_are_text(encoder_dir):
    """A literal [SEP] must not end the response, as it does with naive tokenization."""
    guard = load_encoder(encoder_dir)
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
    guard = load_encoder(encoder_dir)
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
def test_an_unknown_unsafe_class_is_refused(encoder_dir, unsafe_class):
    with pytest.raises(ConfigError, match="unsafe_class is"):
        load_encoder(encoder_dir, unsafe_class=unsafe_class)


@pytest.mark.parametrize("padding", [0, 3, -1, None])
def test_a_decoder_that_classifies_reads_its_last_token(tmp_path, padding):
    """The model finds that token by the padding behind it, which must be the model's pad token."""
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
    (found,) = guard.trajectories([PrefixRequest(CONTEXT, TEXT, ends)])
    expected = [slow_pair_score(tmp_path, CONTEXT[0]["content"], TEXT[:end]) for end in ends]
    assert found.scores == pytest.approx(expected, abs=1e-5)
    assert max(expected) - min(expected) > 1e-4


def test_an_error_about_nan_scores_names_the_response(encoder_dir, monkeypatch):
    guard = load_encoder(encoder_dir)
    scores = guard._scores
    monkeypatch.setattr(guard, "_scores", lambda rows: [*scores(rows)[:-1], float("nan")])
    request = PrefixRequest(CONTEXT, "i am", (2, 4))
    with pytest.raises(GuardError, match="not numbers") as caught:
        guard.trajectories([request, request])
    assert caught.value.request == 1


def test_roberta_positions_begin_after_the_padding_index(tmp_path):
    """Only 22 of its 24 positions are for tokens, and the tokenizer does not know this limit."""
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


def test_an_encoder_without_a_preset_is_loaded_from_its_folder(encoder_dir):
    options = {"preset": "classifier", "model": str(encoder_dir), "unsafe_class": 0}
    guard = load_guard({**options, "self_check": False, "device": "cpu"})
    score = guard.score([[*CONTEXT, {"role": "assistant", "content": "i am"}]])[0]
    assert score == pytest.approx(
        1 - slow_pair_score(encoder_dir, "how are you?", "i am"), abs=1e-5
    )
