"""Settings that the plugin changes: the attention of packs, and the trained roles."""

import importlib.util

import pytest

pytest.importorskip("axolotl", reason="needs Axolotl: make test-axolotl")

from axolotl.utils.schemas.config import AxolotlInputConfig
from axolotl_runs import (
    LORA,
    _light_runs,  # noqa: F401
    chat,
    configuration,
    data_of,
    loaded,
    multi_turn,
    trained,
    trainer_of,
)
from star_dss_axolotl import conflicts
from star_dss_axolotl.replaced import change_settings
from support.models import tiny_jamba
from support.run_differences import history

PACKED = {
    "sample_packing": True,
    "sequence_len": 512,
    "micro_batch_size": 1,
    "max_steps": 2,
    "learning_rate": 1e-9,
    "logging_steps": 1,
}


def test_packs_get_an_attention_that_keeps_rows_apart(tmp_path, model_dir, caplog):
    found = []
    for chosen in (None, "sdpa"):
        folder = tmp_path / str(chosen)
        config = configuration(folder, model_dir, **PACKED, attn_implementation=chosen)
        trainer = trained(folder, config)
        assert trainer.star_dss_state.reference.kind == "precomputed"
        found.append(history(trainer))
        assert len(found[-1]) == 2
        assert caplog.text.count("attn_implementation set to sdpa") == 1
    assert found[0] == found[1]


@pytest.mark.parametrize(
    "chosen",
    [{"attn_implementation": "eager"}, {"flex_attention": True}, {"gemma4_hybrid_attn_impl": True}],
    ids=lambda chosen: next(iter(chosen)),
)
def test_an_attention_that_is_named_stays(chosen):
    config = {"sample_packing": True, **chosen}
    assert change_settings(config) == []
    assert config == {"sample_packing": True, **chosen}


def test_settings_that_choose_no_attention_count_as_none():
    config = {"sample_packing": True, "large_head_attention": True, "flash_attention": False}
    assert len(change_settings(config)) == 1
    assert config["attn_implementation"] == "sdpa"


@pytest.mark.skipif(
    importlib.util.find_spec("axolotl.monkeypatch.models.recurrent_support") is not None,
    reason="this Axolotl refuses packs of models with recurrent layers",
)
@pytest.mark.parametrize("adapter", [{}, LORA], ids=["full", "lora"])
def test_a_reference_of_recurrent_layers_reads_packs_as_the_policy_does(
    tmp_path, tokenizer, caplog, adapter
):
    tiny_jamba(len(tokenizer)).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    config = configuration(
        tmp_path, tmp_path / "model", **PACKED, attn_implementation="sdpa", **adapter
    )
    trainer = trainer_of(tmp_path, config)
    assert trainer.star_dss_state.reference.kind == ("adapter" if adapter else "copy")
    assert "reads the documents of a pack together" in caplog.text
    trainer.train()
    kl = [log["star_dss/kl"] for log in trainer.state.log_history if "star_dss/kl" in log]
    assert kl, trainer.state.log_history
    assert max(map(abs, kl)) < 1e-7


@pytest.mark.parametrize("known", [True, False])
def test_kernels_of_the_hub_get_no_mask(tmp_path, model_dir, monkeypatch, known):
    """Axolotl gives kernels that it does not know a mask, with which rows read each other."""
    monkeypatch.setattr(
        AxolotlInputConfig, "attn_decontaminates_packing", property(lambda self: known)
    )
    monkeypatch.setattr(conflicts, "_is_flash_kernel", lambda name: name == "sdpa")
    config = configuration(tmp_path, model_dir, **PACKED, attn_implementation="sdpa")
    trainer = trainer_of(tmp_path, config)
    assert trainer.star_dss_state.reference.kind == "precomputed"  # rows are kept apart
    batch = next(iter(trainer.get_train_dataloader()))
    assert (batch["position_ids"] == 0).sum() > 1
    trainer.train()
    kl = [log["star_dss/kl"] for log in trainer.state.log_history if "star_dss/kl" in log]
    assert len(kl) == 2
    assert max(map(abs, kl)) < 1e-7


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("kernels-community/vllm-flash-attn3", True),
        ("kernels-community/flash-attn2@v1", True),
        ("xformers", False),
        ("kernels-community/paged-attention", False),
        ("flash-attn", False),
        (None, False),
    ],
)
def test_flash_attention_kernels_are_known_by_name(name, found):
    assert conflicts._is_flash_kernel(name) is found


def test_roles_other_than_the_assistant_are_left_out(tmp_path, model_dir, caplog):
    found = []
    for roles in (["assistant"], ["user", "assistant"], ["human", "gpt"]):
        data = chat(tmp_path / "chat.jsonl", multi_turn(), roles_to_train=roles)
        cfg = loaded(tmp_path, configuration(tmp_path, model_dir, datasets=[data]))
        found.append(list(data_of(cfg).train_dataset["labels"]))
    assert found[0] == found[1] == found[2]
    assert "user left out of datasets[0]" in caplog.text
    assert "human left out of datasets[0]" in caplog.text
