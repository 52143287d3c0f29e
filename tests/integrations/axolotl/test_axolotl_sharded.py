"""Axolotl with FSDP and DeepSpeed on two gloo ranks takes the steps of one process."""

import pytest
from axolotl_runs import (
    LORA,
    VERSION,
    _light_runs,  # noqa: F401
    configuration,
    on_two_ranks,
    train_in_one_process,
    write_config,
    zero_file,
)
from support.run_differences import CLOSE, largest_difference, largest_weight_difference

pytestmark = pytest.mark.slow

FSDP = {
    "auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
    "transformer_layer_cls_to_wrap": "LlamaDecoderLayer",
    "state_dict_type": "FULL_STATE_DICT",
    "cpu_ram_efficient_loading": False,
}
FSDP1 = {
    **FSDP,
    "limit_all_gathers": True,
    "sync_module_states": False,  # needs an accelerator
    "use_orig_params": True,
}
FSDP2 = {**FSDP, "offload_params": False, "reshard_after_forward": True}
STREAM = {
    "streaming": True,
    "shuffle_merged_datasets": False,
    "curriculum_sampling": True,  # the process of the comparison reads a data set in the same order
}
CASES = {
    "full": {},
    "packed": {"sample_packing": True, "sequence_len": 64, "sample_packing_sequentially": True},
    "stopped": {"max_steps": 2, "save_strategy": "steps", "save_steps": 2},
    "resumed": {},
    "lora": LORA,
    "adapter": {
        **LORA,
        "star_dss": {"kl_estimator": "full", "reference": "adapter"},
        "gradient_checkpointing": True,
        "val_set_size": 0.5,
        "eval_steps": 2,
    },
    "copy": {"star_dss": {"kl_estimator": "full", "reference": "copy"}},
    "named": {"star_dss": {"kl_estimator": "full", "reference": "MODEL"}},
    "stream": {**LORA, **STREAM, "star_dss": {"stream_buffer": 3}},
    "stream-packed": {
        **STREAM,
        "sample_packing": True,
        "sequence_len": 64,
        "sample_packing_sequentially": True,
        "star_dss": {"kl_estimator": "full", "reference": "MODEL"},
    },
}
RUNS = {
    "fsdp2": tuple(name for name in CASES if name != "copy"),
    "fsdp2-meta": ("full", "lora", "adapter", "named"),
    "fsdp1": ("full", "lora", "adapter", "named"),
    "zero1": ("full", "lora", "adapter", "copy", "named"),
    "zero2": ("full", "lora", "adapter", "copy", "named"),
    "zero3": ("full", "lora", "stopped", "resumed", "adapter", "named"),
}


def sharding(kind, folder):
    """Return the settings that shard the model."""
    if kind.startswith("fsdp2"):
        return {
            "fsdp_version": 2,
            "fsdp_config": {**FSDP2, "cpu_ram_efficient_loading": kind == "fsdp2-meta"},
        }
    if kind == "fsdp1":
        return {"fsdp": ["full_shard", "auto_wrap"], "fsdp_config": FSDP1}
    return {"deepspeed": zero_file(folder, kind)}


def case(folder, model_dir, name, ranks, **changes):
    """Return a case's configuration with four rows per step, for any number of ranks."""
    changes = {**CASES[name], **changes}
    block = {"guard": "test-words", "chunk_size": 2, "kl_coef": 2.0, **changes.pop("star_dss", {})}
    if block.get("reference") == "MODEL":
        block["reference"] = str(model_dir)
    if ranks == 1:
        changes.pop("streaming", None)
    return configuration(
        folder,
        model_dir,
        **{
            "attn_implementation": "sdpa",
            "micro_batch_size": 1,
            "gradient_accumulation_steps": 4 // ranks,
            "eval_batch_size": 4 // ranks,
            "max_steps": 4,
            "learning_rate": 2e-3,
            "star_dss": block,
            **changes,
        },
    )


def launch(folder, model_dir, site, kind):
    """Train the cases of a kind on two ranks; return the results of each, and the process."""
    configs = []
    for name in RUNS[kind]:
        shared = folder / ("full" if name in ("stopped", "resumed") else name)
        changes = sharding(kind, folder) | {"output_dir": str(folder / name)}
        if name == "resumed":
            changes["resume_from_checkpoint"] = str(folder / "stopped" / "checkpoint-2")
        config = write_config(shared, case(shared, model_dir, name, 2, **changes))
        configs.append(config.rename(folder / f"{name}.yaml"))
    return on_two_ranks(folder, site, kind, configs)


@pytest.mark.parametrize("kind", RUNS)
def test_two_ranks_take_the_steps_of_one_process(tmp_path, model_dir, site, kind):
    if kind == "fsdp1" and VERSION >= (0, 21):
        pytest.skip("Axolotl 0.21 refuses the list `fsdp`, and so FSDP1")
    (found, second), done = launch(tmp_path, model_dir, site, kind)
    twins = {}
    for name in RUNS[kind]:
        assert "error" not in found[name], (name, found[name], done.stderr[-3000:])
        assert found[name]["logs"] == second[name]["logs"], name
        assert max(found[name]["kl"]) > 1e-5, name  # the reference was used
        assert found[name]["sharded"] < 0.6, name
        half = name in ("stopped", "resumed")  # two steps of four, of two micro-batches each
        assert found[name]["shaped"] == (4 if half else 8), name
        twin = "full" if half else name
        if twin not in twins:
            alone = tmp_path / f"alone-{twin}"
            twins[twin] = train_in_one_process(alone, case(alone, model_dir, twin, 1))
        logs, evaluations = twins[twin]
        steps = largest_difference(found[name]["logs"], logs[:2] if name == "stopped" else logs)
        evaluated = largest_difference([[0.0, *found[name]["evaluations"]]], [[0.0, *evaluations]])
        saved = 0.0
        if kind != "fsdp1" and name != "stopped":
            final = tmp_path / f"alone-{twin}" / "final"
            saved = largest_weight_difference(tmp_path / name, final, lora="adapter" in CASES[name])
        print(f"{kind} {name}: {steps:.1e}, {evaluated:.1e}, {saved:.1e}")
        assert max(steps, evaluated) < CLOSE, name
        assert saved < 1e-4, name  # Adam divides by numbers that may be close to 0
