"""Run a model before FSDP or DeepSpeed shards it, and coordinate decisions over all ranks.

Before the first step a rank holds one of these:

- the whole model (FSDP, ZeRO-1 and -2);
- a shard of each parameter (ZeRO-3, which partitions parameters as they load);
- no weights (FSDP with `cpu_ram_efficient_loading`: only each machine's first rank reads them; the
  others hold meta tensors or, up to transformers 5.16 at least, zeros).
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import torch
from accelerate.utils import DistributedType, gather_object
from torch import nn
from torch.distributed.fsdp import FSDPModule

from star_dss_plugin.errors import StarDSSError
from star_dss_plugin.models.fingerprints import is_partitioned, model_fingerprint
from star_dss_plugin.scoring.ranks import SINGLE_PROCESS, Share, explain_barrier_errors, share_of

__all__ = ["Ranks", "reshard", "runnable"]

T = TypeVar("T")


def _sharding_of(accelerator: Any, loaded: bool) -> str | None:
    """Name what shards the parameters during training, for messages; None if nothing does.

    Args:
        accelerator: The trainer's accelerator.
        loaded: Whether transformers applied FSDP2 when it loaded the model.
    """
    if loaded:
        return "FSDP2"
    if accelerator.distributed_type == DistributedType.FSDP:
        return f"FSDP{getattr(accelerator.state.fsdp_plugin, 'fsdp_version', 1)}"
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        return "DeepSpeed ZeRO-3" if accelerator.state.deepspeed_plugin.zero_stage == 3 else None
    return None


@contextlib.contextmanager
def runnable(model: nn.Module, accelerator: Any) -> Iterator[None]:
    """Make a model runnable before the trainer wraps it: on its device, partitions gathered.

    All ranks must enter; with ZeRO-3 all must then run equally many forward passes.

    Args:
        model: The trained model, unwrapped.
        accelerator: The trainer's accelerator.

    Raises:
        StarDSSError: The whole model does not fit on the device.
    """
    if is_partitioned(model):
        with _zero3_engine(model, accelerator):
            yield
        return
    # FSDP and DeepSpeed leave a model on the CPU until they shard it.
    device = next(model.parameters()).device
    waits = device.type == "cpu" and accelerator.device.type != "cpu"
    placed = accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED)
    if not (waits and placed) or any(parameter.is_meta for parameter in model.parameters()):
        yield
        return
    try:
        model.to(accelerator.device)
        yield
    except torch.OutOfMemoryError as error:
        raise StarDSSError(
            "The model does not fit on one device, where its log-probabilities as the reference "
            "are computed before training shards it. Load it with DeepSpeed ZeRO-3, which shards "
            "it from the start, or train an adapter with reference='adapter'."
        ) from error
    finally:
        model.to(device)


@contextlib.contextmanager
def _zero3_engine(model: nn.Module, accelerator: Any) -> Iterator[None]:
    """Wrap a partitioned model in a DeepSpeed engine without an optimizer, for forward passes."""
    import deepspeed

    config = copy.deepcopy(accelerator.state.deepspeed_plugin.deepspeed_config)
    config["zero_optimization"].pop("offload_optimizer", None)
    for name in ("optimizer", "scheduler"):
        config.pop(name, None)
    # The trainer fills "auto" in when training begins; no forward pass depends on these settings.
    config["train_micro_batch_size_per_gpu"] = 1
    for name in ("train_batch_size", "gradient_accumulation_steps", "gradient_clipping"):
        config.pop(name, None)
    for name, value in list(config["zero_optimization"].items()):
        if value == "auto":
            del config["zero_optimization"][name]
    for name in ("bf16", "fp16"):
        if isinstance(config.get(name), dict) and config[name].get("enabled") == "auto":
            config[name] = {"enabled": accelerator.mixed_precision == name}
    training = model.training
    engine, *_ = deepspeed.initialize(model=model, config=config)
    try:
        yield
    finally:
        engine.optimizer.partition_all_parameters()
        engine.destroy()
        model.train(training)


def reshard(model: nn.Module) -> None:
    """Free the parameters that FSDP2 keeps gathered after a forward pass without a backward pass.

    An optimizer that is made while they are gathered would hold these copies, and train no shard.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def _has_weights(model: nn.Module) -> bool:
    """Return whether this rank holds a model's weights, or with ZeRO-3 its shard of them."""
    if any(parameter.is_meta for parameter in model.parameters()):
        return False
    if is_partitioned(model):
        return True
    embeddings = getattr(model, "get_input_embeddings", lambda: None)()
    weight = getattr(embeddings, "weight", None)
    # A rank without weights may have zeros. Embeddings, because a new adapter's weights are real.
    return not isinstance(weight, torch.Tensor) or bool(weight.any())


