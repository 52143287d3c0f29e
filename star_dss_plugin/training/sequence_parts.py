"""Train where each process has a part of every row: DeepSpeed's Ulysses sequence parallelism.

accelerate's `sp_size` makes groups of processes. DeepSpeed cuts every (batch, seq) tensor of a
training batch into as many parts, one for each process of a group, after it has moved the labels by
one token (`shift_labels`); attention exchanges parts, so that every token sees those before it.
Scores and the reference's log-probabilities are moved the same way before the cut. Evaluations read
whole rows, each process its own, with attention as usual.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.mixtral import modeling_mixtral

from star_dss_plugin.data.columns import MOVED_COLUMNS, REF_COLUMN, SCORES_COLUMN
from star_dss_plugin.errors import DataError
from star_dss_plugin.logprobs import IGNORE_INDEX
from star_dss_plugin.training.head import causal_lm

__all__ = [
    "PartsCollator",
    "balances_experts",
    "balancing",
    "exchanging",
    "fixed_length",
    "framed",
    "group_of_parts",
    "is_part",
    "one_pass",
    "own_tokens",
    "padded",
    "part_of",
    "parts_per_row",
    "trained_tokens",
]

_PADDING = {"attention_mask": 0, "labels": IGNORE_INDEX, SCORES_COLUMN: 1.0, REF_COLUMN: 0.0}


def parts_per_row(accelerator: Any) -> int:
    """Return into how many parts DeepSpeed cuts each row; 1: none is cut."""
    parallelism = getattr(accelerator, "parallelism_config", None)
    return int(getattr(parallelism, "sp_size", None) or 1)


def group_of_parts() -> Any:
    """Return the processes that share each row with this one."""
    from deepspeed.utils import groups

    return groups._get_sequence_parallel_group()


def fixed_length(accelerator: Any) -> int | None:
    """Return the length that DeepSpeed wants every whole batch to have; None: each has its own."""
    handler: Any = getattr(getattr(accelerator, "parallelism_config", None), "sp_handler", None)
    if getattr(handler, "sp_seq_length_is_variable", True):
        return None
    return int(handler.sp_seq_length)


class PartsCollator:
    """Make batches that can be cut into parts, and can be read whole, too.

    Rows are padded on the right to a multiple of the parts' number. The columns of STAR-DSS are
    added a second time, moved by one token as DeepSpeed moves labels.

    Args:
        inner: Makes a batch with `star_scores`.
        size: Parts of a row.
        pad_token_id: For `input_ids`.
        length: Of every batch; None: of its longest row.
    """

    def __init__(
        self,
        inner: Callable[[list[Any]], Mapping[str, Any]],
        size: int,
        pad_token_id: int,
        length: int | None = None,
    ) -> None:
        self.inner = inner
        self.size = size
        self.pad_token_id = pad_token_id
        self.length = length

    def __call__(self, features: Sequence[Any]) -> dict[str, Any]:
        """Return a batch of rows.

        Raises:
            DataError: Rows are joined, padded on the left, or longer than a fixed length.
        """
        batch = dict(self.inner(list(features)))
        _check_alone(batch)
        tokens = batch["input_ids"].shape[1]
        length = self.length or -(-tokens // self.size) * self.size
        if tokens > length:
            raise DataError(
                f"A batch has rows of {tokens} tokens, and sp_seq_length is {length}, for which "
                f"attention is set up (sp_seq_length_is_variable=False). Cut rows with max_length="
                f"{length} (and let the data collator pad to no more), raise sp_seq_length, or "
                "set sp_seq_length_is_variable=True."
            )
        batch = padded(batch, length, self.pad_token_id)
        batch["position_ids"] = torch.arange(length).repeat(len(batch["input_ids"]), 1)
        return batch | {
            moved: _moved(batch[name], _PADDING[name])
            for name, moved in MOVED_COLUMNS.items()
            if name in batch
        }


def padded(batch: Mapping[str, Any], length: int, pad_token_id: int = 0) -> dict[str, Any]:
    """Return a batch whose rows are padded on the right to a length."""
    more = length - batch["input_ids"].shape[1]
    paddings = {"input_ids": pad_token_id, **_PADDING}
    return {
        name: F.pad(column, (0, more), value=paddings[name]) if name in paddings else column
        for name, column in batch.items()
    }


def _check_alone(batch: Mapping[str, Any]) -> None:
    mask, positions = batch.get("attention_mask"), batch.get("position_ids")
    alone = mask is not None and mask.dim() == 2 and bool((mask[:, 1:] <= mask[:, :-1]).all())
    if alone and positions is not None:
        alone = bool(((positions == torch.arange(positions.shape[1])) | (mask == 0)).all())
    if not alone:
        raise DataError(
            "sp_size gives each process a part of every row, for which rows must not be joined, "
            "and must be padded on the right: attention takes no mask then. The data collator's "
            "batches are not like that. Use one that pads on the right and returns an "
            "attention_mask (tokenizer.padding_side='right'), or set sp_size=1."
        )


def _moved(column: Tensor, padding: float) -> Tensor:
    return F.pad(column[:, 1:], (0, 1), value=padding)


def part_of(batch: Mapping[str, Tensor], size: int, index: int) -> dict[str, Tensor]:
    """Return a part of a whole batch, as DeepSpeed cuts it.

    Args:
        batch: Of `PartsCollator`, or one with other `star_scores`.
        size: Parts of a row.
        index: Which of them.
    """
    rows, tokens = batch["input_ids"].shape
    length = tokens // size
    cut = slice(index * length, (index + 1) * length)
    whole = {name: batch[name] for name in ("input_ids", "attention_mask")}
    whole["position_ids"] = torch.arange(tokens, device=batch["input_ids"].device).repeat(rows, 1)
    whole["shift_labels"] = _moved(batch["labels"], IGNORE_INDEX)
    for name, moved in MOVED_COLUMNS.items():
        if name in batch:
            whole[moved] = _moved(batch[name], _PADDING[name])
    return {name: column[:, cut].contiguous() for name, column in whole.items()}


def is_part(batch: Mapping[str, Any]) -> bool:
    """Return whether a batch holds parts of rows."""
    return "shift_labels" in batch and "labels" not in batch


def framed(part: Mapping[str, Any]) -> dict[str, Any]:
    """Return labels and columns of a part as whole rows have them: one more stands in front.

    What is made of them and shifted then belongs to the part's own positions, to the last one.
    """
    names = {"labels": "shift_labels", **MOVED_COLUMNS}
    return {
        name: F.pad(part[moved], (1, 0), value=_PADDING[name])
        for name, moved in names.items()
        if moved in part
    }


def trained_tokens(
    batches: Sequence[Mapping[str, Any]], device: torch.device | str, group: Any = None
) -> Tensor:
    """Return the number of trained tokens in the batches of several processes.

    Args:
        batches: Of this process.
        device: Where it computes.
        group: Those whose tokens count; all of them must call this. None: all that there are.
    """
    total = own_tokens(batches, device)
    torch.distributed.all_reduce(total, group=group)
    return total


def own_tokens(batches: Sequence[Mapping[str, Any]], device: torch.device | str) -> Tensor:
    """Return the number of trained tokens in the batches of this process alone."""
    targets = [b["shift_labels"] if is_part(b) else b["labels"][:, 1:] for b in batches]
    return torch.stack([(labels != IGNORE_INDEX).sum() for labels in targets]).sum().to(device)


def one_pass(loader: Iterator[Any]) -> Iterator[Any]:
    """Yield the batches of one pass over what DeepSpeed's loader cuts.

    It says once that a pass has ended, and then goes on with the next: to someone who counts
    batches, as transformers does where it can, it says so at the beginning of the next pass.
    """
    first = next(loader, None)
    if first is None:
        first = next(loader, None)
    if first is not None:
        yield first
        yield from loader


_BALANCE = "load_balancing_loss_func"
"""What transformers calls in each module of a model with experts, and TRL in Mixtral's."""


