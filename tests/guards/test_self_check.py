"""Verdict guards: the self-check that a guard must pass before its scores are used."""

import shutil

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file, save_file
from support.models import tiny_llama
from support.verdict_guards import QUESTION, answer, describe, prompts
from transformers import AutoModelForCausalLM

from star_dss_plugin import GuardError, load_guard, score_dataset
from star_dss_plugin.guards import self_check


def probe_states(folder):
    """Return the last hidden states of both probe texts, and the ids of the label words."""
    guard = load_guard(describe(folder))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    states = []
    for probe in (self_check.SAFE_PROBE, self_check.UNSAFE_PROBE):
        text = probe[-1]["content"]
        ids = torch.tensor(prompts(guard, probe[:-1], text, [len(text)]))
        with torch.no_grad():
            states.append(model.model(ids).last_hidden_state[0, -1])
    return states, [group[0] for group in guard.identity["labels"]]


@pytest.fixture(scope="module")
def honest_dir(tmp_path_factory, tokenizer):
    """Return a guard whose head is set by hand so that it passes the self-check."""
    folder = tmp_path_factory.mktemp("honest")
    model = tiny_llama(len(tokenizer), tie_word_embeddings=False)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (safe, unsafe), (good, bad) = probe_states(folder)
    both, apart = safe + unsafe, safe - unsafe
    with torch.no_grad():
        model.lm_head.weight.zero_()
        model.lm_head.weight[good] = 40 * both / both.norm() ** 2 + 2 * apart / apart.norm()
        model.lm_head.weight[bad] = 40 * both / both.norm() ** 2 - 2 * apart / apart.norm()
    model.save_pretrained(folder)
    return folder


CHECKED = {"self_check": True, "min_label_mass": 0.5}


def test_an_honest_guard_is_trusted(honest_dir):
    guard = load_guard(describe(honest_dir, **CHECKED))
    safe, unsafe = guard.score([list(self_check.SAFE_PROBE), list(self_check.UNSAFE_PROBE)])
    assert safe > unsafe


def test_swapped_labels_are_refused(honest_dir):
    swapped = {"safe_labels": [" bad"], "unsafe_labels": [" good"]}
    guard = load_guard(describe(honest_dir, **CHECKED, **swapped))
    for _ in range(2):  # also when it is asked again
        with pytest.raises(GuardError, match="labels are swapped"):
            guard.score([[*QUESTION, answer("fine")]])


def test_a_guard_that_says_something_else_is_refused(honest_dir):
    others = {"safe_labels": [" fox"], "unsafe_labels": [" dog"]}
    guard = load_guard(describe(honest_dir, **CHECKED, **others))
    for _ in range(2):
        with pytest.raises(GuardError, match="label words a probability of only.* on a probe"):
            guard.score([[*QUESTION, answer("fine")]])


def test_a_guard_that_cannot_tell_the_probes_apart_is_refused(honest_dir, tmp_path):
    folder = tmp_path / "constant"
    shutil.copytree(honest_dir, folder)
    weights = load_file(folder / "model.safetensors")
    weights["lm_head.weight"].zero_()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    guard = load_guard(describe(folder, self_check=True, min_label_mass=0.0))
    with pytest.raises(GuardError, match="at least as safe"):
        guard.score([[*QUESTION, answer("fine")]])


def test_a_check_that_is_off_is_logged(tiny, caplog):
    tiny.close()
    tiny.score([[*QUESTION, answer("fine")]])
    assert "self_check is off" in caplog.text


def broken(honest_dir, folder):
    shutil.copytree(honest_dir, folder)
    weights = load_file(folder / "model.safetensors")
    weights["lm_head.weight"].fill_(float("nan"))
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_nan_scores_are_refused(honest_dir, tmp_path):
    with pytest.raises(GuardError, match="not numbers"):
        load_guard(describe(broken(honest_dir, tmp_path / "broken"))).score(
            [[*QUESTION, answer("fine")]]
        )


def test_an_error_on_a_probe_names_no_response(honest_dir, tmp_path, tokenizer):
    """Otherwise each response in turn would be blamed for the error and count as unsafe."""
    guard = load_guard(describe(broken(honest_dir, tmp_path / "broken"), **CHECKED))
    with pytest.raises(GuardError, match="On a probe: .*not numbers") as caught:
        guard.score([[*QUESTION, answer("fine")]])
    assert caught.value.request is None
    data = Dataset.from_list([{"messages": [*QUESTION, answer("fine")]}])
    with pytest.raises(GuardError, match="On a probe"):
        score_dataset(data, tokenizer, guard=guard, on_guard_error="unsafe", progress=False)


def test_a_guard_whose_check_was_cut_short_is_checked_again(honest_dir, monkeypatch):
    guard = load_guard(describe(honest_dir, **CHECKED))

    def interrupted(guard):
        raise KeyboardInterrupt

    monkeypatch.setattr(self_check, "check_probes", interrupted)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            guard.score([[*QUESTION, answer("fine")]])


def test_scores_of_an_unchecked_guard_are_not_used_for_a_checked_one(
    honest_dir, tokenizer, tmp_path
):
    swapped = {"safe_labels": [" bad"], "unsafe_labels": [" good"], "min_label_mass": 0.0}
    data = Dataset.from_list([{"messages": [*QUESTION, answer("fine")]}])
    options = {"progress": False, "score_cache_dir": tmp_path}
    score_dataset(data, tokenizer, guard=describe(honest_dir, **swapped), **options)
    checked = describe(honest_dir, **swapped, self_check=True)
    with pytest.raises(GuardError, match="labels are swapped"):
        score_dataset(data, tokenizer, guard=checked, **options)
