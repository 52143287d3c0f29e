"""Experts that Axolotl distributes over gloo ranks, with a stand-in for DeepEP."""

import pytest
from axolotl_runs import (
    LORA,
    PLUGIN,
    _light_runs,  # noqa: F401
    configuration,
    on_two_ranks,
    trained,
    write_config,
)
from support.models import tiny_qwen3_moe
from support.run_differences import CLOSE, largest_difference

pytestmark = pytest.mark.slow

FSDP = {
    "fsdp_version": 2,
    "fsdp_config": {
        "auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
        "transformer_layer_cls_to_wrap": "Qwen3MoeDecoderLayer",
        "state_dict_type": "FULL_STATE_DICT",
        "cpu_ram_efficient_loading": False,
        "offload_params": False,
        "reshard_after_forward": True,
    },
}
MESH = {**FSDP, "dp_shard_size": 2}
EFFICIENT = {**FSDP, "fsdp_config": {**FSDP["fsdp_config"], "cpu_ram_efficient_loading": True}}
PACKS = {"sample_packing": True, "sequence_len": 64, "sample_packing_sequentially": True}
ADAPTER = {**LORA, "lora_target_linear": False, "lora_target_modules": ["q_proj", "v_proj"]}
RUNS = {
    # The number of ranks, and the settings beside `expert_parallel_size: 2`.
    "full": (2, {}),
    # In each step a rank has no token with a KL weight.
    "adapter": (2, {**ADAPTER, "star_dss": {"kl_estimator": "full"}}),
    # The second rank has only the weights of its experts until the model is sharded.
    "efficient": (2, {**ADAPTER, **EFFICIENT, **PACKS, "micro_batch_size": 1}),
    "mesh": (4, MESH),
}
PARALLEL = {
    "expert_parallel_size": 2,
    "plugins": ["axolotl.integrations.expert_parallel.ExpertParallelPlugin", PLUGIN],
}


@pytest.fixture(scope="module")
def experts_dir(tmp_path_factory, tokenizer):
    folder = tmp_path_factory.mktemp("mixture")
    tiny_qwen3_moe(len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def case(folder, experts_dir, ranks, changes):
    """Return a configuration with four rows or packs per step, for any number of ranks."""
    block = {"guard": "test-words", "chunk_size": 2, "kl_coef": 2.0, **changes.get("star_dss", {})}
    rows = changes.get("micro_batch_size", 4 // ranks)
    return configuration(
        folder,
        experts_dir,
        **{
            "attn_implementation": "sdpa",
            "experts_implementation": "grouped_mm",
            "micro_batch_size": rows,
            "gradient_accumulation_steps": 4 // ranks // rows,
            "max_steps": 4,
            "learning_rate": 2e-3,
            "max_grad_norm": 1e6,  # without FSDP a rank clips by the norm of its own experts
            **changes,
            "star_dss": block,
        },
    )


def train_in_one_process(folder, experts_dir, changes):
    """Return the log of a run on the same rows in one process, which has all experts."""
    sharding = (*MESH, *PARALLEL)
    changes = {name: value for name, value in changes.items() if name not in sharding}
    history = trained(folder, case(folder, experts_dir, 1, changes)).state.log_history
    return [(h["step"], h["loss"], h["grad_norm"]) for h in history if "grad_norm" in h]


@pytest.mark.parametrize("name", RUNS)
def test_ranks_with_parts_of_the_experts_take_the_steps_of_one_process(
    tmp_path, experts_dir, site, name
):
    ranks, changes = RUNS[name]
    kind = "ep-fsdp2" if "fsdp_config" in changes else "ep"
    config = case(tmp_path / name, experts_dir, ranks, {**changes, **PARALLEL})
    configs = [write_config(tmp_path / name, config)]
    if name == "efficient":
        config["star_dss"]["reference"] = "precomputed"
        configs.append(write_config(tmp_path / "refused", config).rename(tmp_path / "refused.yaml"))
    found, done = on_two_ranks(tmp_path, site, kind, configs, ranks=ranks)
    wanted = train_in_one_process(tmp_path / "alone", experts_dir, changes)
    for rank in found:
        one = rank["config"]
        assert "error" not in one, (one, done.stderr[-3000:])
        print(f"{name}: {largest_difference(one['logs'], wanted):.1e}")
        assert largest_difference(one["logs"], wanted) < CLOSE
        assert max(one["kl"]) > 1e-5  # the reference was used
        assert one["sharded"] == 1 / ranks
        if name == "efficient":
            assert "its experts are spread over the ranks" in rank["refused"]["error"]
