"""Support sequence parallelism (DeepSpeed Ulysses), where each process holds a part of every row.

accelerate's `sp_size` sets the size of a sequence-parallel group. DeepSpeed's data loader shifts
the labels by one token (`shift_labels`) and then splits every (batch, seq) tensor of a training
batch along its tokens, one part per process of the group; an all-to-all in attention lets every
token attend to all tokens before it. Scores and reference log-probabilities are shifted in the same
way before the split. Evaluation is not split: each process reads whole rows of its own.
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

from star_dss_plugin.data.columns import REF_COLUMN, SCORES_COLUMN, SHIFTED_COLUMNS
from star_dss_plugin.errors import DataError
from star_dss_plugin.logprobs import IGNORE_INDEX
from star_dss_plugin.training.head import causal_lm

__all__ = [
    "SequenceParallelCollator",
    "balancing_over_group",
    "can_balance_over_group",
    "exchanging_in_eval",
    "fixed_length",
    "is_part",
    "one_epoch",
    "own_tokens",
    "pad_batch",
    "sequence_parallel_group",
    "sequence_parallel_size",
    "slice_for_rank",
    "trained_tokens",
    "unshifted",
]

_PADDING = {"attention_mask": 0, "labels": IGNORE_INDEX, SCORES_COLUMN: 1.0, REF_COLUMN: 0.0}


def sequence_parallel_size(accelerator: Any) -> int:
    """Return the size of a sequence-parallel group (accelerate's `sp_size`), 1 if there is none."""
    parallelism = getattr(accelerator, "parallelism_config", None)
    return int(getattr(parallelism, "sp_size", None) or 1)


def sequence_parallel_group() -> Any:
    """Return the process group whose members hold the parts of this process's rows."""
    from deepspeed.utils import groups

    return groups._get_sequence_parallel_group()


def fixed_length(accelerator: Any) -> int | None:
    """Return `sp_seq_length`, the length of every unsplit batch; None if lengths may vary."""
    handler: Any = getattr(getattr(accelerator, "parallelism_config", None), "sp_handler", None)
    if getattr(handler, "sp_seq_length_is_variable", True):
        return None
    return int(handler.sp_seq_length)


class SequenceParallelCollator:
    """Collate rows into batches that DeepSpeed can split along their tokens.

    Rows are padded on the right to a multiple of the group's size. The columns of STAR-DSS are
    added a second time under other names, shifted by one token as DeepSpeed shifts labels.

    Args:
        inner: The data collator; its batches have `star_scores`.
        size: Size of the sequence-parallel group.
        pad_token_id: Padding of `input_ids`.
        length: Length of every batch; None: that of its longest row, rounded up.
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
        """Return a padded batch with `position_ids` and the shifted columns.

        Raises:
            DataError: Rows are packed, padded on the left, or longer than the fixed length.
        """
        batch = dict(self.inner(list(features)))
        _check_unpacked(batch)
        tokens = batch["input_ids"].shape[1]
        length = self.length or -(-tokens // self.size) * self.size
        if tokens > length:
            raise DataError(
                f"A batch has rows of {tokens} tokens, and sp_seq_length is {length}, for which "
                f"attention is set up (sp_seq_length_is_variable=False). Cut rows with max_length="
                f"{length} (and let the data collator pad to no more), raise sp_seq_length, or "
                "set sp_seq_length_is_variable=True."
            )
        batch = pad_batch(batch, length, self.pad_token_id)
        batch["position_ids"] = torch.arange(length).repeat(len(batch["input_ids"]), 1)
        return batch | {
            shifted: _shifted(batch[name], _PADDING[name])
            for name, shifted in SHIFTED_COLUMNS.items()
            if name in batch
        }


def pad_batch(batch: Mapping[str, Any], length: int, pad_token_id: int = 0) -> dict[str, Any]:
    """Pad a batch's token columns on the right to a length."""
    more = length - batch["input_ids"].shape[1]
    paddings = {"input_ids": pad_token_id, **_PADDING}
    return {
        name: F.pad(column, (0, more), value=paddings[name]) if name in paddings else column
        for name, column in batch.items()
    }


def _check_unpacked(batch: Mapping[str, Any]) -> None:
    """Check that a batch has one document per row, padded on the right."""
    mask, positions = batch.get("attention_mask"), batch.get("position_ids")
    valid = mask is not None and mask.dim() == 2 and bool((mask[:, 1:] <= mask[:, :-1]).all())
    if valid and positions is not None:
        valid = bool(((positions == torch.arange(positions.shape[1])) | (mask == 0)).all())
    if not valid:
        raise DataError(
            "sp_size gives each process a part of every row, for which rows must not be joined, "
            "and must be padded on the right: attention takes no mask then. The data collator's "
            "batches are not like that. Use one that pads on the right and returns an "
            "attention_mask (tokenizer.padding_side='right'), or set sp_size=1."
        )


def _shifted(column: Tensor, padding: float) -> Tensor:
    return F.pad(column[:, 1:], (0, 1), value=padding)


def slice_for_rank(batch: Mapping[str, Tensor], size: int, index: int) -> dict[str, Tensor]:
    """Return the part of a batch that DeepSpeed gives to one process of the group.

    Args:
        batch: An unsplit batch of `SequenceParallelCollator`; its shifted columns are made anew.
        size: Size of the sequence-parallel group.
        index: Rank within the group.
    """
    rows, tokens = batch["input_ids"].shape
    length = tokens // size
    cut = slice(index * length, (index + 1) * length)
    whole = {name: batch[name] for name in ("input_ids", "attention_mask")}
    whole["position_ids"] = torch.arange(tokens, device=batch["input_ids"].device).repeat(rows, 1)
    whole["shift_labels"] = _shifted(batch["labels"], IGNORE_INDEX)
    for name, shifted in SHIFTED_COLUMNS.items():
        if name in batch:
            whole[shifted] = _shifted(batch[name], _PADDING[name])
    return {name: column[:, cut].contiguous() for name, column in whole.items()}


def is_part(batch: Mapping[str, Any]) -> bool:
    """Return whether a batch holds parts of rows, which have shifted labels alone."""
    return "shift_labels" in batch and "labels" not in batch


def unshifted(part: Mapping[str, Any]) -> dict[str, Any]:
    """Undo the shift of a part's labels and columns by prepending one untrained position.

    The loss drops the first position of labels, scores and reference as it does for whole rows;
    what remains belongs to the predictions at the part's own positions, including the last.

    Returns:
        `labels`, `star_scores` and `ref_logps`, (batch, part + 1) each, where the part has them.
    """
    names = {"labels": "shift_labels", **SHIFTED_COLUMNS}
    return {
        name: F.pad(part[shifted], (1, 0), value=_PADDING[name])
        for name, shifted in names.items()
        if shifted in part
    }


def trained_tokens(
    batches: Sequence[Mapping[str, Any]], device: torch.device | str, group: Any = None
) -> Tensor:
    """Return the number of trained tokens in the batches of a process group, by an all-reduce.

    Args:
        batches: This process's batches, of parts or of whole rows.
        device: This process's device.
        group: The process group, every member of which must call this; None: all processes.
    """
    total = own_tokens(batches, device)
    torch.distributed.all_reduce(total, group=group)
    return total


def own_tokens(batches: Sequence[Mapping[str, Any]], device: torch.device | str) -> Tensor:
    """Return the number of trained tokens in the batches of this process alone."""
    targets = [b["shift_labels"] if is_part(b) else b["labels"][:, 1:] for b in batches]
    return torch.stack([(labels != IGNORE_INDEX).sum() for labels in targets]).sum().to(device)


def one_epoch(loader: Iterator[Any]) -> Iterator[Any]:
    """Yield the batches of one epoch from DeepSpeed's sequence-parallel loader.

    That loader raises StopIteration once per epoch and then goes on with the next epoch.
    transformers stops after a counted number of batches, so it meets an epoch's StopIteration only
    when it asks for the first batch of the next one.
    """
    first = next(loader, None)
    if first is None:  # the end of the epoch before
        first = next(loader, None)
    if first is not None:
        yield first
        yield from loader


_BALANCE = "load_balancing_loss_func"
"""The function for the load-balancing loss in transformers' modules of mixture-of-experts models.

A model calls the one of its own module; TRL calls Mixtral's for every model.
"""


def can_balance_over_group(model: Any) -> bool:
    """Return whether `balancing_over_group` can replace a model's load-balancing loss."""
    return hasattr(sys.modules[type(causal_lm(model)).__module__], _BALANCE)


@contextlib.contextmanager
def balancing_over_group(model: Any) -> Iterator[None]:
    """Compute the load-balancing loss of experts over the tokens of the whole group, for a while.

    The loss multiplies two means over tokens, so the losses of parts do not average to that of the
    whole rows.

    Args:
        model: The mixture-of-experts model.
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
            gathered = tuple(_gathered(logits) for logits in gate_logits)
            mask = None if attention_mask is None else _gathered(attention_mask)
            found = function(gathered, num_experts, top_k, mask)
            # Each process has the gradient of its own part alone, and DeepSpeed averages over
            # processes where these must be summed: so the gradient, not the value, times `size`.
            size = torch.distributed.get_world_size(sequence_parallel_group())
            return found + (size - 1) * (found - found.detach())

        return loss

    for module, function in usual.items():
        setattr(module, _BALANCE, whole(function))
    try:
        yield
    finally:
        for module, function in usual.items():
            setattr(module, _BALANCE, function)


def _gathered(column: Tensor) -> Tensor:
    """Gather a column from the group, with gradients through this process's own part alone."""
    group, own = sequence_parallel_group(), column.detach().contiguous()
    parts = [torch.empty_like(own) for _ in range(torch.distributed.get_world_size(group))]
    torch.distributed.all_gather(parts, own, group=group)
    parts[torch.distributed.get_rank(group)] = column
    return torch.cat(parts)


@contextlib.contextmanager
def exchanging_in_eval(model: Any) -> Iterator[None]:
    """Make attention exchange parts in eval mode, too, for a while, as the reference needs it.

    accelerate tells DeepSpeed to leave the exchange out in eval mode, because evaluations read
    whole rows.

    Args:
        model: The model whose attention implementation is meant.
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
