"""Settings of published configurations: the verdicts of docs/axolotl.md, and runs with them."""

import fnmatch
import json
import re
import shutil
from pathlib import Path

import pytest

pytest.importorskip("axolotl", reason="needs Axolotl: make test-axolotl")

import torch
from axolotl.utils.schemas.config import AxolotlInputConfig
from axolotl_runs import (
    LORA,
    PLUGIN,
    _light_runs,  # noqa: F401
    chat,
    configuration,
    data_of,
    loaded,
    multi_turn,
    trained,
    trainer_of,
    write_rows,
)
from peft import LoraConfig, get_peft_model
from star_dss_axolotl.conflicts import conflicts
from star_dss_axolotl.replaced import change_settings
from support.models import tiny_llama, tiny_mixtral
from support.paths import ROOT, SHARED
from transformers import LlamaForCausalLM, MixtralForCausalLM
from yaml import safe_load

from star_dss_plugin import ConfigError

PAGE = (ROOT / "docs" / "axolotl.md").read_text()
CUT = "axolotl.integrations.cut_cross_entropy.CutCrossEntropyPlugin"
LIGER = "axolotl.integrations.liger.LigerPlugin"
EXAMPLES = SHARED / "coverage" / "axolotl_sft_examples.jsonl"


def table():
    """Yield (setting, verdict) for each setting in the page's table."""
    for line in PAGE.splitlines():
        if line.startswith("| `"):
            cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
            for code in re.findall("`([^`]*)`", cells[0]):
                yield code.replace("\\|", "|"), cells[2]


def parsed(setting):
    config = safe_load(setting)
    block = {"guard": "test-words", **config.get("star_dss", {})}
    return {**config, "star_dss": block, "plugins": [*config.get("plugins", []), PLUGIN]}


@pytest.mark.parametrize(("setting", "verdict"), list(table()))
def test_the_pages_table_agrees_with_the_code(setting, verdict):
    config = parsed(setting)
    before = json.loads(json.dumps(config))
    refused, lines = conflicts(config), change_settings(config)
    assert verdict.startswith(("works", "switched off", "changed: ", "refused: "))
    assert bool(refused) == verdict.startswith("refused")
    assert len(lines) == verdict.startswith(("switched off", "changed"))
    assert (config != before) == verdict.startswith(("switched off", "changed"))


def test_the_pages_table_has_every_published_setting():
    if not EXAMPLES.is_file():
        pytest.skip(f"the published configurations are not beside the project ({EXAMPLES})")
    configs = [json.loads(line)["config"] for line in EXAMPLES.read_text().splitlines()]
    named = {key for setting, _ in table() for key in safe_load(setting)}
    others = re.findall("`([^`]*)`", PAGE.split("-->")[-1])
    for key in sorted({key for config in configs for key in config}):
        assert key in named or any(fnmatch.fnmatch(key, other) for other in others), key


def orders(*plugins):
    return [[*plugins, PLUGIN], [PLUGIN, *plugins]]


@pytest.mark.parametrize("plugins", orders(CUT) + orders(LIGER) + orders(CUT, LIGER))
def test_fused_losses_are_off_whatever_is_listed_first(tmp_path, model_dir, caplog, plugins):
    """Then Axolotl needs neither their packages nor half precision."""
    fused = {
        "cut_cross_entropy": True if CUT in plugins else None,
        "liger_fused_linear_cross_entropy": True if LIGER in plugins else None,
        "liger_rms_norm": True if LIGER in plugins else None,
    }
    cfg = loaded(tmp_path, configuration(tmp_path, model_dir, plugins=plugins, **fused))
    assert not cfg.cut_cross_entropy
    assert not cfg.liger_fused_linear_cross_entropy
    assert bool(cfg.liger_rms_norm) == (LIGER in plugins)
    (line,) = [r.getMessage() for r in caplog.records if "switched off" in r.getMessage()]
    assert ("cut_cross_entropy" in line) == (CUT in plugins)
    assert ("liger_fused_linear_cross_entropy" in line) == (LIGER in plugins)
    assert "a chunk of tokens at a time" in line


def test_the_plugin_of_cut_cross_entropy_alone_switches_it_off(tmp_path, model_dir):
    cfg = loaded(tmp_path, configuration(tmp_path, model_dir, plugins=[CUT, PLUGIN]))
    assert cfg.cut_cross_entropy is False


