"""Compute label probabilities with a model in this process, with each shared prefix run once.

Prompts are split into one head that all share, one trunk per response and one tail per prompt
(`tree.py`). These run in that order. Each attends to the KV cache of its prefix (`passes.py`,
`attention.py`), at its true position ids. Every query therefore sees the same keys and values as in
a forward pass over the whole prompt, and the logits are equal up to rounding. Prompts are split
between tokens, so it does not matter how the tokenizer merges characters at a boundary. If a trial
(`trial.py`) shows that a model gives other logits, every prompt gets its own forward pass, and a
warning gives the reason.
"""

from __future__ import annotations

import inspect
import itertools
import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import cached_property
from typing import Any, TypeVar

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from star_dss_plugin.engines.padding import padded
from star_dss_plugin.engines.shared_prefix.attention import KeysValues, Pass, pass_running
from star_dss_plugin.engines.shared_prefix.passes import first_tokens, rows_after, tails_after
from star_dss_plugin.engines.shared_prefix.recording import blocks_of, recording
from star_dss_plugin.engines.shared_prefix.savings import LastLayer, OneDnnLinear
from star_dss_plugin.engines.shared_prefix.tree import (
    Tail,
    Tree,
    build_tree,
    common_prefix_of_all,
    first_batch,
    shared_head_length,
)
from star_dss_plugin.engines.shared_prefix.trial import fixed_rope_length, unsupported_reason
from star_dss_plugin.engines.shared_prompts import SharedPrompts
from star_dss_plugin.errors import DataError, GuardError

__all__ = ["LocalEngine"]

_CPU_TOKENS = 1024
"""Tokens per forward pass for each CPU thread. With more, activations leave the CPU's caches, and
their memory is returned to the system and allocated again in every layer.
"""

logger = logging.getLogger(__name__)

Item = TypeVar("Item")
Result = TypeVar("Result")


