"""The `star_dss:` block, and configurations that are refused."""

import functools
import sys
from dataclasses import fields
from typing import get_type_hints

import pytest
from support.paths import ROOT

pytest.importorskip("axolotl", reason="needs Axolotl: make test-axolotl")

import torch
import yaml
from axolotl.integrations.base import BasePlugin, PluginManager
from axolotl_runs import (
    PLUGIN,
    _light_runs,  # noqa: F401
    chat,
    configuration,
    data_of,
    loaded,
    single_turn,
    trained,
    trainer_of,
)
from star_dss_axolotl import StarDSSPlugin
from star_dss_axolotl.args import StarDSSBlock, options_of
from star_dss_axolotl.conflicts import conflicts

from star_dss_plugin import ConfigError, StarDSSError, StarDSSOptions
from star_dss_plugin.plugins import load_plugins

EXAMPLES = sorted((ROOT / "examples" / "axolotl").glob("*.yaml"))


@pytest.mark.parametrize("option", fields(StarDSSOptions), ids=lambda f: f.name)
def test_the_block_has_the_cores_options(option):
    field = StarDSSBlock.model_fields[option.name]
    assert field.default == option.default
    assert field.annotation == get_type_hints(StarDSSOptions)[option.name]
    assert field.description == option.metadata["help"]


def test_the_block_has_no_other_options():
    assert list(StarDSSBlock.model_fields) == [f.name for f in fields(StarDSSOptions)]
    assert StarDSSOptions(**StarDSSBlock().model_dump()) == StarDSSOptions()


def test_the_blocks_options_reach_the_core_unchanged(tmp_path, model_dir):
    guard = {"preset": "test-words", "word": "dog", "safe": 0.75}
    block = {"guard": guard, "chunk_size": 7, "kl_estimator": "k3", "threshold": 0.25}
    options = options_of(loaded(tmp_path, configuration(tmp_path, model_dir, star_dss=block)))
    assert options == StarDSSOptions(**block)
    assert type(options.guard) is dict


@pytest.mark.parametrize(
    ("block", "message"),
    [
        ({"chunk_sise": 5}, "chunk_sise"),
        ({"chunk_size": 0}, "chunk_size is 0; it must be an integer of at least 1"),
        ({"chunk_size": True}, "chunk_size is True; it must be a number"),
        ({"kl_coef": -1}, "kl_coef is -1"),
        ({"threshold": 2}, "threshold is 2"),
        ({"kl_estimator": "k4"}, "Unknown kl_estimator 'k4'"),
        ({"loss_type": "star-dss"}, "Did you mean 'star_dss'"),
        ({"guard": "test-word"}, "Did you mean 'test-words'"),
        ({"segmenter": "token"}, "Did you mean 'tokens'"),
        ({"reference": "adapters"}, "Did you mean 'adapter'"),
        (["guard"], "star_dss"),
    ],
)
def test_a_wrong_block_stops_the_configuration(tmp_path, model_dir, block, message):
    given = {"guard": "test-words", **block} if isinstance(block, dict) else block
    with pytest.raises(ValueError, match=message):
        loaded(tmp_path, configuration(tmp_path, model_dir, star_dss=given))


MEDIA = {
    "processor_type": "AutoProcessor",
    "skip_prepare_dataset": True,
    "remove_unused_columns": False,
}
REFUSED = [
    {"rl": "dpo"},
    {"reward_model": True},
    {"process_reward_model": True},
    {"use_eaft": True},
    {"orpo_alpha": 0.1},
    {"trainer_cls": "transformers.Trainer"},
    {"relora": True, "star_dss": {"guard": "test-words", "reference": "adapter"}},
    {"relora": True, "star_dss": {"guard": "test-words", "kl_estimator": "full"}},
    {"relora": True, "streaming": True},
    {"streaming": True, "accelerator_config": {"dispatch_batches": True}},
    {"pretraining_dataset": "text"},
    {"skip_prepare_dataset": True},
    {"use_dft": True},
    {"diffusion_lm": {"num_steps": 4}},
    {"balance_labels": True},
    {"liger_use_token_scaling": True},
    {"use_pose": True},
    {"processor_type": "AutoProcessor", "remove_unused_columns": False},
    {"processor_type": "AutoProcessor", "skip_prepare_dataset": True},
    {**MEDIA, "sample_packing": True},
    {**MEDIA, "streaming": True},
    {"context_parallel_size": 2},
    {"context_parallel": {"size": 2}},
    {"sequence_parallel_degree": 2},
    {"plugins": [PLUGIN, "axolotl.integrations.kd.KDPlugin"]},
    {"plugins": [PLUGIN, "axolotl.integrations.diffusion.DiffusionPlugin"]},
    {"plugins": [PLUGIN, "axolotl.integrations.hatchery.HatcheryPlugin"]},
    {"plugins": [PLUGIN, "axolotl.integrations.mixlora.MixLoraPlugin"]},
    {"datasets": [{"path": "x", "type": "chat_template", "roles_to_train": ["user"]}]},
    {"datasets": [{"path": "x", "type": "chat_template", "roles_to_train": "user"}]},
    {"test_datasets": [{"path": "x", "type": "chat_template", "roles_to_train": ["tool"]}]},
]


