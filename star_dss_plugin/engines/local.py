"""Label probabilities from a model in this process, each shared prefix computed once.

Head, trunks and tails (`tree.py`) run one after the other, each attending to the stored keys and
values of what comes before it (`attention.py`), at its true positions. Each query meets the very
keys and values it would meet in a pass over its own prompt, so the result is that pass up to
rounding, whatever the tokenizer merged at a boundary. Models for which this does not hold
(`trial.py`) get one pass per prompt, and a warning says why.
"""

from __future__ import annotations

import inspect
import itertools
import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from star_dss_plugin.engines.shared_prefix.attention import KeysValues, Pass, Prefix, running
from star_dss_plugin.engines.shared_prefix.savings import LastLayer, OneDnnLinear
from star_dss_plugin.engines.shared_prefix.tree import Tail, Tree, batched, common_length, grow
from star_dss_plugin.engines.shared_prefix.trial import fixed_rope_length, why_not
from star_dss_plugin.errors import DataError, GuardError

__all__ = ["LocalEngine"]

_CPU_TOKENS = 1024
"""Tokens of one pass for each thread of a CPU: with more, activations leave its caches, and their
memory is given back to the system and asked for anew in every layer."""

logger = logging.getLogger(__name__)


class LocalEngine:
    """An `Engine` over a transformers decoder, exact to one forward pass per prompt.

    Args:
        model: A causal LM. Its weights, config and training flags are left as they are, and its
            weights must stay as they are until `close`.
        batch_tokens: Bound on the tokens of one forward pass, padding included. A prompt that
            needs more runs alone. Running out of CUDA memory halves it for good.

    Attributes:
        computed_tokens: Token positions run through the model so far, padding included.
        distinct_tokens: Nodes in the tries of all groups so far, the head of a call counted once:
            the fewest tokens that could be run.
    """

    def __init__(self, model: PreTrainedModel, batch_tokens: int = 16384) -> None:
        if model.config.is_encoder_decoder:
            raise GuardError(f"{type(model).__name__} is an encoder-decoder. Use a causal LM.")
        self.model = model
        self.batch_tokens = batch_tokens
        self.computed_tokens = self.distinct_tokens = 0
        self._config: PreTrainedConfig = model.config.get_text_config(decoder=True)
        self._fixed_rope_length = fixed_rope_length(self._config)
        self._parameters = inspect.signature(model.forward).parameters
        self._head: tuple[tuple[int, ...], KeysValues] = ((), {})
        self._last_layer = LastLayer.of(model)
        self._block_sparse = model.device.type == "cuda"
        self._warned: set[str] = set()
        # A pass tells the model how to attend: two at a time would tell each other's.
        self._one_at_a_time = threading.Lock()

    def label_logprobs(
        self, groups: Sequence[Sequence[Sequence[int]]], label_ids: Sequence[int]
    ) -> list[Tensor]:
        """See `Engine.label_logprobs`."""
        for number, group in enumerate(groups):
            for index, prompt in enumerate(group):
                if len(prompt) == 0:
                    raise DataError(
                        f"Prompt {index} of group {number} is empty. Give it at least one token."
                    )
        longest = max((len(prompt) for group in groups for prompt in group), default=0)
        with self._one_at_a_time:
            reason = self._why_plain
            if reason is None and longest > self._fixed_rope_length:
                reason = f"its rotary frequencies change beyond {self._fixed_rope_length} tokens"
            if reason and reason not in self._warned:
                self._warned.add(reason)
                kind = self._config.model_type
                logger.warning("A %s model runs every prompt whole, slowly: %s.", kind, reason)
            return self._compute(groups, label_ids, whole=bool(reason))

    def close(self) -> None:
        """See `Engine.close`."""
        self._head = ((), {})

    def _compute(
        self,
        groups: Sequence[Sequence[Sequence[int]]],
        label_ids: Sequence[int],
        whole: bool,
    ) -> list[Tensor]:
        """`label_logprobs` along one of the two paths."""
        trees = {i: grow(i, group) for i, group in enumerate(groups) if group}
        head = _head_length(list(trees.values()))
        self.distinct_tokens += head + sum(tree.distinct - head for tree in trees.values())
        # Made outside inference mode: the caller may use them in a loss. As much is said of their
        # kind as of every tensor here, because the caller's defaults may be others.
        counts = [len(trees[i].tails) if i in trees else 0 for i in range(len(groups))]
        rows = [torch.empty(n, len(label_ids), dtype=torch.float32, device="cpu") for n in counts]
        training = [module for module in self.model.modules() if module.training]
        self.model.train(False)
        try:
            device = self.model.device.type
            with (
                torch.inference_mode(),
                torch.autocast(device, enabled=False),  # the dtype is the guard's
                OneDnnLinear() if device == "cpu" else nullcontext(),
            ):
                path = self._whole(trees) if whole else self._shared(trees, head)
                for batch, logprobs in path:
                    picked = logprobs[:, list(label_ids)].cpu()
                    for tail, values in zip(batch, picked, strict=True):
                        rows[tail.group][tail.row] = values
        finally:
            for module in training:
                module.training = True
        return [
            rows[i][list(trees[i].row_of)] if i in trees else rows[i] for i in range(len(groups))
        ]

    def _whole(self, trees: dict[int, Tree]) -> Iterator[tuple[list[Tail], Tensor]]:
        """The plain path: batches of whole prompts."""
        prompts = [
            Tail(t.group, t.row, 0, tree.trunk[: t.shared] + t.tokens)
            for tree in trees.values()
            for t in tree.tails
        ]
        prompts.sort(key=lambda t: len(t.tokens))
        yield from self._in_batches(prompts, self._whole_logprobs)

    def _shared(
        self, trees: dict[int, Tree], head_length: int
    ) -> Iterator[tuple[list[Tail], Tensor]]:
        """The fast path: the head, then batches of trunks, each with the tails that hang on it."""
        some = next(iter(trees.values()), None)
        head = self._run_head(some.trunk[:head_length] if some else ())
        ordered = sorted(trees.values(), key=lambda tree: len(tree.trunk))
        while ordered:
            lengths = [len(tree.trunk) - head_length for tree in ordered]
            run = ordered[next(batched(lengths, self._budget))]
            try:
                trunks = self._run_trunks(run, head_length, head)
            except torch.OutOfMemoryError:
                self._halve(len(run))
                continue
            ordered = ordered[len(run) :]
            tails = [
                tail
                for tree in run
                for tail in sorted(tree.tails, key=lambda t: (len(t.tokens), t.shared))
            ]

            def logprobs(batch: list[Tail], trunks: dict[int, KeysValues] = trunks) -> Tensor:
                return self._tail_logprobs(batch, head_length, head, trunks)

            yield from self._in_batches(tails, logprobs)

    def _run_head(self, tokens: tuple[int, ...]) -> KeysValues:
        """Keys and values of the head; those of the last call if it is the same."""
        if self._head[0] != tokens:
            kept: KeysValues = {}
            if tokens:
                ids = torch.tensor([tokens], device=self.model.device)
                position = torch.arange(len(tokens), device=ids.device)[None]
                real = torch.ones_like(ids, dtype=torch.bool)
                self._forward(ids, Pass(position, real, kept=kept))
            self._head = (tokens, kept)
        return self._head[1]

    def _run_trunks(
        self, trees: Sequence[Tree], head_length: int, head: KeysValues
    ) -> dict[int, KeysValues]:
        """Keys and values of each tree's trunk behind the head, by group."""
        rest = [tree.trunk[head_length:] for tree in trees]
        longest = max(map(len, rest))
        groups = [tree.tails[0].group for tree in trees]
        if longest == 0:
            return {group: {} for group in groups}
        ids, real = self._padded(rest, left=False)
        position = (head_length + torch.arange(longest, device=ids.device)).expand_as(ids)
        prefixes = []
        if head:
            depths = torch.full((len(rest),), head_length, device=ids.device)
            prefixes = [Prefix([head], head_length, depths)]
        kept: KeysValues = {}
        self._forward(ids, Pass(position, real, prefixes, kept))
        return {
            group: _cut(kept, len(tokens), row)
            for row, (group, tokens) in enumerate(zip(groups, rest, strict=True))
        }

    def _tail_logprobs(
        self, batch: list[Tail], head_length: int, head: KeysValues, trunks: dict[int, KeysValues]
    ) -> Tensor:
        """Log-probabilities after B tails, shape (B, vocabulary); tails of a group are neighbours.

        Tails are padded on the left: all end in one column, the only one projected.
        """
        ids, real = self._padded([t.tokens for t in batch], left=True)
        shared = torch.tensor([[t.shared] for t in batch], device=ids.device)
        length = real.sum(1, keepdim=True)
        slot = torch.arange(ids.shape[1], device=ids.device)
        # Nothing sees padding, but a table of learned positions has no negative ones.
        position = (shared + slot - ids.shape[1] + length).clamp(min=0)
        prefixes, first = [], 0
        while first < len(batch):
            group = batch[first].group
            rows = sum(t.group == group for t in batch[first:])
            deepest = max(t.shared for t in batch[first : first + rows])
            parts = [part for part in (head, trunks[group]) if part]
            parts = (
                [_cut(parts[0], deepest)]
                if len(parts) == 1
                else [*parts[:1], *(_cut(part, deepest - head_length) for part in parts[1:])]
            )
            prefixes.append(Prefix(parts, deepest, shared[first : first + rows, 0]))
            first += rows
        if max(t.shared for t in batch) == 0:
            prefixes = []
        return self._forward(ids, Pass(position, real, prefixes)).float().log_softmax(-1)

    def _whole_logprobs(self, batch: list[Tail]) -> Tensor:
        """Log-probabilities after B whole prompts padded on the right, shape (B, vocabulary)."""
        ids, real = self._padded([t.tokens for t in batch], left=False)
        ends = real.sum(1) - 1
        columns, which = ends.unique(return_inverse=True)
        inputs: dict[str, Any] = {"attention_mask": real.long()}
        if "logits_to_keep" in self._parameters:
            inputs["logits_to_keep"] = columns
            columns = torch.arange(len(columns), device=ids.device)
        logits = self.model(ids, use_cache=False, **inputs).logits
        self.computed_tokens += ids.numel()
        rows = torch.arange(len(batch), device=ids.device)
        found: Tensor = logits[rows, columns[which]].float().log_softmax(-1)
        return found

    def _forward(self, ids: Tensor, current: Pass) -> Tensor:
        """The model's own logits in the last column, (rows, vocabulary), attending as told."""
        current.last_layer, current.block_sparse = self._last_layer.index, self._block_sparse
        try:
            found = self._last_logits(ids, current)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # Of a compiler, say, that knows no kernel for this pass.
            if not self._block_sparse:
                raise
            found = self._last_logits(ids, replace(current, block_sparse=False))
            self._block_sparse = False  # not before: now the fault was the kernel's
            self._warn_of_dense(f"a pass failed with {error!r}")
        self.computed_tokens += ids.numel()
        return found

    def _last_logits(self, ids: Tensor, current: Pass) -> Tensor:
        inputs = {"logits_to_keep": 1} if "logits_to_keep" in self._parameters else {}
        with running(self._config, current), self._last_layer.only_last_column():
            found: Tensor = self.model(
                ids, position_ids=current.positions, use_cache=False, **inputs
            ).logits[:, -1]
        return found

    def _padded(self, rows: Sequence[Sequence[int]], *, left: bool) -> tuple[Tensor, Tensor]:
        """Token ids and which of them are real, both (rows, longest)."""
        longest = max(map(len, rows))
        ids = torch.zeros(len(rows), longest, dtype=torch.long, device="cpu")
        real = torch.zeros(len(rows), longest, dtype=torch.bool, device="cpu")
        for i, tokens in enumerate(rows):
            where = slice(longest - len(tokens), longest) if left else slice(0, len(tokens))
            ids[i, where] = torch.tensor(tokens, dtype=torch.long, device="cpu")
            real[i, where] = True
        return ids.to(self.model.device), real.to(self.model.device)

    def _in_batches(
        self, tails: list[Tail], run: Callable[[list[Tail]], Tensor]
    ) -> Iterator[tuple[list[Tail], Tensor]]:
        """Runs tails in their order, as many at a time as `batch_tokens` allows."""
        left = tails
        while left:
            batch = left[next(batched([len(t.tokens) for t in left], self._budget))]
            if max(len(t.tokens) + t.shared for t in batch) > self._fixed_rope_length:
                batch = batch[:1]
            try:
                logprobs = run(batch)
            except torch.OutOfMemoryError:
                self._halve(len(batch))
                continue
            yield batch, logprobs
            left = left[len(batch) :]

    @property
    def _budget(self) -> int:
        """Tokens of one pass."""
        if self.model.device.type != "cpu":
            return self.batch_tokens
        return min(self.batch_tokens, _CPU_TOKENS * torch.get_num_threads())

    def _halve(self, rows: int) -> None:
        """Makes room after a pass over `rows` rows ran out of memory; re-raises if that was one."""
        if rows == 1:
            raise
        self.batch_tokens = max(1, self.batch_tokens // 2)
        logger.warning("Out of memory: batch_tokens is now %d.", self.batch_tokens)

    @cached_property
    def _why_plain(self) -> str | None:
        """Why the fast path cannot serve this model, or None."""
        reasons: list[str] = []
        for sparse, last in itertools.product(
            {self._block_sparse: None, False: None}, {self._last_layer: None, LastLayer(): None}
        ):  # the fastest first
            # An engine of its own: nothing is counted here, and no head is kept.
            trial = LocalEngine(self.model)
            trial._block_sparse, trial._last_layer = sparse, last
            reason = why_not(self.model, list(self._parameters), trial._compute)
            if reason is None:
                if self._block_sparse and not sparse:
                    self._warn_of_dense(reasons[0])
                self._block_sparse, self._last_layer = trial._block_sparse, last
                return None
            reasons.append(reason)
        return reasons[-1]

    def _warn_of_dense(self, reason: str) -> None:
        kind = self._config.model_type
        logger.warning("A %s model runs without FlexAttention, slower: %s.", kind, reason)


def _head_length(trees: Sequence[Tree]) -> int:
    """Tokens that all prompts of several trees begin with, tails not counted."""
    if len(trees) < 2:
        return 0
    return min(
        common_length([tree.trunk for tree in trees]),
        *(tail.shared for tree in trees for tail in tree.tails),
    )


def _cut(part: KeysValues, tokens: int, row: int = 0) -> KeysValues:
    """The first tokens of one row."""
    rows = slice(row, row + 1)
    return {layer: (k[rows, :, :tokens], v[rows, :, :tokens]) for layer, (k, v) in part.items()}
