"""Guards in a process where a host patches transformers before or after the guard is loaded."""

import threading

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.models import make_tokenizer, tiny_llama
from support.standin_guards import TINY
from support.verdict_guards import QUESTION, TEXT, describe
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, Qwen3Config
from transformers.models.llama import modeling_llama
from transformers.models.qwen3 import modeling_qwen3

from star_dss_plugin import ConfigError, load_guard
from star_dss_plugin.data.requests import PrefixRequest
from star_dss_plugin.guards.qwen3_stream import Qwen3GuardStreamModel
from star_dss_plugin.models.loading import load_weights, read_model
from star_dss_plugin.training.reference.choice import _load_named
from star_dss_plugin.unpatched import unpatched

REQUEST = PrefixRequest(tuple(QUESTION), TEXT, (4, 9, len(TEXT)))
CPU = {"device": torch.device("cpu"), "dtype": torch.float32}


class WithoutBiases(nn.Module):
    """An MLP without biases, as Liger's, which ignores a checkpoint's biases."""

    def __init__(self, config):
        super().__init__()
        sizes = config.hidden_size, config.intermediate_size
        self.gate_proj = nn.Linear(*sizes, bias=False)
        self.up_proj = nn.Linear(*sizes, bias=False)
        self.down_proj = nn.Linear(*reversed(sizes), bias=False)

    def forward(self, x):
        return self.down_proj(nn.functional.silu(self.gate_proj(x)) * self.up_proj(x))


def fail_without_gpu(*_, **__):
    raise ValueError("Pointer argument (at 0) cannot be accessed from Triton (cpu tensor?)")


def patch(monkeypatch, module, prefix):
    """Replace what Liger and Axolotl replace, for the whole process."""
    monkeypatch.setattr(module, "apply_rotary_pos_emb", fail_without_gpu)
    monkeypatch.setattr(module, f"{prefix}MLP", WithoutBiases)
    monkeypatch.setattr(getattr(module, f"{prefix}Attention"), "forward", fail_without_gpu)


@pytest.fixture
def folder(tmp_path):
    tokenizer = make_tokenizer()
    model = tiny_llama(len(tokenizer), mlp_bias=True)
    for name, weight in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(weight)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.parametrize("late", [False, True])
def test_a_verdict_guard_gives_the_same_scores(folder, monkeypatch, late):
    (expected,) = load_guard(describe(folder)).trajectories([REQUEST])
    guard = load_guard(describe(folder))
    if late:  # as with a stream, whose guard is loaded before the host's patches
        guard.trajectories([REQUEST])
    patch(monkeypatch, modeling_llama, "Llama")
    (found,) = guard.trajectories([REQUEST])
    assert found.scores == expected.scores


@pytest.mark.parametrize("late", [False, True])
def test_ligers_kernels_do_not_compute_a_guard(folder, monkeypatch, late):
    """They raise an error on a CPU."""
    pytest.importorskip("liger_kernel")
    from liger_kernel.transformers import apply_liger_kernel_to_llama

    (expected,) = load_guard(describe(folder)).trajectories([REQUEST])
    guard = load_guard(describe(folder))
    if late:
        guard.trajectories([REQUEST])
    for name in ("apply_rotary_pos_emb", "LlamaRMSNorm", "LlamaMLP"):
        monkeypatch.setattr(modeling_llama, name, getattr(modeling_llama, name))
    apply_liger_kernel_to_llama(fused_linear_cross_entropy=False)
    assert modeling_llama.LlamaMLP.__name__ == "LigerSwiGLUMLP"
    (found,) = guard.trajectories([REQUEST])
    assert found.scores == expected.scores


@pytest.mark.parametrize("late", [False, True])
def test_a_classifier_gives_the_same_logits(folder, monkeypatch, late):
    made = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    made.save_pretrained(folder)
    ids = torch.arange(4, 16)[None]
    expected = made(ids).logits

    def load():
        return load_weights(AutoModelForSequenceClassification, "test", str(folder), **CPU)

    model = load() if late else None
    patch(monkeypatch, modeling_llama, "Llama")
    assert torch.equal((model or load())(ids).logits, expected)


def test_a_streaming_guard_gives_the_same_logits(monkeypatch):
    config = Qwen3Config(**TINY, vocab_size=40, guard_inner_size=16)
    for name in ("risk_level", "category", "query_risk_level", "query_category"):
        setattr(config, f"num_{name}", 3)
    model = Qwen3GuardStreamModel(config).eval()
    expected = model(torch.arange(6)[None])
    patch(monkeypatch, modeling_qwen3, "Qwen3")
    assert torch.equal(model(torch.arange(6)[None]), expected)
    again = Qwen3GuardStreamModel(config).eval()
    again.load_state_dict(model.state_dict())
    assert torch.equal(again(torch.arange(6)[None]), expected)


def test_the_trained_model_keeps_its_own_classes(folder):
    guard = load_weights(AutoModelForCausalLM, "test", str(folder), **CPU)
    trained = AutoModelForCausalLM.from_pretrained(folder)
    assert type(trained) is modeling_llama.LlamaForCausalLM
    assert type(guard) is not type(trained)
    assert type(guard).__name__ == type(trained).__name__
    # transformers has a table of recordable outputs by class; each model finds its own entry.
    for model in (guard, trained):
        states = model(torch.arange(5)[None], output_hidden_states=True).hidden_states
        assert len(states) == model.config.num_hidden_layers + 1


def test_blocks_within_blocks_and_errors_leave_the_usual_classes(folder):
    usual = AutoModelForCausalLM._model_mapping
    one, two = unpatched(), unpatched()
    one.__enter__()
    two.__enter__()
    first = AutoModelForCausalLM.from_pretrained(folder)
    one.__exit__(None, None, None)
    two.__exit__(None, None, None)
    assert AutoModelForCausalLM._model_mapping is usual
    with pytest.raises(RuntimeError), unpatched():
        raise RuntimeError
    assert AutoModelForCausalLM._model_mapping is usual
    with unpatched():
        second = AutoModelForCausalLM.from_pretrained(folder)
    assert type(first) is type(second) is not modeling_llama.LlamaForCausalLM


def test_blocks_of_two_threads_wait_for_each_other(folder):
    usual, inside = AutoModelForCausalLM._model_mapping, threading.Event()

    def other():
        with unpatched():
            inside.set()

    thread = threading.Thread(target=other)
    with unpatched():
        thread.start()
        assert not inside.wait(0.2)
    thread.join()
    assert inside.is_set()
    assert AutoModelForCausalLM._model_mapping is usual


def test_a_named_reference_that_lost_weights_to_a_patch_is_refused(folder, monkeypatch):
    policy = AutoModelForCausalLM.from_pretrained(folder)
    _load_named(str(folder), policy, make_tokenizer())
    patch(monkeypatch, modeling_llama, "Llama")
    with pytest.raises(
        ConfigError, match=r"mlp\.\w+_proj\.bias, which transformers' own class has"
    ):
        _load_named(str(folder), policy, make_tokenizer())


@pytest.mark.parametrize(
    "more",
    [
        "v_head.weight",  # beside the language model
        "lm_head.bias",  # some converters write biases that the class does not have
        "model.layers.0.self_attn.q_proj.bias",
        "model.layers.0.self_attn.rotary_emb.inv_freq",
    ],
)
def test_weights_that_transformers_own_class_lacks_are_left_aside(folder, more):
    file = folder / "model.safetensors"
    save_file({**load_file(file), more: torch.ones(32)}, file, metadata={"format": "pt"})
    read_model(AutoModelForCausalLM, str(folder), dtype=torch.float32)
