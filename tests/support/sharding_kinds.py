"""How models are sharded over gloo ranks in tests, and the proof that they are.

accelerate shards on accelerators only: asked for FSDP on a CPU it trains with DDP, without a
warning. `shard_on_cpus` makes it take the same branch as on a GPU; `proof_of_sharding` measures the
parameters that a rank holds.
"""

from __future__ import annotations

import os

FSDP = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_TRANSFORMER_CLS_TO_WRAP": "LlamaDecoderLayer",
    "FSDP_SHARDING_STRATEGY": "FULL_SHARD",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_USE_ORIG_PARAMS": "true",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "false",
    "FSDP_SYNC_MODULE_STATES": "false",  # accelerate needs an accelerator for it
    "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
}
KINDS = {
    "ddp": {},
    "fsdp1": FSDP | {"FSDP_VERSION": "1"},
    "fsdp2": FSDP | {"FSDP_VERSION": "2"},
    # All ranks but the first hold meta tensors until the model is sharded.
    "fsdp2-meta": FSDP | {"FSDP_VERSION": "2", "FSDP_CPU_RAM_EFFICIENT_LOADING": "true"},
    # The head is an FSDP unit of its own.
    "fsdp2-head": FSDP
    | {"FSDP_VERSION": "2", "FSDP_TRANSFORMER_CLS_TO_WRAP": "LlamaDecoderLayer,Linear"},
    # The layers of the vision tower are sharded, too.
    "fsdp2-gemma3": FSDP
    | {
        "FSDP_VERSION": "2",
        "FSDP_TRANSFORMER_CLS_TO_WRAP": "Gemma3DecoderLayer,SiglipEncoderLayer",
    },
    "fsdp2-smolvlm": FSDP
    | {
        "FSDP_VERSION": "2",
        "FSDP_TRANSFORMER_CLS_TO_WRAP": "LlamaDecoderLayer,Idefics3EncoderLayer",
    },
    # Tensor parallelism: each layer is split over the ranks, which read the same rows.
    "tp": {},
    # Sharded by transformers as it loads, without accelerate: tensor parallelism over two ranks
    # and FSDP over two; FSDP alone.
    "tp-fsdp2": {},
    "fsdp2-loaded": {},
    "zero1": {"DS_ACCELERATOR": "cpu", "DS_BUILD_OPS": "0"},
    "zero2": {"DS_ACCELERATOR": "cpu", "DS_BUILD_OPS": "0"},
    "zero3": {"DS_ACCELERATOR": "cpu", "DS_BUILD_OPS": "0"},
}
# Sequence parallelism, with the variables that `accelerate launch` sets.
PARTS = {
    "ACCELERATE_USE_PARALLELISM_CONFIG": "true",
    "PARALLELISM_CONFIG_SP_SIZE": "2",
    "PARALLELISM_CONFIG_SP_BACKEND": "deepspeed",
    "PARALLELISM_CONFIG_SP_ATTN_IMPLEMENTATION": "sdpa",
}
KINDS |= {f"{kind}-parts": KINDS[kind] | PARTS for kind in ("zero2", "zero3")}
KINDS["zero3-parts-of-two"] = KINDS["zero3-parts"] | {"PARALLELISM_CONFIG_DP_SHARD_SIZE": "2"}

# The kinds that transformers shards as it loads, as options of `DistributedConfig`.
SPLIT = {
    "tp": {"tp_size": 2, "tp_plan": "auto"},
    "tp-fsdp2": {"tp_size": 2, "fsdp_size": 2, "tp_plan": "auto"},
    "fsdp2-loaded": {"fsdp_size": 2},
}
RANKS = {"tp-fsdp2": 4, "zero3-parts-of-two": 4}  # all others have two


def shard_on_cpus(kind="MULTI_GPU"):
    """Let accelerate shard over gloo as it does over NCCL.

    Args:
        kind: The `DistributedType`. With "MULTI_CPU" accelerate counts the gloo ranks of a program
            that does not ask for a CPU, too; otherwise it has one.
    """
    from accelerate.state import PartialState
    from accelerate.utils import DistributedType

    os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
    PartialState._prepare_backend = lambda self, *args, **kwargs: (
        "gloo",
        DistributedType[kind],
    )


def deepspeed_config(stage):
    return {
        "zero_optimization": {
            "stage": stage,
            "stage3_param_persistence_threshold": 0,
            "stage3_gather_16bit_weights_on_model_save": True,
        },
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }


def proof_of_sharding(kind, trainer):
    """Return the share of the trained parameters' elements that this rank holds."""
    from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
    from torch.distributed.tensor import DTensor

    if kind in SPLIT:
        held = [p for p in trainer.model.parameters() if isinstance(p, DTensor)]
        return sum(p.to_local().numel() for p in held) / sum(p.numel() for p in held)
    found = str(trainer.accelerator.distributed_type).rpartition(".")[2].lower()
    expected = {"f": "fsdp", "z": "deepspeed", "d": "multi_gpu"}[kind[0]]
    assert found == expected, (found, expected)
    model = trainer.model_wrapped
    if kind.startswith("fsdp2"):
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()
        shards = [p for p in model.parameters() if isinstance(p, DTensor)]
        assert len(shards) == len(list(model.parameters()))
        return sum(p.to_local().numel() for p in shards) / sum(p.numel() for p in shards)
    if kind == "fsdp1":
        handles = FullyShardedDataParallel.fsdp_modules(model)
        flat = [m._handle.flat_param for m in handles if m._handle is not None]
        return sum(p._local_shard.numel() for p in flat) / sum(
            p._unpadded_unsharded_size.numel() for p in flat
        )
    if kind.startswith("zero3"):
        shards = [p for p in model.parameters() if hasattr(p, "ds_shape")]
        assert len(shards) == len(list(model.parameters()))
        return sum(p.ds_tensor.numel() for p in shards) / sum(p.ds_numel for p in shards)
    if kind.startswith("zero"):
        held = sum(flat.numel() for flat in model.optimizer.single_partition_of_fp32_groups)
        return held / sum(p.numel() for p in model.parameters() if p.requires_grad)
    return 1.0


def reset():
    """Reset what accelerate, DeepSpeed and transformers keep from one run to the next."""
    from accelerate.state import AcceleratorState, GradientState
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    if "PARALLELISM_CONFIG_SP_SIZE" in os.environ:
        from deepspeed.runtime.sequence_parallel import parallel_state_sp
        from deepspeed.utils import groups

        # DeepSpeed wraps the attention that is registered, and makes its groups once per process.
        ALL_ATTENTION_FUNCTIONS._local_mapping.clear()
        groups.mpu = None
        parallel_state_sp._SEQUENCE_PARALLEL_GROUP = None
        parallel_state_sp._SEQUENCE_DATA_PARALLEL_GROUP = None
    AcceleratorState._reset_state()  # the process group stays
    GradientState._reset_state()
    unset_hf_deepspeed_config()
