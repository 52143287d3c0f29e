"""Verdict guards: loading, damaged folders, and the identity that keys cached scores."""

import copy
import gc
import json
import shutil
import weakref

import pytest
from safetensors.torch import load_file, save_file
from support.models import tiny_llama
from support.verdict_guards import JUDGE, QUESTION, TEXT, answer, describe
from transformers import AutoModelForCausalLM

from star_dss_plugin import GuardError, load_guard
from star_dss_plugin.guards import verdict
from star_dss_plugin.guards.verdict import VerdictGuard


@pytest.mark.parametrize("where", ["nowhere", "not an id!", "../up", ""])
def test_a_missing_model_cannot_be_loaded(tmp_path, where):
    with pytest.raises(GuardError, match="cannot be loaded"):
        load_guard(describe(tmp_path / where))


def without(name):
    return lambda folder: (folder / name).unlink()


def cut(name, size):
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:size])


def without_a_layer(folder):
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.down_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    "damage",
    [
        without("config.json"),
        without("tokenizer.json"),
        without("model.safetensors"),
        cut("config.json", 20),
        cut("tokenizer.json", 99),
        cut("model.safetensors", 9999),
        without_a_layer,
    ],
    ids=[
        "no config",
        "no tokenizer",
        "no weights",
        "half a config",
        "half a tokenizer",
        "half the weights",
        "a weight missing",
    ],
)
def test_damaged_folders_are_refused(model_dir, tmp_path, damage):
    folder = tmp_path / "damaged"
    shutil.copytree(model_dir, folder)
    damage(folder)
    with pytest.raises(GuardError, match="cannot be loaded from"):
        load_guard(describe(folder)).score([[*QUESTION, answer("fine")]])


def test_nothing_is_loaded_before_it_is_needed_and_close_frees_it(model_dir, monkeypatch):
    loaded = []
    original = AutoModelForCausalLM.from_pretrained

    def counting(*args, **kwargs):
        found = original(*args, **kwargs)
        loaded.append(weakref.ref(found[0] if isinstance(found, tuple) else found))
        return found

    monkeypatch.setattr(verdict.AutoModelForCausalLM, "from_pretrained", counting)
    guard = load_guard(describe(model_dir))
    identity = guard.identity
    guard.close()
    assert loaded == []
    conversation = [[*QUESTION, answer(TEXT)]]
    first = guard.score(conversation)
    assert len(loaded) == 1
    assert guard.score(conversation) == first
    assert len(loaded) == 1
    guard.close()
    gc.collect()
    assert loaded[0]() is None
    assert guard.score(conversation) == first
    assert len(loaded) == 2
    assert guard.identity == identity


# The identity has everything that changes a score, and nothing else


def changed(name, change):
    def apply(folder):
        weights = load_file(folder / "model.safetensors")
        change(weights[name])
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})

    return apply


@pytest.fixture(scope="module")
def big_dir(tmp_path_factory, tokenizer):
    """Return the folder of a guard so large (over 2 MiB) that not all of its weights are hashed."""
    folder = tmp_path_factory.mktemp("big")
    model = tiny_llama(len(tokenizer), hidden_size=256, intermediate_size=512, num_hidden_layers=8)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    assert (folder / "model.safetensors").stat().st_size > 4 << 21
    return folder


@pytest.mark.parametrize("layer", [0, 3, 7])
def test_a_finetuned_layer_is_another_guard(big_dir, tmp_path, layer):
    """The files have the same names, sizes, and first and last megabytes."""
    folder = tmp_path / "finetuned"
    shutil.copytree(big_dir, folder)
    assert (
        VerdictGuard(**describe(folder)).identity["weights"]
        == (VerdictGuard(**describe(big_dir)).identity["weights"])
    )
    changed(f"model.layers.{layer}.self_attn.q_proj.weight", lambda w: w.mul_(1.001))(folder)
    assert (
        VerdictGuard(**describe(folder)).identity["weights"]
        != (VerdictGuard(**describe(big_dir)).identity["weights"])
    )


def test_one_letter_of_a_large_vocabulary_file_changes_the_identity(model_dir, tmp_path):
    folder = tmp_path / "edited"
    shutil.copytree(model_dir, folder)
    found = []
    for letter in "ab":
        (folder / "vocab.txt").write_text("n" * 4_000_000 + letter + "n" * 4_000_000)
        found.append(load_guard(describe(folder)).identity["weights"])
    assert found[0] != found[1]


def test_code_in_the_models_folder_changes_the_identity(model_dir, tmp_path):
    folder = tmp_path / "coded"
    shutil.copytree(model_dir, folder)
    found = []
    for code in ("x = 1\n", "x = 2\n"):
        (folder / "modeling_it.py").write_text(code)
        found.append(load_guard(describe(folder)).identity["weights"])
    assert found[0] != found[1]


@pytest.mark.parametrize(
    "changes",
    [
        {"prefill": "is it bad:"},
        {"safe_labels": [" fox"]},
        {"question": "is it?"},
        {"turns": "last"},
        {"controversial_labels": [" fox"]},
        {"chat_template": JUDGE + " "},
        {"dtype": "bfloat16"},
        {"self_check": True},
    ],
    ids=str,
)
def test_options_that_change_scores_change_the_identity(model_dir, changes):
    base = load_guard(describe(model_dir)).identity
    other = load_guard(describe(model_dir, **changes)).identity
    assert other != base
    json.dumps(other)


@pytest.mark.parametrize("changes", [{"batch_tokens": 1}, {"name": "x"}, {"min_label_mass": 0.9}])
def test_other_options_do_not_change_the_identity(model_dir, changes):
    assert load_guard(describe(model_dir, **changes)).identity == (
        load_guard(describe(model_dir)).identity
    )


def test_identity_is_a_copy(tiny):
    before = copy.deepcopy(tiny.identity)
    tiny.identity["model"] = "another"
    assert tiny.identity == before
