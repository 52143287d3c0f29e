"""Run `axolotl train` on gloo ranks that share a model: a script for `torch.distributed.run`.

    python -m torch.distributed.run --standalone --nproc_per_node 2 \
        tests/integrations/axolotl/axolotl_ranks.py KIND RESULTS CONFIG...

Each rank trains the configurations one after the other, as `axolotl train CONFIG` does in a rank,
and writes RESULTS-RANK.json. KIND is a key of `KINDS` in `support/sharding_kinds.py`, or "ep" or
"ep-fsdp2" for expert parallelism.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import traceback
from pathlib import Path


def main(kind, results, *configs):
    import torch

    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    from support import sharding_kinds

    if kind.startswith("zero"):
        os.environ.update(sharding_kinds.KINDS[kind])
        import deepspeed

        deepspeed.ops.__compatible_ops__.clear()  # otherwise it compiles its communication
    # Without a GPU accelerate would count one process, and each rank would train every row.
    sharding_kinds.shard_on_cpus("MULTI_CPU" if kind == "ep" else "MULTI_GPU")
    use_cpus(kind)
    if kind.startswith("ep"):
        move_tokens_on_cpus()
    if kind == "ep":
        log_the_norm_of_all_experts()
    found = {}
    for config in configs:
        gc.freeze()  # trainers collect garbage often; frozen objects are not scanned
        try:
            found[Path(config).stem] = train(kind, config)
        except ValueError as error:  # also StarDSSError
            traceback.print_exc()
            found[Path(config).stem] = {"error": f"{type(error).__name__}: {error}"}
        sharding_kinds.reset()
    Path(f"{results}-{os.environ['RANK']}.json").write_text(json.dumps(found))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def use_cpus(kind):
    """Keep Axolotl from using GPUs, and from operations that gloo does not have."""
    import axolotl.train
    import bitsandbytes.nn.modules
    import torch
    from accelerate import ParallelismConfig
    from axolotl.loaders import ModelLoader

    build, place = ParallelismConfig.build_device_mesh, ModelLoader._set_device_map_config
    ParallelismConfig.build_device_mesh = lambda self, device: build(self, "cpu")

    def place_on_cpu(self):
        self.cfg.device_map = {"": "cpu"}  # instead of the rank's GPU
        place(self)
        if "device_map" in self.model_kwargs:  # with QLoRA and FSDP again the rank's GPU
            self.model_kwargs["device_map"] = {"": "cpu"}

    ModelLoader._set_device_map_config = place_on_cpu
    torch.cuda.can_device_access_peer = lambda *devices: True  # Axolotl 0.21 asks without a GPU
    # Otherwise bitsandbytes packs weights into integers in evaluation; FSDP1 cannot flatten these.
    bitsandbytes.nn.modules.has_avx512bf16 = lambda: False
    axolotl.train.cleanup_distributed = lambda: None  # the next configuration needs the group
    if kind == "fsdp1":  # torch crashes when it gathers the state on gloo, also without STAR-DSS
        axolotl.train.save_trained_model = lambda *args: None


def move_tokens_on_cpus():
    """Let Axolotl distribute experts over gloo ranks, and compute them in float32."""
    os.environ["AXOLOTL_EP_NO_BARRIER"] = "1"  # it synchronizes GPUs
    sys.path.insert(0, str(Path(__file__).with_name("stand_ins")))
    import torch
    from axolotl.integrations.expert_parallel import experts_fn, shard
    from axolotl.monkeypatch.accelerate import fsdp2

    class Like:
        """A module in which a few names have other values."""

        def __init__(self, module, **others):
            self.__dict__.update(others, module=module)

        def __getattr__(self, name):
            return getattr(self.module, name)

    experts_fn.torch = Like(torch, bfloat16=torch.float32)  # what it casts tokens to

    def device(kind, *number):
        return torch.device("cpu" if kind == "cuda" else kind)

    shard.torch = Like(torch, device=device, cuda=Like(torch.cuda, current_device=int))
    fsdp2.torch = Like(torch, device=device)


def log_the_norm_of_all_experts():
    """Log and clip by the norm of all experts; without FSDP Axolotl takes those of one rank."""
    import torch
    from accelerate import Accelerator

    def norm(self, parameters, *args, **kwargs):
        own = {
            id(parameter)
            for model in self._models
            for module in model.modules()
            if hasattr(module, "num_experts_global")
            for parameter in module.parameters()
        }
        squares = torch.zeros(2)
        for parameter in parameters:
            if parameter.grad is not None:
                squares[int(id(parameter) in own)] += parameter.grad.square().sum()
        torch.distributed.all_reduce(squares[1:])
        return squares.sum().sqrt()

    Accelerator.clip_grad_norm_ = norm


def experts_held(model):
    """Return the share of the experts' weights that this rank holds."""
    shares = []
    for module in model.modules():
        if (whole := getattr(module, "num_experts_global", None)) is not None:
            held = getattr(module.down_proj, "_local_tensor", module.down_proj)
            shares.append(held.numel() / (whole * module.down_proj[0].numel()))
    assert shares
    return max(shares)


def train(kind, config):
    """Train as the command does; return its log and the share of the model on this rank."""
    import axolotl.train
    import axolotl.utils.distributed
    import transformers
    from axolotl.cli import train as command
    from axolotl.integrations.base import PluginManager
    from support import sharding_kinds

    found = {}
    inner = axolotl.train.train

    def keep(**kwargs):
        made = inner(**kwargs)
        trainer = made[2]
        history = trainer.state.log_history
        found["logs"] = [
            (line["step"], line["loss"], line["grad_norm"])
            for line in history
            if "grad_norm" in line
        ]
        found["evaluations"] = [line["eval_loss"] for line in history if "eval_loss" in line]
        found["kl"] = [line["star_dss/kl"] for line in history if "star_dss/kl" in line]
        found["shaped"] = trainer.star_dss_state.shaped
        if kind.startswith("ep"):
            found["sharded"] = experts_held(trainer.model)
        else:
            found["sharded"] = sharding_kinds.proof_of_sharding(kind, trainer)
        return made

    axolotl.utils.distributed.distributed_state = None  # as in a process that begins
    PluginManager.get_instance().plugins.clear()
    transformers.set_seed(1)  # a new adapter is drawn before the Trainer sets its seed
    command.train = keep
    command.do_cli(config=config)
    return found


if __name__ == "__main__":
    main(*sys.argv[1:])