def test_nothing_is_logged_if_cut_cross_entropy_is_off(tmp_path, model_dir, caplog):
    config = configuration(tmp_path, model_dir, plugins=[PLUGIN, CUT], cut_cross_entropy=False)
    assert loaded(tmp_path, config).cut_cross_entropy is False
    assert "switched off" not in caplog.text


def test_a_run_trains_with_fused_losses_switched_off(tmp_path, model_dir):
    forward = LlamaForCausalLM.forward
    fused = {
        "plugins": [PLUGIN, CUT, LIGER],
        "cut_cross_entropy": True,
        "liger_fused_linear_cross_entropy": True,
        "liger_cross_entropy": True,
    }
    trainer = trained(tmp_path, configuration(tmp_path, model_dir, **fused))
    assert LlamaForCausalLM.forward is forward
    assert trainer.star_dss_state.projects  # logits are made a chunk at a time, as the log says
    assert trainer.star_dss_state.shaped == 2


def test_prompts_are_left_out_of_the_labels(tmp_path, model_dir, caplog):
    rows = [{"instruction": "how are you?", "input": "", "output": "i am fine"}] * 4
    data = {"path": write_rows(tmp_path / "a.jsonl", rows), "ds_type": "json", "type": "alpaca"}
    shared = {"datasets": [data]}
    alone = data_of(loaded(tmp_path, configuration(tmp_path, model_dir, **shared))).train_dataset
    assert "switched off" not in caplog.text
    config = configuration(tmp_path, model_dir, train_on_inputs=True, **shared)
    both = data_of(loaded(tmp_path, config)).train_dataset
    assert both["labels"] == alone["labels"]
    assert -100 in both[0]["labels"]
    assert caplog.text.count("train_on_inputs switched off") == 1


RUNS = {
    "orthogonal": {
        "eot_tokens": ["<|im_end|>"],
        "loss_watchdog_threshold": 50.0,
        "loss_watchdog_patience": 3,
        "use_kernels": True,
        "unfrozen_parameters": ["^lm_head.weight$", "model.layers.1"],
        "lr_quadratic_warmup": True,
        "warmup_steps": 1,
        "dataset_exact_deduplication": True,
        "tokens": ["<|extra|>"],
        "resize_token_embeddings_to_32x": True,
    },
    "relora": {
        "relora": True,
        "jagged_restart_steps": 2,
        "max_steps": 4,
        "peft_use_rslora": True,
        **LORA,
    },
    "qat": {
        "qat": {
            "activation_dtype": "int8",
            "weight_dtype": "int4",
            "group_size": 32,
            "fake_quant_after_n_steps": 1,
        }
    },
    "layers in turn": {
        "lisa_n_layers": 1,
        "lisa_step_interval": 1,
        "lisa_layers_attribute": "model.layers",
    },
    # PiSSA changes the weights of the base model under the adapter.
    "principal components": {
        "peft_init_lora_weights": "pissa",
        "loraplus_lr_ratio": 8,
        **LORA,
    },
    "principal components, compared at every step": {
        "peft_init_lora_weights": "pissa",
        "star_dss": {"guard": "test-words", "kl_estimator": "full", "kl_coef": 2.0},
        **LORA,
    },
    "lora_modules_to_save": {"lora_modules_to_save": ["lm_head", "embed_tokens"], **LORA},
    "balance_labels": {
        "balance_labels": True,
        "sample_packing": True,
        "micro_batch_size": 1,
        "sequence_len": 128,
    },
}


# Axolotl 0.19 reads a setting that it has itself deprecated while it checks `relora`.
@pytest.mark.filterwarnings("ignore:Configuring FSDP using:DeprecationWarning")
@pytest.mark.parametrize("name", RUNS)
def test_supported_settings_train(tmp_path, model_dir, name):
    if name == "balance_labels" and name not in AxolotlInputConfig.model_fields:
        pytest.skip("Axolotl 0.19 has no balance_labels")
    trainer = trained(tmp_path, configuration(tmp_path, model_dir, **RUNS[name]))
    assert trainer.star_dss_state.shaped == trainer.state.max_steps
    assert trainer.state.log_history[1]["star_dss/kl"] > 0


