"""Score a sample with the guard, fit a probe to it, and score the rest with the probe.

The sample is drawn by the content of responses, so it does not depend on the order of the data, on
ranks or on the cache.

1. The guard scores the last prefix of each response in a pool (`POOL` times the sample's size).
2. The sample takes equally many responses from each band of these scores, as far as the band has
   them, so that the probe learns rare kinds too. A sampled response is weighted by the number of
   pool responses in its band per sampled one.
3. Prefixes of one response are similar, so the guard scores only every fourth (`STRIDE`) prefix of
   a sampled response, from a random first one on; each of these has weight four.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from star_dss_plugin.data.cache import ScoreCache
from star_dss_plugin.data.files.regular import read_regular
from star_dss_plugin.data.fingerprints import content_key, request_key
from star_dss_plugin.data.requests import PrefixRequest, Trajectory
from star_dss_plugin.data.writing import write_text
from star_dss_plugin.guards.base import Guard
from star_dss_plugin.guards.probing.bounds import COVERAGE
from star_dss_plugin.guards.probing.fitted import FittedProbe
from star_dss_plugin.guards.probing.guard import ProbingGuard
from star_dss_plugin.scoring.cached_trajectories import CachedTrajectories
from star_dss_plugin.scoring.ranks import SINGLE_PROCESS

__all__ = [
    "POOL",
    "STRIDE",
    "Pool",
    "ProbedTrajectories",
    "prefixes_to_score",
    "pseudo_random_order",
    "stratified",
]

logger = logging.getLogger(__name__)

SEED = 0
POOL = 2
"""Size of the pool as a multiple of `probe_sample`."""
STRIDE = 4
"""Distance between the prefixes of a sampled response that the guard scores."""
_BANDS = (0.05, 0.35, 0.65, 0.95)
_MOST_BYTES = 1 << 26


@dataclass(frozen=True)
class Pool:
    """Hold the responses from which a sample is drawn, if they are not the scored responses.

    Attributes:
        requests: Requests by key, from the whole data set.
        rows: The row of each key, for messages.
        root: A cache folder that all shards share.
    """

    requests: Mapping[str, PrefixRequest]
    rows: Mapping[str, int]
    root: Path


@dataclass
class ProbedTrajectories(CachedTrajectories):
    """Extend `CachedTrajectories` by fitting a probe to each `ProbingGuard`.

    Attributes:
        pool: The responses from which the sample is drawn; None: the scored responses.
        notes: For the provenance, facts about each guard's probe, in the order of the guards.
    """

    pool: Pool | None = None
    notes: list[dict[str, Any]] = field(default_factory=list)

    def _score_single(self, guard: Guard) -> tuple[dict[str, Trajectory], set[str]]:
        if not isinstance(guard, ProbingGuard):
            return super()._score_single(guard)
        learned, known, why = self._learn(guard)
        facts: dict[str, Any] = dict(learned.facts) if learned else {}
        if learned is None or why:
            logger.warning(
                "trajectory='probed' is not used for guard %s, every prefix is asked: %s.",
                guard.name,
                why,
            )
            self.notes.append({"guard": guard.name, **facts, "fell_back": why})
            return self._score(guard.exact)
        logger.info(
            "Guard %s: a probe on %d responses, behind blocks %s; of its scores for held-out "
            "responses %.1f%% lie within %s of the guard's (promised: %.0f%%), the mean difference "
            "is %.4f; about %.0f%% of the prefixes are asked.",
            guard.name,
            facts["responses"],
            facts["blocks"],
            100 * facts["coverage"],
            guard.tolerance,
            100 * COVERAGE,
            facts["mean"],
            100 * (1 - facts["probed"]),
        )
        facts["threshold"] = guard.threshold
        self.notes.append({"guard": guard.name, **facts, "fell_back": None})
        marked, failed = self.score_without_fitting(guard.with_probe(learned))
        found = {}
        for key, answer in marked.items():
            asked = [mass > 0 for mass in answer.label_mass or [1.0] * len(answer.scores)]
            scores = list(answer.scores)
            if key not in failed:
                for place, end in enumerate(self.requests[key].ends):
                    if end in known.get(key, {}):
                        scores[place], asked[place] = known[key][end], True
            found[key] = Trajectory(tuple(scores), None, tuple(asked))
        return found, failed

    def score_without_fitting(self, guard: Guard) -> tuple[dict[str, Trajectory], set[str]]:
        """Return the trajectories and failed keys of a guard without fitting a probe."""
        return super()._score_single(guard) if self.requests else ({}, set())

    def _learn(
        self, guard: ProbingGuard
    ) -> tuple[FittedProbe | None, dict[str, dict[int, float]], str | None]:
        """Fit a probe to a sample.

        Returns:
            The probe, or None without one; the guard's exact scores by key and prefix end; the
            reason why the probe is not used, or None if it is.
        """
        pool = self.pool or Pool(self.requests, self.rows, self.root)
        keys = pseudo_random_order(pool.requests)[: POOL * guard.sample]
        if len(keys) <= guard.sample:
            few = f"the data has {len(keys)} different responses"
            return None, {}, f"{few}, and probe_sample is {guard.sample}"
        firsts = {key: _last_prefix(pool.requests[key]) for key in keys}
        ends, failed = self._exact(guard, pool, firsts)
        last = {key: ends[key].scores[-1] for key in keys if key not in failed}
        weights = stratified(last, guard.sample)
        some = {key: _strided(key, pool.requests[key]) for key in weights}
        exact, failed = self._exact(guard, pool, some)
        sample = {key: exact[key] for key in weights if key not in failed}
        if len(sample) <= guard.sample // 2:
            return None, {}, f"only {len(sample)} responses of the sample could be scored"
        learned = self._probe_of_sample(guard, pool, sample, weights)
        known = {key: {firsts[key].ends[-1]: score} for key, score in last.items()}
        for key, answer in sample.items():
            known[key] |= zip(some[key].ends, answer.scores, strict=True)
        return learned, known, learned.rejection_reason

    def _exact(
        self, guard: ProbingGuard, pool: Pool, requests: Mapping[str, PrefixRequest]
    ) -> tuple[dict[str, Trajectory], set[str]]:
        """Return the guard's exact trajectories of responses, and the keys that it failed on."""
        # These requests have other prefixes than the data's, hence other cache keys.
        named = {key: request_key(asked) for key, asked in requests.items()}
        asking = CachedTrajectories(
            {named[key]: asked for key, asked in requests.items()},
            {named[key]: pool.rows[key] for key in requests},
            pool.root,
            progress=self.progress,
            strict=self.strict,
            part=self.part,
            share=self.share if pool.root == self.root else SINGLE_PROCESS,
        )
        found = asking.trajectories(guard.exact)
        failed = {key for key in requests if named[key] in asking.failed}
        return {key: found[named[key]] for key in requests}, failed

    def _probe_of_sample(
        self,
        guard: ProbingGuard,
        pool: Pool,
        sample: Mapping[str, Trajectory],
        weights: Mapping[str, float],
    ) -> FittedProbe:
        """Return the probe of a sample; rank 0 fits it and writes it to the cache."""
        contents = [[key, weights[key], list(found.scores)] for key, found in sample.items()]
        namespace = {"what": "probe", "guard": guard.identity}
        path = ScoreCache(pool.root, namespace).folder / f"{content_key(contents)}.json"
        learned = _read(path)
        requests = {key: pool.requests[key] for key in sample}
        examples = (
            list(requests.values()),
            [prefixes_to_score(key, len(asked.ends)) for key, asked in requests.items()],
            list(sample.values()),
            [weights[key] * min(STRIDE, len(asked.ends)) for key, asked in requests.items()],
        )
        if learned is None and self.share.rank == 0:
            learned = guard.fit_probe(*examples)
            path.parent.mkdir(parents=True, exist_ok=True)
            write_text(path, learned.dump())
        self.share.barrier()
        # A rank that cannot read the file fits the same probe itself.
        return learned or _read(path) or guard.fit_probe(*examples)


