"""Models to evaluate: adapters and their bases, and weights that are refused."""

import json

import pytest
import torch
from support.comparisons import prompts
from support.landscape import PLACE

from star_dss_plugin import ConfigError
from star_dss_plugin.evaluate.generation import prompt_ids
from star_dss_plugin.evaluate.models import load_whole_model
from star_dss_plugin.evaluate.moved_weights import MovedWeights
from star_dss_plugin.models.fingerprints import weights_digest


def test_an_adapter_is_loaded_onto_the_given_base(model_dirs, tmp_path):
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


def test_an_adapter_is_merged_into_its_base(model_dir, tmp_path):
    peft = pytest.importorskip("peft")
    base, tokenizer = load_whole_model(str(model_dir))
    plain = weights_digest(base)
    config = peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False)
    adapted = peft.get_peft_model(base, config)
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        expected = adapted.eval()(ids).logits
    adapted.peft_config["default"].base_model_name_or_path = str(model_dir)
    adapted.save_pretrained(tmp_path / "adapter")
    tokenizer.save_pretrained(tmp_path / "adapter")
    merged, _ = load_whole_model(str(tmp_path / "adapter"))
    assert not any("lora" in name for name, _ in merged.named_parameters())
    with torch.no_grad():
        assert torch.allclose(merged(ids).logits, expected, atol=1e-5)
    assert weights_digest(merged) != plain
    assert weights_digest(load_whole_model(str(model_dir))[0]) == plain
    with MovedWeights(merged) as weights:
        weights.move(PLACE)


def test_a_model_with_missing_weights_is_refused(model_dir, tmp_path):
    from safetensors.torch import load_file, save_file

    model, tokenizer = load_whole_model(str(model_dir))
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    held = load_file(tmp_path / "model.safetensors")
    del held["model.layers.0.mlp.up_proj.weight"]
    save_file(held, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=r"lack the weights.*up_proj"):
        load_whole_model(str(tmp_path))