def name_of(change):
    (key, value), *_ = change.items()
    return f"{key}={value[-1]}" if key == "plugins" else key


@pytest.mark.parametrize("change", REFUSED, ids=name_of)
def test_a_conflict_stops_the_configuration(tmp_path, model_dir, change):
    config = configuration(tmp_path, model_dir, **change)
    (found,) = conflicts(config)
    assert found.startswith("STAR-DSS cannot be used with ")
    with pytest.raises(ConfigError, match="STAR-DSS cannot be used with"):
        StarDSSPlugin().register(config)
    if "plugins" not in change:  # the packages of those plugins are not installed
        with pytest.raises(ConfigError, match="STAR-DSS cannot be used with"):
            loaded(tmp_path, config)


def test_all_conflicts_are_listed_at_once(tmp_path, model_dir):
    config = configuration(tmp_path, model_dir, use_eaft=True, use_pose=True)
    with pytest.raises(ConfigError, match="(?s)use_eaft: True.*use_pose: True"):
        loaded(tmp_path, config)


@pytest.mark.parametrize(
    "roles", [None, ["assistant"], ["gpt"], ["assistant", "gpt"]], ids=lambda r: str(r)
)
def test_training_the_assistant_is_no_conflict(roles):
    assert conflicts({"datasets": [{"path": "x", "roles_to_train": roles}]}) == []


def test_roles_to_train_are_read_by_their_other_names():
    dataset = {"path": "x", "roles": {"assistant": ["bot"]}, "roles_to_train": ["bot"]}
    assert conflicts({"datasets": [dataset]}) == []
    dataset["roles"] = {"assistant": ["gpt"], "user": ["bot"]}
    assert len(conflicts({"datasets": [dataset]})) == 1


def test_packing_whose_attention_mixes_rows_is_refused(tmp_path, model_dir, monkeypatch):
    from axolotl.utils.schemas.config import AxolotlInputConfig

    monkeypatch.setattr(
        AxolotlInputConfig, "attn_decontaminates_packing", property(lambda self: False)
    )
    with pytest.raises(ValueError, match="rows of one pack would read each other"):
        loaded(tmp_path, configuration(tmp_path, model_dir, sample_packing=True))


@pytest.mark.parametrize("name", [PLUGIN, "star_dss_axolotl.plugin.StarDSSPlugin"])
def test_the_plugin_without_its_block_is_an_error(tmp_path, model_dir, name):
    with pytest.raises(ConfigError, match="no star_dss block"):
        loaded(tmp_path, configuration(tmp_path, model_dir, star_dss=None, plugins=[name]))


def test_a_plugin_that_is_named_with_a_colon_is_known():
    with pytest.raises(ConfigError, match="no star_dss block"):
        StarDSSPlugin().register({"plugins": ["star_dss_axolotl:StarDSSPlugin"]})


def test_an_import_error_inside_the_plugin_stops_the_run(tmp_path, model_dir, monkeypatch):
    """Axolotl would log an ImportError and train without the plugin."""
    monkeypatch.delitem(sys.modules, "star_dss_axolotl")
    monkeypatch.delitem(sys.modules, "star_dss_axolotl.plugin", raising=False)
    monkeypatch.setitem(sys.modules, "star_dss_axolotl.conflicts", None)
    with pytest.raises(RuntimeError, match="must not go on without the STAR-DSS loss"):
        loaded(tmp_path, configuration(tmp_path, model_dir))


class OtherTrainer(BasePlugin):
    def get_trainer_cls(self, cfg):
        from axolotl.core.trainers.base import AxolotlTrainer

        return AxolotlTrainer


