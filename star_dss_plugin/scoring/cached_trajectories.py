"""Return trajectories from the cache, and ask guards for missing ones in batches."""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from tqdm.auto import tqdm

from star_dss_plugin.data.cache import ScoreCache
from star_dss_plugin.data.requests import PrefixRequest, Trajectory
from star_dss_plugin.errors import GuardError
from star_dss_plugin.guards.base import Guard, check_trajectories
from star_dss_plugin.guards.combined import CombinedGuard
from star_dss_plugin.guards.self_check import low_label_mass
from star_dss_plugin.scoring.ranks import SINGLE_PROCESS, Share

__all__ = ["TOLERATED_FAILURES", "CachedTrajectories", "none_scored_error"]

logger = logging.getLogger(__name__)

TOLERATED_FAILURES = 20
"""With at most this many responses in a part of the data, it is no error if all of them fail."""


@dataclass
class CachedTrajectories:
    """Look up the trajectories of a data set's responses, and ask guards for cache misses.

    Attributes:
        requests: The requests by key, in the order of the data.
        rows: The first row of each key, for messages.
        root: The cache folder.
        progress: Whether to show a progress bar.
        strict: Whether a response that cannot be scored is an error; else it counts as unsafe.
        part: Whether these are only some of the data's responses; then it is no error if all of at
            most `TOLERATED_FAILURES` responses fail.
        share: This process's part of the work; all processes must have the same requests.
        members: The trajectories of each guard of an ensemble, by the guard's name.
        failed: Keys of the responses that could not be scored.
    """

    requests: Mapping[str, PrefixRequest]
    rows: Mapping[str, int]
    root: Path
    progress: bool
    strict: bool
    part: bool = False
    share: Share = SINGLE_PROCESS
    members: dict[str, dict[str, Trajectory]] = field(default_factory=dict)
    failed: set[str] = field(default_factory=set)

    def trajectories(self, guard: Guard) -> dict[str, Trajectory]:
        """Return all trajectories of a guard, which may combine several guards.

        Raises:
            GuardError: A response cannot be scored and `strict` is set, no response can be scored,
                or the guard's label mass is too low.
        """
        found, self.failed = self._score(guard)
        return found

    def _score(self, guard: Guard) -> tuple[dict[str, Trajectory], set[str]]:
        """Return all trajectories, and the keys that the guard or one of its parts failed on."""
        if not isinstance(guard, CombinedGuard):
            return self._score_single(guard)
        answers, failed = [], set[str]()
        for part in guard.parts:
            answer, unknown = self._score(part)
            answers.append(answer)
            failed |= unknown
            if len(guard.parts) > 1:
                part.close()  # only one guard is in memory at a time
                self.members[self._free_name(part.name)] = answer
        found = {key: guard.combine([answer[key] for answer in answers]) for key in self.requests}
        # A response that one part failed on is unsafe, whatever the other parts' scores are.
        return found | self._unsafe(failed), failed

    def _free_name(self, name: str) -> str:
        """Return a member's name, with a number behind it if another member has the name."""
        numbered = (f"{name}#{number}" for number in itertools.count(2))
        names = itertools.chain([name], numbered)
        return next(one for one in names if one not in self.members)

    def _score_single(self, guard: Guard) -> tuple[dict[str, Trajectory], set[str]]:
        """Return the trajectories and failed keys of one guard; only cache misses are asked for."""
        namespace = {"what": "star_scores", "version": 1, "guard": guard.identity}
        cache = ScoreCache(self.root, namespace)
        if self.share.ranks > 1:
            part = {key: self.requests[key] for key in self.share.own_part(list(self.requests))}
            self._fill(guard, cache, part, f"-{self.share.rank}-of-{self.share.ranks}")
        self.share.barrier()
        cache.refresh()
        found: dict[str, Trajectory] = {}
        if self.share.ranks > 1:
            found, _ = _valid_entries(guard, cache, self.requests)
        # Every rank retries the responses that no rank could score.
        left = {key: asked for key, asked in self.requests.items() if key not in found}
        more, failed = self._fill(guard, cache, left, "")
        found |= more
        if len(failed) > (TOLERATED_FAILURES if self.part else 0) and not found:
            raise none_scored_error(guard.name, len(failed))
        _check_label_mass(guard, found.values())
        return found | self._unsafe(failed), failed

    def _fill(
        self, guard: Guard, cache: ScoreCache, requests: Mapping[str, PrefixRequest], part: str
    ) -> tuple[dict[str, Trajectory], set[str]]:
        """Return the trajectories of requests, and the keys that could not be scored.

        Args:
            guard: The guard to ask.
            cache: The guard's cache.
            requests: The requests by key.
            part: The lock's name (see `ScoreCache.lock`).
        """
        found, _ = _valid_entries(guard, cache, requests)
        # The cache is read before it is locked, because a complete cache may be read-only.
        if len(found) == len(requests):
            return found, set()
        with cache.lock(part):
            found, invalid = _valid_entries(guard, cache, requests)
            if invalid:
                logger.warning(
                    "Ignored %d entries of the cache in %s, which do not fit the requests to %r; "
                    "they are computed again.",
                    invalid,
                    cache.folder,
                    guard.name,
                )
            return found, self._ask_missing(guard, requests, found, cache)

    def _unsafe(self, keys: Iterable[str]) -> dict[str, Trajectory]:
        """Return trajectories of zeros, for responses that could not be scored."""
        return {key: Trajectory((0.0,) * len(self.requests[key].ends)) for key in keys}

    def _ask_missing(
        self,
        guard: Guard,
        requests: Mapping[str, PrefixRequest],
        found: dict[str, Trajectory],
        cache: ScoreCache,
    ) -> set[str]:
        """Ask the guard for every batch with a response that is not in `found`, and add it there.

        Returns:
            The keys that the guard could not score. They are not cached, so the next run retries
            them.
        """
        keys, wanted = list(requests), list(requests.values())
        todo = [b for b in guard.plan(wanted) if any(keys[i] not in found for i in b)]
        bar = tqdm(
            total=sum(len(wanted[i].ends) for batch in todo for i in batch),
            desc=f"STAR scores by {guard.name}",
            unit="prefix",
            disable=not self.progress or not todo,
            smoothing=0,  # estimate from the overall mean: recent batches do not predict later ones
        )
        started = time.monotonic()
        responses, failed = 0, set[str]()
        try:
            for batch in todo:
                results = self._ask_batch(guard, {keys[i]: wanted[i] for i in batch})
                failed |= {keys[i] for i in batch} - results.keys() - found.keys()
                for key, result in results.items():
                    if key not in found:
                        found[key] = result
                        cache.put(key, result)
                now, responses = time.monotonic(), responses + len(batch)
                bar.set_postfix_str(
                    f"{responses / max(now - started, 1e-9):.2f} responses/s", refresh=False
                )
                bar.update(sum(len(wanted[i].ends) for i in batch))
                cache.flush_if_due()
        finally:
            cache.flush()
            bar.close()
        return failed

    def _ask_batch(self, guard: Guard, batch: Mapping[str, PrefixRequest]) -> dict[str, Trajectory]:
        """Return a batch's trajectories; unless `strict`, leave out responses that fail."""
        left = dict(batch)
        while left:
            keys, requests = list(left), list(left.values())
            try:
                results = guard.trajectories(requests)
            except GuardError as error:
                about = keys if error.request is None else [keys[error.request]]
                rows = sorted({self.rows[key] for key in about})
                if self.strict or error.request is None:
                    error.at(rows=tuple(rows))
                    raise
                logger.warning("Row %s counts as unsafe: %s", rows[0], error)
                del left[about[0]]
                continue
            check_trajectories(guard.name, requests, results)
            return dict(zip(keys, results, strict=True))
        return {}


def none_scored_error(name: str, responses: int) -> GuardError:
    """Return the error for a guard that could not score any response."""
    return GuardError(
        f"Guard {name!r} could not score a single one of {responses} responses. With "
        "on_guard_error='unsafe' all would count as unsafe. The warnings above say why."
    )


def _valid_entries(
    guard: Guard, cache: ScoreCache, requests: Mapping[str, PrefixRequest]
) -> tuple[dict[str, Trajectory], int]:
    """Return the valid cached trajectories of requests.

    Entries are checked because any process may have written them.

    Returns:
        The trajectories by key, and the number of invalid entries.
    """
    found, invalid = {}, 0
    for key, request in requests.items():
        known = cache.get(key)
        if known is None:
            continue
        try:
            check_trajectories(guard.name, [request], [known])
        except GuardError:
            invalid += 1
        else:
            found[key] = known
    return found, invalid


def _check_label_mass(guard: Guard, trajectories: Iterable[Trajectory]) -> None:
    masses = [m for t in trajectories if t.label_mass is not None for m in t.label_mass]
    if masses and float(np.mean(masses)) < guard.min_label_mass:
        mean = float(np.mean(masses))
        raise low_label_mass(guard.name, mean, guard.min_label_mass, "the data")
