"""Trajectories by probes: a sample is asked in part, a probe learns from it and scores the rest.

The sample is drawn by the content of responses, so it does not depend on the order of the data, on
ranks or on what is cached. A first round asks the guard once about each of a pool, at the end;
then as many responses are taken from each band of these scores as there are, so that rare kinds are
learned too. Prefixes of one response are much alike, so of each only every fourth is asked, from a
drawn one on: any prefix is as likely as any other, and each counts for four. Each response of the
sample counts for as many as its band has in the pool.
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
from star_dss_plugin.guards.probing.guard import ProbingGuard
from star_dss_plugin.guards.probing.learned import Learned
from star_dss_plugin.scoring.cached_trajectories import CachedTrajectories
from star_dss_plugin.scoring.ranks import ALONE

__all__ = ["POOL", "STRIDE", "Pool", "ProbedTrajectories", "drawn", "places", "stratified"]

logger = logging.getLogger(__name__)

SEED = 0
POOL = 2
"""The first round asks about so many times `probe_sample` responses."""
STRIDE = 4
"""Of a response in the sample each prefix so far from the one before is asked."""
_BANDS = (0.05, 0.35, 0.65, 0.95)
_MOST_BYTES = 1 << 26


@dataclass(frozen=True)
class Pool:
    """Hold responses to learn from that are kept apart from those to be scored.

    Attributes:
        requests: By key, from all over the data.
        rows: Where they stand, for messages.
        root: A cache folder that all shards share.
    """

    requests: Mapping[str, PrefixRequest]
    rows: Mapping[str, int]
    root: Path


@dataclass
class ProbedTrajectories(CachedTrajectories):
    """Look up and ask like `CachedTrajectories`; guards that are to be learned are learned.

    Attributes:
        pool: What is learned from; None: the responses themselves.
        notes: What was learned of each guard, in the order in which they were asked.
    """

    pool: Pool | None = None
    notes: list[dict[str, Any]] = field(default_factory=list)

    def _ask(self, guard: Guard) -> tuple[dict[str, Trajectory], set[str]]:
        if not isinstance(guard, ProbingGuard):
            return super()._ask(guard)
        learned, known, why = self._learned(guard)
        facts: dict[str, Any] = dict(learned.facts) if learned else {}
        if learned is None or why:
            logger.warning(
                "trajectory='probed' is not used for guard %s, every prefix is asked: %s.",
                guard.name,
                why,
            )
            self.notes.append({"guard": guard.name, **facts, "fell_back": why})
            return self._of(guard.exact)
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
        self.notes.append({"guard": guard.name, **facts, "fell_back": None})
        marked, failed = self.plainly(guard.with_probe(learned))
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

    def plainly(self, guard: Guard) -> tuple[dict[str, Trajectory], set[str]]:
        """Return the trajectories and failed keys of a guard that is asked as it is."""
        return super()._ask(guard) if self.requests else ({}, set())

    def _learned(
        self, guard: ProbingGuard
    ) -> tuple[Learned | None, dict[str, dict[int, float]], str | None]:
        """Return a probe, the scores that were asked for it, and why the probe is not used.

        Scores are by key and by the end of the prefix.
        """
        pool = self.pool or Pool(self.requests, self.rows, self.root)
        keys = drawn(pool.requests)[: POOL * guard.sample]
        if len(keys) <= guard.sample:
            few = f"the data has {len(keys)} different responses"
            return None, {}, f"{few}, and probe_sample is {guard.sample}"
        firsts = {key: _at_the_end(pool.requests[key]) for key in keys}
        ends, failed = self._exactly(guard, pool, firsts)
        last = {key: ends[key].scores[-1] for key in keys if key not in failed}
        weights = stratified(last, guard.sample)
        some = {key: _some(key, pool.requests[key]) for key in weights}
        exact, failed = self._exactly(guard, pool, some)
        sample = {key: exact[key] for key in weights if key not in failed}
        if len(sample) <= guard.sample // 2:
            return None, {}, f"only {len(sample)} responses of the sample could be scored"
        learned = self._fitted(guard, pool, sample, weights)
        known = {key: {firsts[key].ends[-1]: score} for key, score in last.items()}
        for key, answer in sample.items():
            known[key] |= zip(some[key].ends, answer.scores, strict=True)
        return learned, known, learned.refused

    def _exactly(
        self, guard: ProbingGuard, pool: Pool, requests: Mapping[str, PrefixRequest]
    ) -> tuple[dict[str, Trajectory], set[str]]:
        """Return exact trajectories of some responses, and the keys that could not be scored."""
        # The cache knows a request by all of its prefixes.
        named = {key: request_key(asked) for key, asked in requests.items()}
        asking = CachedTrajectories(
            {named[key]: asked for key, asked in requests.items()},
            {named[key]: pool.rows[key] for key in requests},
            pool.root,
            progress=self.progress,
            strict=self.strict,
            part=self.part,
            share=self.share if pool.root == self.root else ALONE,
        )
        found = asking.trajectories(guard.exact)
        failed = {key for key in requests if named[key] in asking.failed}
        return {key: found[named[key]] for key in requests}, failed

    def _fitted(
        self,
        guard: ProbingGuard,
        pool: Pool,
        sample: Mapping[str, Trajectory],
        weights: Mapping[str, float],
    ) -> Learned:
        """Return the probe of a sample, which the first rank fits and keeps for the others."""
        made_of = [[key, weights[key], list(found.scores)] for key, found in sample.items()]
        namespace = {"what": "probe", "guard": guard.identity}
        path = ScoreCache(pool.root, namespace).folder / f"{content_key(made_of)}.json"
        learned = _read(path)
        requests = {key: pool.requests[key] for key in sample}
        told = (
            list(requests.values()),
            [places(key, len(asked.ends)) for key, asked in requests.items()],
            list(sample.values()),
            [weights[key] * min(STRIDE, len(asked.ends)) for key, asked in requests.items()],
        )
        if learned is None and self.share.rank == 0:
            learned = guard.learn(*told)
            path.parent.mkdir(parents=True, exist_ok=True)
            write_text(path, learned.dump())
        self.share.meet()
        # Without the file this rank computes the same.
        return learned or _read(path) or guard.learn(*told)


def drawn(keys: Mapping[str, Any]) -> list[str]:
    """Return keys in random order, by the seed: the order in which they were given is nothing."""
    return sorted(keys, key=lambda key: hashlib.sha256(f"{SEED} {key}".encode()).digest())


def stratified(scores: Mapping[str, float], count: int) -> dict[str, float]:
    """Draw responses from all bands of their scores, as many from each as there are.

    Args:
        scores: By key, in random order.
        count: How many are drawn, if there are so many.

    Returns:
        By key, in the order of `scores`, how many responses each stands for.
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


def places(key: str, count: int) -> range:
    """Return which of a response's prefixes are asked, at least one: drawn by the key's content."""
    draw = int.from_bytes(hashlib.sha256(f"{SEED} start {key}".encode()).digest()[:8])
    return range(draw % min(STRIDE, count), count, STRIDE)


def _some(key: str, request: PrefixRequest) -> PrefixRequest:
    ends = tuple(request.ends[place] for place in places(key, len(request.ends)))
    return PrefixRequest(request.context, request.text, ends)


def _at_the_end(request: PrefixRequest) -> PrefixRequest:
    return PrefixRequest(request.context, request.text, request.ends[-1:])


def _read(path: Path) -> Learned | None:
    """Return a probe that was kept; None if there is none, or something else in its place."""
    try:
        return Learned.parse(read_regular(path, _MOST_BYTES))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        logger.warning("Ignored the probe in %s (%s): it is fitted again.", path, error)
        return None
