"""Compute log π_ref of every trained token once before training, as the column `ref_logps`.

k1, k2 and k3 need one reference log-probability per token. The reference is the model as it starts,
so these can be computed before the first step, and a step costs what a step of plain finetuning
costs.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset, List, Value
from torch import Tensor, nn
from tqdm.auto import tqdm

from star_dss_plugin.data.cache import ScoreCache
from star_dss_plugin.data.columns import REF_COLUMN, SCORES_COLUMN, with_column
from star_dss_plugin.data.fingerprints import content_key
from star_dss_plugin.data.provenance import read_note, write_note
from star_dss_plugin.data.requests import Trajectory
from star_dss_plugin.errors import CacheError
from star_dss_plugin.guards.base import batches
from star_dss_plugin.logprobs import IGNORE_INDEX, Project, token_logprobs
from star_dss_plugin.loss import Shaping
from star_dss_plugin.training.head import apply_to_logits
from star_dss_plugin.training.reference.model import Reference
from star_dss_plugin.training.rows.collation import document_starts
from star_dss_plugin.training.sharding import Ranks

__all__ = ["add_reference_logps", "has_reference_logps", "reference_means"]

_BATCH_TOKENS = 2048
"""Padded tokens per forward pass, limited for the memory of their logits."""
_ROUNDING = 1e-3
"""How far a log-probability may exceed 0 by rounding."""


def has_reference_logps(
    dataset: Dataset,
    reference: Reference,
    shaping: Shaping,
) -> bool:
    """Return whether a data set has the column, computed by this reference for these tokens.

    A column that came with the data may be another model's, or lack tokens that need it now.
    """
    if REF_COLUMN not in dataset.column_names or (known := read_note(dataset, "reference")) is None:
        return False
    content = _content(dataset, shaping)
    return bool(known == {"model": reference.fingerprint, "content": content})


def reference_means(dataset: Dataset) -> list[float]:
    """Return the mean log-probability in each of 64 groups of rows, with which ranks compare it.

    Padding changes the last bits of one model's log-probabilities, so these cannot be compared by a
    digest; another model changes the means by more.
    """
    column = dataset.with_format("numpy").select_columns([REF_COLUMN])
    totals, counts = np.zeros(64), np.zeros(64)
    for i, row in enumerate(column):
        totals[i % 64] += row[REF_COLUMN].sum(dtype=np.float64)
        counts[i % 64] += np.count_nonzero(row[REF_COLUMN])
    means: list[float] = (totals / np.maximum(counts, 1)).tolist()
    return means


def _content(dataset: Dataset, shaping: Shaping) -> str:
    """Hash what the column depends on besides the reference: tokens, and which rows need it."""
    digest = hashlib.sha256()
    for row in _plain(dataset):
        for document in _documents(row):
            needed = _needs_reference(document, shaping)
            key = content_key(document["input_ids"], document["labels"], needed)
            digest.update(key.encode())
    return digest.hexdigest()


def _plain(dataset: Dataset) -> Dataset:
    columns = ["input_ids", "labels", SCORES_COLUMN, "seq_lengths"]
    return dataset.with_format(None).select_columns(
        [column for column in columns if column in dataset.column_names]
    )


def _documents(row: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the documents of a packed row; the reference reads each by itself."""
    starts = document_starts(row)
    return [
        {name: row[name][start:end] for name in ("input_ids", "labels", SCORES_COLUMN)}
        for start, end in zip(starts, [*starts[1:], len(row["input_ids"])], strict=True)
    ]