def test_an_adapter_that_takes_from_the_base_model_is_no_reference(tmp_path, model_dir):
    block = {"guard": "test-words", "reference": "adapter"}
    config = {"peft_init_lora_weights": "pissa", "star_dss": block, **LORA}
    with pytest.raises(ConfigError, match="the adapter already changes the model"):
        trained(tmp_path, configuration(tmp_path, model_dir, **config))


def test_the_watchdog_reads_the_loss_of_star_dss(tmp_path, model_dir):
    watchdog = {"loss_watchdog_threshold": 0.01, "loss_watchdog_patience": 2, "max_steps": 9}
    trainer = trained(tmp_path, configuration(tmp_path, model_dir, **watchdog))
    assert trainer.state.global_step < 9


@pytest.fixture(scope="module")
def experts():
    return tiny_mixtral()


ON_EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


def test_experts_train_with_their_balancing_loss(tmp_path, experts, tokenizer):
    folder = tmp_path / "model"
    experts.resize_token_embeddings(len(tokenizer))
    experts.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    mixture = {
        "experts_implementation": "grouped_mm",
        "model_config": {"output_router_logits": True},
        "lora_target_parameters": ON_EXPERTS,
        "star_dss": {"guard": "test-words", "kl_estimator": "full", "kl_coef": 2.0},
        **LORA,
    }
    trainer = trained(tmp_path, configuration(tmp_path, folder, **mixture))
    assert trainer.star_dss_state.reference.kind == "adapter"
    line = trainer.state.log_history[1]
    assert line["star_dss/kl"] > 0
    assert line["loss"] > line["star_dss/ce"] + line["star_dss/kl"]


def test_expert_kernels_compute_the_base_model_with_the_adapter_off(experts, monkeypatch):
    """The kernel itself needs a GPU; the test looks at the adapter that the kernel gets."""
    from axolotl.integrations.kernels.libs.scattermoe_lora.experts_lora_fastpath import (
        patch_paramwrapper_fastpath,
    )
    from peft.tuners.lora.layer import ParamWrapper
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    handed = []

    def kernel(self, hidden_states, *args, **kwargs):
        handed.append(getattr(self, "_scattermoe_lora", None))
        return hidden_states

    monkeypatch.setattr(ParamWrapper, "forward", ParamWrapper.forward)
    monkeypatch.setitem(ALL_EXPERTS_FUNCTIONS._local_mapping, "scattermoe", kernel)
    adapter = LoraConfig(r=4, target_modules=["q_proj"], target_parameters=ON_EXPERTS)
    model = get_peft_model(MixtralForCausalLM(experts.config), adapter)
    patch_paramwrapper_fastpath()
    for layer in model.get_base_model().model.layers:
        layer.mlp.experts.get_base_layer().config._experts_implementation = "scattermoe"
    ids = torch.arange(8)[None]
    model(input_ids=ids)
    assert len(handed) == 2
    assert all(handed)
    handed.clear()
    with model.disable_adapter():
        model(input_ids=ids)
    assert handed == [None, None]


def test_lora_kernels_compute_the_base_model_with_the_adapter_off():
    from axolotl.kernels.lora import get_lora_parameters

    model = get_peft_model(tiny_llama(), LoraConfig(r=4, target_modules=["q_proj"]))
    projection = model.get_base_model().model.layers[0].self_attn.q_proj

    def handed():
        return [x for x in get_lora_parameters(projection)[2:] if isinstance(x, torch.Tensor)]

    parameters = {id(p) for n, p in projection.named_parameters() if "lora_" in n}
    assert parameters <= {id(x) for x in handed()}
    with model.disable_adapter():
        assert not parameters & {id(x) for x in handed()}


def test_a_tokenizer_of_mistral_has_no_template_to_invert(tmp_path, caplog):
    import mistral_common

    folder = tmp_path / "model"
    tiny_llama(131072, hidden_size=16, intermediate_size=32).save_pretrained(folder)
    data = Path(mistral_common.__file__).parent / "data"
    shutil.copy(data / "tekken_240911.json", folder / "tekken.json")
    config = configuration(
        tmp_path,
        folder,
        tokenizer_use_mistral_common=True,
        datasets=[chat(tmp_path / "chat.jsonl", multi_turn())],
        max_steps=1,
    )
    trainer = trainer_of(tmp_path, config)
    trainer.train()
    assert trainer.star_dss_state.shaped == 1
    assert "16 responses" in caplog.text
    assert "for 0 of them the guard read the messages, for 16 the raw prompt" in caplog.text