def pseudo_random_order(keys: Mapping[str, Any]) -> list[str]:
    """Return keys in a pseudo-random order that depends only on the keys and the seed."""
    return sorted(keys, key=lambda key: hashlib.sha256(f"{SEED} {key}".encode()).digest())


def stratified(scores: Mapping[str, float], count: int) -> dict[str, float]:
    """Draw responses stratified by score: equally many from each band, while the band has them.

    Args:
        scores: Scores by key, in random order.
        count: How many responses to draw; fewer if `scores` has fewer.

    Returns:
        Each drawn response's weight by key, in the order of `scores`: the number of responses in
        its band per drawn one.
    """
    bands: dict[int, list[str]] = {}
    for key, score in scores.items():
        bands.setdefault(int(np.searchsorted(_BANDS, score, side="right")), []).append(key)
    taken = dict.fromkeys(bands, 0)
    for _ in range(min(count, len(scores))):
        open_bands = [band for band in sorted(bands) if taken[band] < len(bands[band])]
        taken[min(open_bands, key=lambda band: taken[band])] += 1
    weight = {
        key: len(keys) / taken[band] for band, keys in bands.items() for key in keys[: taken[band]]
    }
    return {key: weight[key] for key in scores if key in weight}


def prefixes_to_score(key: str, count: int) -> range:
    """Return the indices of the prefixes that the guard scores, at least one.

    They are every fourth prefix, from one on that is drawn by the key's hash.
    """
    draw = int.from_bytes(hashlib.sha256(f"{SEED} start {key}".encode()).digest()[:8])
    return range(draw % min(STRIDE, count), count, STRIDE)


def _strided(key: str, request: PrefixRequest) -> PrefixRequest:
    ends = tuple(request.ends[place] for place in prefixes_to_score(key, len(request.ends)))
    return PrefixRequest(request.context, request.text, ends)


def _last_prefix(request: PrefixRequest) -> PrefixRequest:
    return PrefixRequest(request.context, request.text, request.ends[-1:])


def _read(path: Path) -> FittedProbe | None:
    """Return a probe from the cache; None if the file is missing or damaged."""
    try:
        return FittedProbe.parse(read_regular(path, _MOST_BYTES))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        logger.warning("Ignored the probe in %s (%s): it is fitted again.", path, error)
        return None