class OtherLoader(BasePlugin):
    def load_datasets(self, cfg, preprocess=False):
        from axolotl.common.datasets import load_datasets

        return load_datasets(cfg=cfg)


class OtherCollator(BasePlugin):
    def get_collator_cls_and_kwargs(self, cfg, is_eval=False):
        return Reversed, {}


class Reversed:
    """A collator that moves tokens."""

    def __init__(self, tokenizer, **kwargs):
        from transformers import DataCollatorForSeq2Seq

        self.inner = DataCollatorForSeq2Seq(tokenizer)

    def __call__(self, features):
        return {name: values.flip(1) for name, values in self.inner(features).items()}


class Stock(BasePlugin):
    """A plugin that restores the loss of Axolotl after the trainer was made."""

    def post_trainer_create(self, cfg, trainer):
        from axolotl.core.trainers.base import AxolotlTrainer

        trainer.compute_loss = lambda model, inputs, **kwargs: AxolotlTrainer.compute_loss(
            trainer, model, {k: inputs[k] for k in ("input_ids", "attention_mask", "labels")}
        )


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (OtherTrainer, "made a AxolotlTrainer and not the trainer of STAR-DSS"),
        (OtherLoader, "loads the data too"),
        (OtherCollator, "does not keep the scored tokens in place"),
        (Stock, "Something replaces compute_loss"),
    ],
)
def test_another_plugin_that_replaces_our_part_stops_the_run(
    tmp_path, model_dir, monkeypatch, other, message
):
    monkeypatch.setattr("axolotl_runs.Other", other, raising=False)
    config = configuration(tmp_path, model_dir, plugins=["axolotl_runs.Other", PLUGIN])
    steps = []
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self, *a, **k: steps.append(self))
    with pytest.raises(StarDSSError, match=message):
        trained(tmp_path, config)
    assert steps == []


def test_a_trainer_of_another_plugin_is_not_replaced(tmp_path, model_dir, monkeypatch):
    """Axolotl takes the trainer of the first plugin, so the other's loss would be lost."""
    monkeypatch.setattr("axolotl_runs.Other", OtherTrainer, raising=False)
    config = configuration(tmp_path, model_dir, plugins=[PLUGIN, "axolotl_runs.Other"])
    with pytest.raises(ConfigError, match="brings a trainer of its own .AxolotlTrainer"):
        trainer_of(tmp_path, config)


def test_a_run_without_a_guard_is_an_error(tmp_path, model_dir):
    with pytest.raises(ConfigError, match="No guard was given"):
        data_of(loaded(tmp_path, configuration(tmp_path, model_dir, star_dss={"chunk_size": 5})))


def test_a_model_without_logits_stops_the_run(tmp_path, model_dir):
    trainer = trainer_of(tmp_path, configuration(tmp_path, model_dir))
    forward = trainer.model.forward

    @functools.wraps(forward)
    def fused(*args, **kwargs):
        outputs = forward(*args, **kwargs)
        outputs.logits = None
        return outputs

    trainer.model.forward = fused
    with pytest.raises(StarDSSError, match="Switch off what fuses the loss"):
        trainer.train()
    assert trainer.state.global_step == 0


def test_a_configuration_without_the_plugin_is_not_changed(tmp_path, model_dir):
    """The process has used the plugin for another configuration before."""
    loaded(tmp_path, configuration(tmp_path, model_dir))
    manager = PluginManager.get_instance()
    plugin = manager.plugins[PLUGIN]  # Axolotl 0.21 adds plugins of its own
    plain = {"plugins": ["axolotl.integrations.liger.LigerPlugin"]}
    plugin.register(plain)
    assert plugin.load_datasets(plain) is None
    assert plugin.get_trainer_cls(plain) is None
    plugin.post_trainer_create(plain, object())


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda p: p.stem)
def test_the_examples_are_valid(path, tmp_path, model_dir):
    """A local model and local data replace those that would be downloaded."""
    config = yaml.safe_load(path.read_text())
    block = dict(config["star_dss"])
    assert block["guard"] in load_plugins().names("guard")
    local = chat(tmp_path / "chat.jsonl", single_turn())
    config |= {"base_model": str(model_dir), "datasets": [local], "bf16": False, "tf32": False}
    options = options_of(loaded(tmp_path, config))
    assert options == StarDSSOptions(**block)


def test_there_are_three_examples():
    assert len(EXAMPLES) == 3