def add_reference_logps(
    dataset: Dataset,
    reference: Reference,
    policy: nn.Module,
    shaping: Shaping,
    *,
    pad_token_id: int,
    cache_dir: Path,
    autocast: Callable[[], contextlib.AbstractContextManager[None]],
    precision: str,
    ranks: Ranks,
    progress: bool = True,
) -> Dataset:
    """Add the column `ref_logps`: log π_ref of every trained token that has a KL weight.

    Every rank must call this; the ranks share the work.

    Args:
        dataset: The data set, with `input_ids`, `labels` and `star_scores`; packed rows also with
            `seq_lengths`.
        reference: A reference of kind "precomputed".
        policy: The trained model as it starts, which is run unless `reference.model` is set.
        shaping: Maps scores to weights, and so says which tokens need the reference.
        pad_token_id: Padding of the batches.
        cache_dir: Root of the cache.
        autocast: Makes the trainer's mixed-precision context.
        precision: Name of that precision, part of the cache's key.
        ranks: The ranks of the run.
        progress: Whether to show a progress bar.

    Returns:
        The data set with float32 `ref_logps`, one per token of `input_ids`, 0 where not needed.

    Raises:
        CacheError: A log-probability that was just computed cannot be read from the cache.
    """
    namespace = {"what": REF_COLUMN, "version": 1, "model": reference.fingerprint}
    namespace["precision"] = precision
    cache, model = ScoreCache(cache_dir, namespace), reference.model or policy
    plain = _plain(dataset)
    wanted: dict[str, tuple[int, int]] = {}
    keys: list[list[tuple[str, int]]] = []
    for i, row in enumerate(plain):
        keys.append([])
        for j, document in enumerate(_documents(row)):
            key = content_key(document["input_ids"], document["labels"])
            keys[-1].append((key, len(document["input_ids"])))
            if _needs_reference(document, shaping):
                wanted.setdefault(key, (i, j))

    lengths = {key: length for row in keys for key, length in row}

    def known(key: str) -> tuple[float, ...] | None:
        """Return a cached entry if it is valid; another process may have written another."""
        found = cache.get(key)
        if found is None or len(found.scores) != lengths[key] or found.scores[:1] != (0.0,):
            return None
        return found.scores if all(value <= _ROUNDING for value in found.scores) else None

    def compute(parts: list[list[str]], mine: Mapping[str, tuple[int, int]]) -> None:
        _compute(
            plain,
            model,
            reference.projects,
            parts,
            mine,
            cache,
            known,
            pad_token_id,
            autocast,
            progress,
        )

    def fill(part: str, of: Callable[[list[str]], list[str]]) -> None:
        # Looked up before locking, because a complete cache may be read-only.
        if any(known(key) is None for key in wanted):
            with cache.lock(part):
                mine = {key: wanted[key] for key in of(list(wanted))}
                # Batches are made of all documents, not of the missing ones: padding changes the
                # last bits, and an interrupted run must get the results of an undisturbed one.
                parts = [b for b in _batches(mine, lengths) if any(known(k) is None for k in b)]
                compute(parts, mine)

    def fill_together() -> None:
        """Run equally many forward passes on every rank, because each pass communicates."""
        lacking = set().union(*ranks.gather({key for key in wanted if known(key) is None}))
        parts = [b for b in _batches(wanted, lengths) if not lacking.isdisjoint(b)]
        mine = ranks.own_part(parts)
        most = max(ranks.gather(len(mine)))
        compute([*mine, *parts[:1] * (most - len(mine))], wanted)

    trained = reference.model is None
    if trained and ranks.collective:
        fill_together()
    elif trained and ranks.first_only:
        if ranks.has_weights:
            fill("", list)
    elif ranks.share.ranks > 1:
        fill(f"-{ranks.share.rank}-of-{ranks.share.ranks}", ranks.share.own_part)
    ranks.share.barrier()
    cache.refresh()
    if not (trained and (ranks.collective or ranks.first_only)):
        fill("", list)

    def values(key: str, length: int) -> Any:
        if key not in wanted:
            return np.zeros(length)
        found = known(key)
        if found is None:  # not zeros: a log-probability of 0 is a probability of 1
            raise CacheError(
                f"The reference log-probabilities that were just computed cannot be read from the "
                f"cache in {cache.folder}: another process writes other values there, or the model "
                "computes NaN, or the processes of this machine do not share the folder. "
                "Name another score_cache_dir, or remove that folder."
            )
        return np.asarray(found)

    column = [
        np.concatenate([np.zeros(0), *(values(*document) for document in row)]) for row in keys
    ]
    dataset = with_column(dataset, REF_COLUMN, column, List(Value("float32")))
    content = _content(dataset, shaping)
    write_note(dataset, "reference", {"model": reference.fingerprint, "content": content})
    return dataset


def _needs_reference(row: Mapping[str, Any], shaping: Shaping) -> bool:
    """Return whether a token of a document has a KL weight."""
    scores = torch.tensor([row[SCORES_COLUMN]], dtype=torch.float32)
    weights = shaping.weights(scores, torch.tensor([row["labels"]]))
    return bool((weights.kl != 0).any())


def _compute(
    rows: Dataset,
    model: nn.Module,
    projects: bool,
    parts: list[list[str]],
    places: Mapping[str, tuple[int, int]],
    cache: ScoreCache,
    known: Callable[[str], tuple[float, ...] | None],
    pad_token_id: int,
    autocast: Callable[[], contextlib.AbstractContextManager[None]],
    progress: bool,
) -> None:
    """Compute the missing log-probabilities batch by batch, and cache them.

    `parts` lists the keys of each batch; `places` maps a key to (row, index of the document).
    """
    device = next(model.parameters()).device
    training = model.training
    model.eval()
    bar = tqdm(
        total=sum(map(len, parts)),
        desc="Reference log-probabilities",
        unit="row",
        disable=not progress or not parts,
    )
    try:
        for keys in parts:
            batch = [_documents(rows[i])[j] for i, j in map(places.__getitem__, keys)]
            ids = [torch.tensor(document["input_ids"]) for document in batch]
            labels = [torch.tensor(document["labels"]) for document in batch]
            padded = nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=pad_token_id)
            targets = nn.utils.rnn.pad_sequence(
                labels, batch_first=True, padding_value=IGNORE_INDEX
            )
            lengths = torch.tensor([len(x) for x in ids])
            mask = torch.arange(padded.shape[1])[None] < lengths[:, None]
            inputs = {"input_ids": padded.to(device), "attention_mask": mask.long().to(device)}
            with torch.no_grad(), autocast():
                of = partial(_token_logprobs, labels=targets.to(device))
                logps = apply_to_logits(model, inputs, of, project=projects).cpu()
            for key, row, length in zip(keys, logps, lengths.tolist(), strict=True):
                if known(key) is None:
                    cache.put(key, Trajectory((0.0, *row[: length - 1].tolist())))
            cache.flush_if_due()
            bar.update(len(batch))
    finally:
        cache.flush()
        model.train(training)
        bar.close()


def _token_logprobs(rows: Tensor, project: Project | None, *, labels: Tensor) -> Tensor:
    return token_logprobs(rows, labels, project)


def _batches(wanted: Mapping[str, tuple[int, int]], lengths: Mapping[str, int]) -> list[list[str]]:
    """Return batches of similar length: at most `_BATCH_TOKENS` padded tokens, or one key."""
    keys = sorted(wanted, key=lambda key: wanted[key])
    found = batches([lengths[key] for key in keys], _BATCH_TOKENS)
    return [[keys[i] for i in batch] for batch in found]
