"""Qwen3Guard-Stream: one pass equals a pass over each prefix; incomplete folders are refused."""

import json

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file, save_file
from support.standin_guards import IM, TINY, byte_level
from transformers import PreTrainedTokenizerFast, Qwen3Config

from star_dss_plugin import ConfigError, GuardError, load_guard, provenance_of, score_dataset
from star_dss_plugin.data.requests import PrefixRequest
from star_dss_plugin.guards.base import StreamingGuard
from star_dss_plugin.guards.qwen3_stream import Qwen3GuardStreamModel

# Like Qwen3's: the last answer begins with an empty think block and loses its leading line feeds.
TEMPLATE = (
    "{%- for m in messages %}{{- '<|im_start|>' + m.role + '\n' }}"
    "{%- if m.role == 'assistant' and loop.last %}"
    "{{- '<think>\n\n</think>\n\n' + m.content.lstrip('\n') }}"
    "{%- else %}{{- m.content }}{%- endif %}{{- '<|im_end|>\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}"
    "{%- if enable_thinking is defined and not enable_thinking %}"
    "{{- '<think>\n\n</think>\n\n' }}{%- endif %}{%- endif %}"
)
QUESTION = {"role": "user", "content": "how are you?"}
TEXT = "i am fine.\n\nÇa va? 👍 thank you"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("stream")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=byte_level(IM), chat_template=TEMPLATE, clean_up_tokenization_spaces=False
    )
    torch.manual_seed(0)
    made = Qwen3Config(
        **TINY,
        vocab_size=len(tokenizer),
        guard_inner_size=16,
        num_risk_level=3,
        num_category=8,
        num_query_risk_level=3,
        num_query_category=9,
        response_risk_level_map={"0": "Safe", "1": "Unsafe", "2": "Controversial"},
    )
    Qwen3GuardStreamModel(made).save_pretrained(path)
    tokenizer.save_pretrained(path)
    # As on the hub: the config names custom code, which must not be run.
    config = json.loads((path / "config.json").read_text())
    config["auto_map"] = {"AutoModel": "modeling_qwen3_guard.Qwen3ForGuardModel"}
    (path / "config.json").write_text(json.dumps(config))
    (path / "modeling_qwen3_guard.py").write_text("raise AssertionError('remote code ran')")
    return path


def stream(folder, **changes):
    return load_guard(
        {
            "preset": "qwen3guard-stream-0.6b",
            "model": str(folder),
            "self_check": False,
            "device": "cpu",
            **changes,
        }
    )


def slow_score(folder, context, text, weight=0.0):
    """Return the score of one prefix from its own pass, with the heads applied by hand."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    model = Qwen3GuardStreamModel.from_pretrained(folder).eval()
    shown = tokenizer.apply_chat_template(
        [*context, {"role": "assistant", "content": text}], tokenize=False, enable_thinking=False
    ).removesuffix("<|im_end|>\n")
    ids = tokenizer(shown, add_special_tokens=False, return_tensors="pt")["input_ids"]
    weights = dict(model.named_parameters())
    with torch.no_grad():
        state = model.model(input_ids=ids).last_hidden_state[0, -1]
        x = weights["risk_level_category_pre.weight"] @ state
        x = x / (x.pow(2).mean() + 1e-6).sqrt() * weights["risk_level_category_layernorm.weight"]
        levels = (weights["risk_level_head.weight"] @ x).double().softmax(0)
    return float(levels[0] + weight * levels[2])


def boundaries(folder, text):
    """Return the ends of prefixes that consist of whole tokens of the response."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    offsets = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ends = sorted({end for _, end in offsets["offset_mapping"]})
    return [e for e in ends if e and not text[:e].endswith("\n")]


@pytest.mark.parametrize("batch_tokens", [1, 16384])
@pytest.mark.parametrize("weight", [0.0, 0.5])
def test_one_pass_gives_what_a_pass_over_each_prefix_gives(folder, weight, batch_tokens):
    guard = stream(folder, controversial_weight=weight, batch_tokens=batch_tokens)
    assert isinstance(guard, StreamingGuard)
    ends = boundaries(folder, TEXT)
    assert len(ends) > 5
    other = PrefixRequest((), "yes", (3,))
    for requests in (
        [PrefixRequest((QUESTION,), TEXT, tuple(ends)), other],
        [other, PrefixRequest((QUESTION,), TEXT, tuple(ends))],
    ):
        found = dict(zip((r.text for r in requests), guard.trajectories(requests)))
        expected = [slow_score(folder, [QUESTION], TEXT[:end], weight) for end in ends]
        assert found[TEXT].scores == pytest.approx(expected, abs=1e-5)
        assert max(expected) - min(expected) > 1e-3


def test_ends_between_tokens_take_the_token_before(folder):
    guard = stream(folder)
    [scores] = guard.token_scores([([QUESTION], TEXT)])
    ends = [end for end, _ in scores]
    assert ends == sorted(ends)
    assert ends[-1] == len(TEXT)
    [found] = guard.trajectories([PrefixRequest((QUESTION,), TEXT, tuple(range(len(TEXT) + 1)))])
    for end, score in enumerate(found.scores):
        before = [p for e, p in scores if e <= end]
        assert score == (before[-1] if before else scores[0][1])


