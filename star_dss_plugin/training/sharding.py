"""Sharded models (FSDP, DeepSpeed): run one before training, decide once, and agree on all ranks.

Before the first step a rank may hold the whole model (FSDP, ZeRO-1 and -2), a part of each
parameter (ZeRO-3, whose parameters are partitioned as they load), or no values at all (FSDP with
`cpu_ram_efficient_loading`, where each machine's first rank alone reads the weights; the others
hold parameters without values or, up to transformers 5.16 at least, zeros).
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
from star_dss_plugin.models import is_partitioned, model_fingerprint
from star_dss_plugin.scoring.ranks import ALONE, Share, share_of, waiting

__all__ = ["Ranks", "runnable"]

T = TypeVar("T")


def _sharding_of(accelerator: Any, loaded: bool) -> str | None:
    """Return what shards a run's parameters in training, as messages name it; None: nothing.

    Args:
        accelerator: The trainer's.
        loaded: Whether transformers has sharded them as it loaded the model.
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
    """Let a model be called for a while, before the trainer wraps it and places it.

    All ranks must enter; with ZeRO-3 all must then run equally many forward passes.

    Args:
        model: The trained model, unwrapped.
        accelerator: The trainer's.
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
    """Gather partitioned parameters in forward passes, by an engine without an optimizer."""
    import deepspeed

    config = copy.deepcopy(accelerator.state.deepspeed_plugin.deepspeed_config)
    config["zero_optimization"].pop("offload_optimizer", None)
    for name in ("optimizer", "scheduler"):
        config.pop(name, None)
    # "auto" is filled in when training begins; without an optimizer these change nothing.
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


def _has_weights(model: nn.Module) -> bool:
    """Return whether this rank has a model's values, or the part of them that is its own."""
    if any(parameter.is_meta for parameter in model.parameters()):
        return False
    if is_partitioned(model):
        return True
    embeddings = getattr(model, "get_input_embeddings", lambda: None)()
    weight = getattr(embeddings, "weight", None)
    # Where transformers puts zeros in place of weights, all are 0, and an adapter's are not.
    return not isinstance(weight, torch.Tensor) or bool(weight.any())


@dataclass(frozen=True)
class Ranks:
    """Hold what the processes of a run can do with the trained model before training shards it.

    Attributes:
        share: What this process does of the work that all of its machine do together.
        gather: Returns a value of every rank, in the order of ranks; every rank must call it.
        device: Where this rank computes.
        sharding: What shards the parameters in training, as messages name it; None: nothing.
        together: Whether every rank must run equally many forward passes: each gathers weights
            from all others (ZeRO-3, or FSDP2 that transformers applied as it loaded the model),
            sends them tokens (experts that are spread over ranks), or computes a part of each
            layer (tensor parallelism).
        alike: How many ranks, one after the other, must run them on the same rows: those that share
            each layer.
        first_only: Whether each machine's first rank alone has the model's weights.
        has_weights: Whether this rank has them.
    """

    share: Share = ALONE
    gather: Callable[[Any], list[Any]] = lambda value: [value]
    device: torch.device | str = "cpu"
    sharding: str | None = None
    together: bool = False
    alike: int = 1
    first_only: bool = False
    has_weights: bool = True

    @classmethod
    def of(
        cls, accelerator: Any, model: nn.Module, *, exchange: bool = False, alike: int = 1
    ) -> Ranks:
        """Find it out for a trainer's accelerator and its unwrapped model, on every rank.

        Args:
            accelerator: The trainer's.
            model: The trained model, unwrapped.
            exchange: Whether the ranks send each other tokens in every forward pass.
            alike: The size of the groups of tensor parallelism.
        """

        def gather(value: Any) -> list[Any]:
            if accelerator.num_processes == 1:
                return [value]
            with waiting():
                found: list[Any] = gather_object([value])
            return found

        has_weights = _has_weights(model)
        loaded = any(isinstance(module, FSDPModule) for module in model.modules())
        return cls(
            share_of(accelerator),
            gather,
            accelerator.device,
            _sharding_of(accelerator, loaded),
            together=exchange or alike > 1 or loaded or is_partitioned(model),
            alike=alike,
            first_only=not all(gather(has_weights)),
            has_weights=has_weights,
        )

    @property
    def can_run(self) -> bool:
        """Whether the model can be run before training shards it.

        Not if the first rank, which alone has its weights, needs the others for a forward pass.
        """
        return not (self.together and self.first_only)

    def fingerprint(self, model: nn.Module) -> str:
        """Return `model_fingerprint` of a model, the same on every rank; all must call this.

        Where ranks have experts of their own it covers those of all of them.
        """
        found = self.first_decides(lambda: model_fingerprint(model))
        parts = list(dict.fromkeys(self.gather(found))) if self.together else [found]
        return parts[0] if len(parts) == 1 else hashlib.sha256("".join(parts).encode()).hexdigest()

    def mine(self, work: Sequence[T]) -> list[T]:
        """Return what this rank does of work that is done with the trained model: see `alike`."""
        groups = max(1, self.share.ranks // self.alike)
        return list(work[self.share.rank // self.alike % groups :: groups])

    def first_decides(self, decide: Callable[[], T]) -> T:
        """Return what a function finds out about the model's weights, also where a rank has none.

        Args:
            decide: Called on every rank that has weights; every rank must call this.

        Raises:
            StarDSSError: What `decide` raises on the first rank, on every rank.
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

    def agree(self, facts: Mapping[str, Any]) -> None:
        """Compare facts over all ranks; every rank must call this.

        Args:
            facts: By the name that an error has for it: anything that can be compared and pickled.

        Raises:
            StarDSSError: A fact differs; on every rank.
        """
        given = self.gather(dict(facts))
        for name in dict.fromkeys(name for one in given for name in one):
            values = [one.get(name) for one in given]
            other = next((i for i, value in enumerate(values) if value != values[0]), 0)
            if other:
                raise _apart(name, other)

    def agree_about(self, name: str, values: Sequence[float], within: float) -> None:
        """Compare numbers over all ranks that need not be equal; every rank must call this.

        Args:
            name: What the numbers are of, for the error.
            values: Equally many on every rank.
            within: How far two of them may be apart.

        Raises:
            StarDSSError: They are further apart; on every rank.
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