@dataclass(frozen=True)
class Ranks:
    """Describe how the ranks of a run hold the trained model before training shards it.

    Attributes:
        share: This process's share of work that the processes of one machine divide.
        gather: Returns a value of every rank, in the order of ranks; every rank must call it.
        device: This rank's device.
        sharding: What shards the parameters during training, for messages; None: nothing.
        collective: Whether a forward pass communicates, so that every rank must run equally many:
            it gathers weights (ZeRO-3, or FSDP2 that transformers applied when it loaded the
            model), exchanges tokens (expert parallelism), or computes a part of each layer (tensor
            parallelism).
        tp_size: Size of a tensor-parallel group. Its ranks are consecutive and must run the same
            rows.
        first_only: Whether only each machine's first rank holds the model's weights.
        has_weights: Whether this rank holds them.
    """

    share: Share = SINGLE_PROCESS
    gather: Callable[[Any], list[Any]] = lambda value: [value]
    device: torch.device | str = "cpu"
    sharding: str | None = None
    collective: bool = False
    tp_size: int = 1
    first_only: bool = False
    has_weights: bool = True

    @classmethod
    def from_accelerator(
        cls, accelerator: Any, model: nn.Module, *, exchange: bool = False, tp_size: int = 1
    ) -> Ranks:
        """Describe the ranks of a trainer's run; every rank must call this.

        Args:
            accelerator: The trainer's accelerator.
            model: The trained model, unwrapped.
            exchange: Whether ranks exchange tokens in every forward pass (expert parallelism).
            tp_size: Size of a tensor-parallel group.
        """

        def gather(value: Any) -> list[Any]:
            if accelerator.num_processes == 1:
                return [value]
            with explain_barrier_errors():
                found: list[Any] = gather_object([value])
            return found

        has_weights = _has_weights(model)
        loaded = any(isinstance(module, FSDPModule) for module in model.modules())
        return cls(
            share_of(accelerator),
            gather,
            accelerator.device,
            _sharding_of(accelerator, loaded),
            collective=exchange or tp_size > 1 or loaded or is_partitioned(model),
            tp_size=tp_size,
            first_only=not all(gather(has_weights)),
            has_weights=has_weights,
        )

    @property
    def can_run(self) -> bool:
        """Whether the model can be run before training shards it.

        It cannot if only the first rank has weights and a forward pass needs the other ranks.
        """
        return not (self.collective and self.first_only)

    def fingerprint(self, model: nn.Module) -> str:
        """Return `model_fingerprint` of a model, the same on every rank; every rank must call this.

        With expert parallelism it covers the experts of all ranks.
        """
        found = self.decide_on_first(lambda: model_fingerprint(model))
        parts = list(dict.fromkeys(self.gather(found))) if self.collective else [found]
        return parts[0] if len(parts) == 1 else hashlib.sha256("".join(parts).encode()).hexdigest()

    def own_part(self, work: Sequence[T]) -> list[T]:
        """Return this rank's share of work, which a tensor-parallel group does together."""
        groups = max(1, self.share.ranks // self.tp_size)
        return list(work[self.share.rank // self.tp_size % groups :: groups])

    def decide_on_first(self, decide: Callable[[], T]) -> T:
        """Return what a function of the model's weights returns, also on ranks without weights.

        If only first ranks hold weights, every rank gets the result of rank 0; else each rank gets
        its own.

        Args:
            decide: The function, called only on ranks that hold weights. Every rank must call
                `decide_on_first`.

        Raises:
            StarDSSError: On every rank, if `decide` raised it on rank 0.
        """
        if not self.first_only:
            return decide()
        found: T | None = None
        error: StarDSSError | None = None
        if self.has_weights:
            try:
                found = decide()
            except StarDSSError as raised:
                error = raised
        found, error = self.gather((found, error))[0]
        if error is not None:
            raise error
        return cast(T, found)

    def check_equal(self, facts: Mapping[str, Any]) -> None:
        """Check that facts are equal on all ranks; every rank must call this.

        Args:
            facts: Comparable, picklable values, by the name for each in an error message.

        Raises:
            StarDSSError: On every rank, if a fact differs.
        """
        given = self.gather(dict(facts))
        for name in dict.fromkeys(name for one in given for name in one):
            values = [one.get(name) for one in given]
            other = next((i for i, value in enumerate(values) if value != values[0]), 0)
            if other:
                raise _apart(name, other)

    def check_close(self, name: str, values: Sequence[float], within: float) -> None:
        """Check that numbers are equal on all ranks up to a tolerance; every rank must call this.

        Args:
            name: Name of the numbers in an error message.
            values: The numbers, equally many on every rank.
            within: Largest allowed absolute difference from rank 0.

        Raises:
            StarDSSError: On every rank, if a number differs by more.
        """
        given = self.gather(list(values))
        for other, found in enumerate(given):
            if any(abs(a - b) > within for a, b in zip(given[0], found, strict=True)):
                raise _apart(name, other)


def _apart(name: str, other: int) -> StarDSSError:
    return StarDSSError(
        f"Training was stopped before the weights changed: rank {other} of this run does not have "
        f"the same {name} as rank 0, so they would train towards different losses. Give every "
        "process the same configuration, the same files and the same packages; a stale copy on one "
        "machine is the usual cause."
    )