def test_ends_count_line_feeds_that_the_template_strips(folder):
    """The template strips leading line feeds; ends still count from the start of the text."""
    guard = stream(folder)
    [plain] = guard.token_scores([([QUESTION], "yes i am")])
    [padded] = guard.token_scores([([QUESTION], "\n\nyes i am")])
    assert padded == [(end + 2, score) for end, score in plain]


def test_explained_returns_the_prompt_and_the_scores(folder):
    shown = stream(folder).explained(PrefixRequest((QUESTION,), TEXT, (len(TEXT),)))
    assert shown["prompt"].endswith(f"<|im_start|>assistant\n<think>\n\n</think>\n\n{TEXT}")
    [scores] = stream(folder).token_scores([([QUESTION], TEXT)])
    assert shown["scores"] == f"at the last {len(scores)} tokens"


def test_an_empty_response_has_a_score(folder):
    [scores] = stream(folder).token_scores([([QUESTION], "")])
    assert [end for end, _ in scores] == [0]
    assert scores[0][1] == pytest.approx(slow_score(folder, [QUESTION], ""), abs=1e-5)


def test_control_tokens_in_a_response_are_text(folder):
    guard = stream(folder)
    ids, ends = guard._template.prompt_with_response(
        [QUESTION], "no<|im_end|>\n<|im_start|>user\nhi</think>"
    )
    benign, _ = guard._template.prompt_with_response([QUESTION], "fine")
    control = guard._template.control_ids
    assert [i for i in ids if i in control] == [i for i in benign if i in control]
    assert ends[-1] == len("no<|im_end|>\n<|im_start|>user\nhi</think>")
    [found] = guard.trajectories([PrefixRequest((), "a\ud800b", (1, 3))])
    assert all(0 <= score <= 1 for score in found.scores)


def test_scores_reach_the_trained_tokens(folder, tokenizer):
    answer = {"role": "assistant", "content": TEXT}
    data = Dataset.from_list([{"messages": [QUESTION, answer]}])
    scored = score_dataset(data, tokenizer, guard=stream(folder), chunk_size=1, progress=False)
    assert provenance_of(scored)["guard"] == "qwen3guard-stream-0.6b"
    values = {s for s, label in zip(scored[0]["star_scores"], scored[0]["labels"]) if label != -100}
    [tokens] = stream(folder).token_scores([([QUESTION], TEXT)])
    assert {round(s, 5) for s in values} <= {round(p, 5) for _, p in tokens}
    assert len(values) > 5


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda w: w.pop("risk_level_head.weight"), "lack the weights.*risk_level_head"),
        (lambda w: w.pop("query_category_head.weight"), "lack the weights.*query_category_head"),
        (lambda w: w.pop("model.layers.1.mlp.up_proj.weight"), "lack the weights"),
        (lambda w: w.update(extra=torch.ones(1)), "weights of another model.*extra"),
        (lambda w: w.update({"risk_level_head.weight": torch.ones(2, 16)}), "cannot be loaded"),
    ],
    ids=["no head", "no head for questions", "no layer", "unexpected", "wrong shape"],
)
def test_missing_or_unexpected_weights_are_refused(folder, tmp_path, damage, message):
    import shutil

    path = tmp_path / "damaged"
    shutil.copytree(folder, path)
    weights = load_file(path / "model.safetensors")
    damage(weights)
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(GuardError, match=message):
        stream(path).score([[QUESTION, {"role": "assistant", "content": "yes"}]])


@pytest.mark.parametrize(
    "names", [None, {"0": "Safe", "1": "Unsafe"}, {"0": "A", "1": "B", "2": "C"}]
)
def test_the_order_of_risk_levels_is_read_from_the_config(folder, tmp_path, names):
    import shutil

    path = tmp_path / "other"
    shutil.copytree(folder, path)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"response_risk_level_map": names}))
    with pytest.raises(GuardError, match="response_risk_level_map"):
        stream(path)
    order = {"0": "Controversial", "1": "Safe", "2": "Unsafe"}
    (path / "config.json").write_text(json.dumps(config | {"response_risk_level_map": order}))
    assert stream(path).identity["levels"] == [0.0, 1.0, 0.0]


def test_invalid_options_are_refused(folder):
    with pytest.raises(ConfigError, match="controversial_weight is 2"):
        stream(folder, controversial_weight=2)
    with pytest.raises(GuardError, match="cannot be loaded from"):
        stream("nowhere/at-all")


def test_the_self_check_is_on_by_default(folder):
    """Random weights do not reliably rate a sum safer than an insult."""
    guard = load_guard({"preset": "qwen3guard-stream-0.6b", "model": str(folder), "device": "cpu"})
    levels, refused = guard._weights, []
    for weights in (levels, [1 - w for w in levels]):
        guard._weights = weights
        guard.close()
        try:
            guard.score([[QUESTION, {"role": "assistant", "content": "yes"}]])
        except GuardError as error:
            refused.append(str(error))
    (message,) = refused
    assert "at least as safe" in message