class LocalEngine:
    """Run a transformers decoder as an `Engine`.

    Results equal those of one forward pass per prompt, up to rounding.

    Args:
        model: A causal LM. Its config and training flags are the same after every call. Its
            weights must not change until `close`.
        batch_tokens: Upper bound on the tokens of one forward pass, padding included. A prompt that
            needs more runs alone. When CUDA memory runs out, the bound is halved and stays so.

    Attributes:
        computed_tokens: Token positions run through the model so far, padding included.
        distinct_tokens: Number of nodes in the prefix tries of all groups so far, with the head
            counted once per call: the fewest token positions that could be run.
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
        self._last_layer = LastLayer.from_model(model)
        self._block_sparse = model.device.type == "cuda"
        self._warned: set[str] = set()
        # The current pass is set on the model's config, so two passes at a time would mix.
        self._lock = threading.Lock()

    def label_logprobs(
        self, groups: Sequence[Sequence[Sequence[int]]], label_ids: Sequence[int]
    ) -> list[Tensor]:
        """See `Engine.label_logprobs`."""
        shared = [SharedPrompts.from_prompts(group) for group in groups]
        lengths = [prompts.lengths() for prompts in shared]
        for number, of_group in enumerate(lengths):
            if 0 in of_group:
                raise DataError(
                    f"Prompt {of_group.index(0)} of group {number} is empty. Give it at least one "
                    "token."
                )
        longest = max((length for of_group in lengths for length in of_group), default=0)
        with self._lock:
            reason = self._plain_path_reason
            if reason is None and longest > self._fixed_rope_length:
                reason = f"its rotary frequencies change beyond {self._fixed_rope_length} tokens"
            if reason and reason not in self._warned:
                self._warned.add(reason)
                kind = self._config.model_type
                logger.warning("A %s model runs without shared prefixes, slower: %s.", kind, reason)
            return self._compute(shared, label_ids, whole=bool(reason))

    @property
    def blocks(self) -> int:
        """Return how many blocks the decoder has; raise a GuardError if they cannot be read."""
        return len(blocks_of(self.model))

    def states(
        self,
        sequences: Sequence[Sequence[int]],
        positions: Sequence[Sequence[int]],
        blocks: Sequence[int],
    ) -> list[Tensor]:
        """Return hidden states at some positions of token sequences, from one causal pass.

        The common prefix of the sequences runs once. Blocks above the highest requested one do not
        run.

        Args:
            sequences: Token ids, at least one per sequence.
            positions: For each sequence the positions to read, from 0.
            blocks: Indices of the blocks whose output is read, from 0. The last block is not
                allowed: it computes its last column only.

        Returns:
            Per sequence a float32 tensor on the CPU, shape (positions, blocks, hidden size).
        """
        with self._lock:
            whole = self._plain_path_reason is not None or (
                max(map(len, sequences), default=0) > self._fixed_rope_length
            )
            with self._computing():
                return self._states(sequences, positions, blocks, whole)

    def _states(
        self,
        sequences: Sequence[Sequence[int]],
        positions: Sequence[Sequence[int]],
        blocks: Sequence[int],
        whole: bool,
    ) -> list[Tensor]:
        rows = [tuple(sequence) for sequence in sequences]
        # The head ends before the first position that is read, because its states are not recorded.
        first = min((min(read) for read in positions), default=0)
        start = 0 if whole or len(rows) < 2 else min(common_prefix_of_all(rows), first)
        head = self._run_head(rows[0][:start]) if start else {}

        def run(batch: list[int]) -> dict[int, Tensor]:
            with recording(self.model, blocks) as kept:
                self._run_rows([rows[i][start:] for i in batch], start, head, whole)
            return kept

        found: dict[int, Tensor] = {}
        ordered = sorted(range(len(rows)), key=lambda i: len(rows[i]))
        for batch, kept in self._in_batches(
            ordered, run, lambda i: len(rows[i]) - start, lambda i: len(rows[i])
        ):
            for row, i in enumerate(batch):
                at = [position - start for position in positions[i]]
                found[i] = torch.stack([kept[b][row, at].float().cpu() for b in blocks], dim=1)
        return [found[i] for i in range(len(rows))]

    def _run_rows(
        self, rows: Sequence[Sequence[int]], start: int, head: KeysValues, whole: bool
    ) -> None:
        """Run rows after a head of `start` tokens; only forward hooks see the states."""
        if not whole:
            self._forward(*rows_after(rows, start, head, self.model.device))
            return
        ids, real = padded(rows, self.model.device)
        last = {"logits_to_keep": 1} if "logits_to_keep" in self._parameters else {}
        self.model(ids, attention_mask=real.long(), use_cache=False, **last)
        self.computed_tokens += ids.numel()

    def close(self) -> None:
        """See `Engine.close`."""
        self._head = ((), {})

    def _compute(
        self,
        groups: Sequence[Sequence[Sequence[int]]],
        label_ids: Sequence[int],
        whole: bool,
    ) -> list[Tensor]:
        """Return `label_logprobs` by the plain path (`whole`) or by the shared-prefix path."""
        trees = {i: build_tree(i, group) for i, group in enumerate(groups) if group}
        head = shared_head_length(list(trees.values()))
        self.distinct_tokens += head + sum(tree.distinct - head for tree in trees.values())
        # Allocated outside inference mode, because the caller may use the rows in a loss. Dtype and
        # device are explicit here and elsewhere, because the caller may have changed torch's
        # defaults.
        counts = [len(trees[i].tails) if i in trees else 0 for i in range(len(groups))]
        rows = [torch.empty(n, len(label_ids), dtype=torch.float32, device="cpu") for n in counts]
        with self._computing():
            passes = self._plain_batches(trees) if whole else self._shared_batches(trees, head)
            for batch, logprobs in passes:
                picked = logprobs[:, list(label_ids)].cpu()
                for tail, values in zip(batch, picked, strict=True):
                    rows[tail.group][tail.row] = values
        return [
            rows[i][list(trees[i].row_of)] if i in trees else rows[i] for i in range(len(groups))
        ]

    @contextmanager
    def _computing(self) -> Iterator[None]:
        """Compute in eval mode and the guard's dtype, without gradients, by the fastest kernels."""
        device = self.model.device.type
        training = [module for module in self.model.modules() if module.training]
        self.model.train(False)
        try:
            with (
                torch.inference_mode(),
                torch.autocast(device, enabled=False),
                OneDnnLinear() if device == "cpu" else nullcontext(),
            ):
                yield
        finally:
            for module in training:
                module.training = True

    def _plain_batches(self, trees: dict[int, Tree]) -> Iterator[tuple[list[Tail], Tensor]]:
        """Yield batches of whole prompts and their log-probabilities (the plain path)."""
        tails = [tail for tree in trees.values() for tail in tree.tails]
        tails.sort(key=Tail.prompt_length)

        def logprobs(batch: list[Tail]) -> Tensor:
            # Built batch by batch, because all prompts of a long response do not fit into memory.
            return self._whole_logprobs(
                [trees[t.group].trunk[: t.shared] + t.tokens for t in batch]
            )

        yield from self._in_batches(tails, logprobs, Tail.prompt_length, Tail.prompt_length)

    def _shared_batches(
        self, trees: dict[int, Tree], head_length: int
    ) -> Iterator[tuple[list[Tail], Tensor]]:
        """Yield batches of tails and their log-probabilities (the shared-prefix path).

        The head runs first, then the trunks in batches, each batch followed by its tails.
        """
        first = next(iter(trees.values()), None)
        head = self._run_head(first.trunk[:head_length] if first else ())
        ordered = sorted(trees.values(), key=lambda tree: len(tree.trunk))
        for run, trunks in self._in_batches(
            ordered,
            lambda batch: self._run_trunks(batch, head_length, head),
            lambda tree: len(tree.trunk) - head_length,
            lambda tree: len(tree.trunk),
        ):
            tails = [
                tail
                for tree in run
                for tail in sorted(tree.tails, key=lambda t: (len(t.tokens), t.shared))
            ]

            def logprobs(batch: list[Tail], trunks: dict[int, KeysValues] = trunks) -> Tensor:
                """Return log-probabilities after B tails, shape (B, vocabulary)."""
                ids, current = tails_after(batch, head_length, head, trunks, self.model.device)
                return self._forward(ids, current).float().log_softmax(-1)

            yield from self._in_batches(
                tails, logprobs, lambda tail: len(tail.tokens), Tail.prompt_length
            )

    def _run_head(self, tokens: tuple[int, ...]) -> KeysValues:
        """Return the head's keys and values, computed only if the head has changed."""
        if self._head[0] != tokens:
            kept: KeysValues = {}
            if tokens:
                self._forward(*rows_after([tokens], 0, {}, self.model.device, kept))
            self._head = (tokens, kept)
        return self._head[1]

    def _run_trunks(
        self, trees: Sequence[Tree], head_length: int, head: KeysValues
    ) -> dict[int, KeysValues]:
        """Return the keys and values of each tree's trunk after the head, by group."""
        rest = [tree.trunk[head_length:] for tree in trees]
        groups = [tree.tails[0].group for tree in trees]
        if not any(rest):
            return {group: {} for group in groups}
        kept: KeysValues = {}
        self._forward(*rows_after(rest, head_length, head, self.model.device, kept))
        return {
            group: first_tokens(kept, len(tokens), row)
            for row, (group, tokens) in enumerate(zip(groups, rest, strict=True))
        }

    def _whole_logprobs(self, batch: Sequence[tuple[int, ...]]) -> Tensor:
        """Return log-probabilities after B whole prompts, shape (B, vocabulary)."""
        ids, real = padded(batch, self.model.device)
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
        """Run a pass and return the model's logits in the last column, (rows, vocabulary)."""
        current.last_layer, current.block_sparse = self._last_layer.index, self._block_sparse
        try:
            found = self._last_logits(ids, current)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # for example: the compiler has no kernel for this pass
            if not self._block_sparse:
                raise
            found = self._last_logits(ids, replace(current, block_sparse=False))
            self._block_sparse = False  # only now is it certain that the kernel failed
            self._warn_of_dense_attention(f"a pass failed with {error!r}")
        self.computed_tokens += ids.numel()
        return found

    def _last_logits(self, ids: Tensor, current: Pass) -> Tensor:
        inputs = {"logits_to_keep": 1} if "logits_to_keep" in self._parameters else {}
        with pass_running(self._config, current), self._last_layer.only_last_column():
            found: Tensor = self.model(
                ids, position_ids=current.positions, use_cache=False, **inputs
            ).logits[:, -1]
        return found

    def _in_batches(
        self,
        items: Sequence[Item],
        run: Callable[[list[Item]], Result],
        computed: Callable[[Item], int],
        length: Callable[[Item], int],
    ) -> Iterator[tuple[list[Item], Result]]:
        """Run items in order, as many per batch as memory allows; yield each batch and its result.

        Args:
            items: The items to run.
            run: Runs one batch.
            computed: Returns the number of tokens that an item computes.
            length: Returns the number of an item's tokens, cached ones included. An item whose
                rotary frequencies depend on the batch runs alone.
        """
        left = list(items)
        while left:
            batch = left[: first_batch([computed(item) for item in left], self._budget)]
            if max(map(length, batch)) > self._fixed_rope_length:
                batch = batch[:1]
            try:
                found = run(batch)
            except torch.OutOfMemoryError:
                self._halve_batch_tokens(len(batch))
                continue
            yield batch, found
            left = left[len(batch) :]

    @property
    def _budget(self) -> int:
        """Return the largest number of tokens in one forward pass."""
        if self.model.device.type != "cpu":
            return self.batch_tokens
        return min(self.batch_tokens, _CPU_TOKENS * torch.get_num_threads())

    def _halve_batch_tokens(self, rows: int) -> None:
        """Halve `batch_tokens` after a pass ran out of memory; raise again if it had one row."""
        if rows == 1:
            raise
        self.batch_tokens = max(1, self.batch_tokens // 2)
        logger.warning("Out of memory: batch_tokens is now %d.", self.batch_tokens)

    @cached_property
    def _plain_path_reason(self) -> str | None:
        """Return the reason why the shared-prefix path cannot serve this model, or None."""
        reasons: list[str] = []
        for sparse, last in itertools.product(
            {self._block_sparse: None, False: None}, {self._last_layer: None, LastLayer(): None}
        ):  # fastest combination first
            # A separate engine, so that counters and the stored head of this one stay unchanged.
            trial = LocalEngine(self.model)
            trial._block_sparse, trial._last_layer = sparse, last
            reason = unsupported_reason(self.model, list(self._parameters), trial._compute)
            if reason is None:
                if self._block_sparse and not sparse:
                    self._warn_of_dense_attention(reasons[0])
                self._block_sparse, self._last_layer = trial._block_sparse, last
                return None
            reasons.append(reason)
        return reasons[-1]

    def _warn_of_dense_attention(self, reason: str) -> None:
        kind = self._config.model_type
        logger.warning("A %s model runs without FlexAttention, slower: %s.", kind, reason)
