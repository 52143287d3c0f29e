"""Train where each process has a part of every row: DeepSpeed's Ulysses sequence parallelism.

accelerate's `sp_size` makes groups of processes. DeepSpeed cuts every (batch, seq) tensor of a
training batch into as many parts, one for each process of a group, after it has moved the labels by
one token (`shift_labels`); attention exchanges parts, so that every token sees those before it.
Scores and the reference's log-probabilities are moved the same way before the cut. Evaluations read
whole rows, each process its own, with attention as usual.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from accelerate.utils import DistributedType
from datasets import IterableDataset
from torch import Tensor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from star_dss_plugin.data.columns import MOVED_COLUMNS, REF_COLUMN, SCORES_COLUMN
from star_dss_plugin.errors import ConfigError, DataError
from star_dss_plugin.logprobs import IGNORE_INDEX

__all__ = [
    "PartsCollator",
    "check_resuming",
    "exchanging",
    "framed",
    "is_part",
    "part_of",
    "parts_per_row",
    "refused_with_parts",
    "trained_tokens",
]

_PADDING = {"attention_mask": 0, "labels": IGNORE_INDEX, SCORES_COLUMN: 1.0, REF_COLUMN: 0.0}


def parts_per_row(accelerator: Any) -> int:
    """Return into how many parts DeepSpeed cuts each row; 1: none is cut."""
    parallelism = getattr(accelerator, "parallelism_config", None)
    return int(getattr(parallelism, "sp_size", None) or 1)


def refused_with_parts(trainer: Any) -> list[tuple[Any, str, str]]:
    """Return what cannot go with rows in parts: whether it is there, why, and what to change."""
    size, args = parts_per_row(trainer.accelerator), trainer.args
    if size == 1:
        return []
    config = trainer.model.config.get_text_config()
    layers = set(getattr(config, "layer_types", None) or ["full_attention"])
    window = getattr(config, "sliding_window", None) is not None
    window = window and getattr(config, "use_sliding_window", True)
    evaluated = trainer.eval_dataset
    sets = [trainer.train_dataset]
    sets += evaluated.values() if isinstance(evaluated, dict) else [evaluated]
    handler = trainer.accelerator.parallelism_config.sp_handler
    packing = any(getattr(args, name, False) for name in ("packing", "padding_free"))
    what = f"sp_size is {size}, and each process has a part of every row"
    without = "or switch sequence parallelism off (sp_size=1)"
    return [
        (
            not trainer.trains_parts,
            f"{what}, which was not tried in {type(trainer).__name__}",
            f"Use StarDSSTrainer, or attach to a plain Trainer, {without}",
        ),
        (
            trainer.accelerator.distributed_type != DistributedType.DEEPSPEED,
            f"{what}, but DeepSpeed, which cuts rows, is not on",
            f"Give accelerate a DeepSpeed configuration, {without}",
        ),
        (
            not _averages_gradients(trainer.accelerator),
            f"{what}; DeepSpeed (tried: 0.19.8) then makes gradients {size} times as large as "
            "they are, unless it is ZeRO-3 that scatters them, in full precision",
            "Set zero_stage to 3, reduce_scatter to true and zero_quantized_gradients to false, "
            f"{without}",
        ),
        (
            packing or (getattr(args, "eval_packing", None) or False),
            f"{what}; its attention takes no mask, so that documents that are joined into one row "
            "would see each other",
            f"Set packing and padding_free to false, {without}",
        ),
        (
            layers != {"full_attention"} or window,
            f"{what}; its attention takes no mask, so that layers that see a window of tokens "
            "would see all of them",
            f"Use a model with full attention in every layer, {without}",
        ),
        (
            getattr(config, "output_router_logits", False),
            f"{what}, but the load-balancing loss of experts is made of whole rows",
            f"Set router_aux_loss_coef=0, {without}",
        ),
        (
            trainer.media_rows() is not None or any(isinstance(s, IterableDataset) for s in sets),
            f"{what}, which was tried with data sets of tokens alone",
            f"Give data sets of text that are no streams, {without}",
        ),
        (
            not args.average_tokens_across_devices,
            f"{what}, so that the tokens of a row can be counted over all processes only",
            f"Set average_tokens_across_devices to true, {without}",
        ),
        (
            not getattr(handler, "sp_seq_length_is_variable", True),
            f"{what}, and sp_seq_length asks that all batches have one length",
            f"Set sp_seq_length_is_variable to true, {without}",
        ),
    ]


def check_resuming(trainer: Any) -> None:
    """Refuse to resume where the rows that a run has read cannot be skipped.

    Raises:
        ConfigError: Rows are in parts, and they shall be.
    """
    if parts_per_row(trainer.accelerator) > 1 and not trainer.args.ignore_data_skip:
        raise ConfigError(
            "A run with sequence parallelism (sp_size) is to be resumed, but the loader with which "
            "DeepSpeed cuts rows can neither skip the rows that were read nor find the order of a "
            "later pass. Set ignore_data_skip=True, which begins with the first pass again and "
            "keeps weights, optimizer and schedule."
        )


def _averages_gradients(accelerator: Any) -> bool:
    """Return whether DeepSpeed averages gradients over all processes, as losses are averaged.

    Elsewhere it divides their sum by the number of groups.
    """
    plugin = getattr(accelerator.state, "deepspeed_plugin", None)
    if plugin is None:
        return False
    zero = plugin.deepspeed_config.get("zero_optimization", {})
    scatters = zero.get("reduce_scatter", True) and not zero.get("zero_quantized_gradients", False)
    return plugin.zero_stage == 3 and bool(scatters)


class PartsCollator:
    """Make batches that can be cut into parts, and can be read whole, too.

    Rows are padded on the right to a multiple of the parts' number. The columns of STAR-DSS are
    added a second time, moved by one token as DeepSpeed moves labels.

    Args:
        inner: Makes a batch with `star_scores`.
        size: Parts of a row.
        pad_token_id: For `input_ids`.
    """

    def __init__(
        self, inner: Callable[[list[Any]], Mapping[str, Any]], size: int, pad_token_id: int
    ) -> None:
        self.inner = inner
        self.size = size
        self.padding = {"input_ids": pad_token_id, **_PADDING}

    def __call__(self, features: Sequence[Any]) -> dict[str, Any]:
        """Return a batch of rows.

        Raises:
            DataError: Rows are joined, or padded on the left.
        """
        batch = dict(self.inner(list(features)))
        _check_alone(batch)
        more = -batch["input_ids"].shape[1] % self.size
        for name, padding in self.padding.items():
            if name in batch:
                batch[name] = F.pad(batch[name], (0, more), value=padding)
        rows, length = batch["input_ids"].shape
        batch["position_ids"] = torch.arange(length).repeat(rows, 1)
        return batch | {
            moved: _moved(batch[name], _PADDING[name])
            for name, moved in MOVED_COLUMNS.items()
            if name in batch
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
    length = batch["input_ids"].shape[1] // size
    cut = slice(index * length, (index + 1) * length)
    kept = ("input_ids", "attention_mask", "position_ids")
    whole = {name: batch[name] for name in kept}
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


def trained_tokens(batches: Sequence[Mapping[str, Any]], accelerator: Any) -> Tensor:
    """Return the number of trained tokens in the batches of all processes; all must call this."""
    targets = [b["shift_labels"] if is_part(b) else b["labels"][:, 1:] for b in batches]
    counts = [(labels != IGNORE_INDEX).sum() for labels in targets]
    total: Tensor = accelerator.reduce(torch.stack(counts).sum().to(accelerator.device), "sum")
    return total


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