def balances_experts(model: Any) -> bool:
    """Return whether the load-balancing loss of a model's experts can be made of all parts."""
    return hasattr(sys.modules[type(causal_lm(model)).__module__], _BALANCE)


@contextlib.contextmanager
def balancing(model: Any) -> Iterator[None]:
    """Let the load-balancing loss of experts be that of whole rows, in each process.

    It multiplies means over tokens, so that those of parts do not add up to it.

    Args:
        model: Whose experts they are.
    """
    usual = {
        module: getattr(module, _BALANCE)
        for module in {sys.modules[type(causal_lm(model)).__module__], modeling_mixtral}
        if hasattr(module, _BALANCE)
    }

    def whole(function: Callable[..., Any]) -> Callable[..., Any]:
        def loss(
            gate_logits: Any, num_experts: Any = None, top_k: Any = 2, attention_mask: Any = None
        ) -> Any:
            gathered = tuple(_of_all_parts(logits) for logits in gate_logits)
            mask = None if attention_mask is None else _of_all_parts(attention_mask)
            found = function(gathered, num_experts, top_k, mask)
            # Gradients are averaged over processes, of which each has those of its part.
            size = torch.distributed.get_world_size(group_of_parts())
            return found + (size - 1) * (found - found.detach())

        return loss

    for module, function in usual.items():
        setattr(module, _BALANCE, whole(function))
    try:
        yield
    finally:
        for module, function in usual.items():
            setattr(module, _BALANCE, function)


def _of_all_parts(column: Tensor) -> Tensor:
    """Return the tokens of all parts; gradients pass through this process's own alone."""
    group, own = group_of_parts(), column.detach().contiguous()
    parts = [torch.empty_like(own) for _ in range(torch.distributed.get_world_size(group))]
    torch.distributed.all_gather(parts, own, group=group)
    parts[torch.distributed.get_rank(group)] = column
    return torch.cat(parts)


@contextlib.contextmanager
def exchanging(model: Any) -> Iterator[None]:
    """Let attention exchange parts also in modules that do not train, as a reference's do not.

    accelerate has DeepSpeed leave the exchange out there, for evaluations, which read whole rows.

    Args:
        model: Whose kind of attention it is.
    """
    kind = model.config._attn_implementation
    usual = ALL_ATTENTION_FUNCTIONS[kind]

    def attend(module: Any, *args: Any, **kwargs: Any) -> Any:
        training = module.training
        module.training = True  # dropout is among the arguments already
        try:
            return usual(module, *args, **kwargs)
        finally:
            module.training = training

    ALL_ATTENTION_FUNCTIONS[kind] = attend
    try:
        yield
    finally:
        ALL_ATTENTION_FUNCTIONS[kind] = usual
