"""Asks guards for the trajectories that the cache does not hold, batch by batch."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from tqdm.auto import tqdm

from star_dss_plugin.cache import ScoreCache
from star_dss_plugin.errors import GuardError
from star_dss_plugin.guards.base import Guard, PrefixRequest, Trajectory, check_trajectories
from star_dss_plugin.guards.combined import CombinedGuard
from star_dss_plugin.guards.proof import low_label_mass
from star_dss_plugin.ranks import ALONE, Share

__all__ = ["Asking"]

logger = logging.getLogger(__name__)

_FLUSH_SECONDS = 20.0


@dataclass
class Asking:
    """The responses of a data set, and what guards said of them.

    Attributes:
        requests: What is to be scored, by key, in the order of the data.
        rows: The first row of each key, for messages.
        root: The cache folder.
        progress: Whether to show a progress bar.
        strict: Whether a response that cannot be scored is an error; else it counts as unsafe.
        share: This process's part of the work; all processes of the run must ask alike.
        members: If several guards were asked, the trajectories of each by its name.
        failed: Keys of the responses that could not be scored.
    """

    requests: Mapping[str, PrefixRequest]
    rows: Mapping[str, int]
    root: Path
    progress: bool
    strict: bool
    share: Share = ALONE
    members: dict[str, dict[str, Trajectory]] = field(default_factory=dict)
    failed: set[str] = field(default_factory=set)

    def trajectories(self, guard: Guard) -> dict[str, Trajectory]:
        """All trajectories, of a guard that may be made of others.

        Raises:
            GuardError: A response cannot be scored, or the guard cannot be trusted.
        """
        if not isinstance(guard, CombinedGuard):
            return self._ask(guard)
        answers = []
        for part in guard.parts:
            answers.append(self.trajectories(part))
            if len(guard.parts) > 1:
                part.close()  # memory holds one at a time
                name = part.name if part.name not in self.members else f"{part.name}#{len(answers)}"
                self.members[name] = answers[-1]
        found = {key: guard.combine([answer[key] for answer in answers]) for key in self.requests}
        # Whatever the other guards say of a response that one could not score.
        return found | {key: self._unsafe(key) for key in self.failed}

    def _ask(self, guard: Guard) -> dict[str, Trajectory]:
        """All trajectories: from the cache where it has them, from the guard otherwise."""
        namespace = {"what": "star_scores", "version": 1, "guard": guard.identity}
        cache = ScoreCache(self.root, namespace)
        if self.share.of > 1:
            part = {key: self.requests[key] for key in self.share.mine(list(self.requests))}
            self._fill(guard, cache, part, f"-{self.share.index}-of-{self.share.of}")
        self.share.meet()
        cache.refresh()
        found, failed = self._fill(guard, cache, self.requests, "")
        if failed and not found:
            raise GuardError(
                f"Guard {guard.name!r} could not score a single one of {len(failed)} responses. "
                "With on_guard_error='unsafe' all would count as unsafe; the warnings above say "
                "what is wrong."
            )
        _check_label_mass(guard, found.values())
        self.failed |= failed
        return found | {key: self._unsafe(key) for key in failed}

    def _fill(
        self, guard: Guard, cache: ScoreCache, wanted: Mapping[str, PrefixRequest], part: str
    ) -> tuple[dict[str, Trajectory], set[str]]:
        """The trajectories of some requests, and the keys that the guard could not score."""
        found = _known(cache, wanted)
        # Looked up before it is locked: a complete cache may be read-only.
        if len(found) == len(wanted):
            return found, set()
        with cache.lock(part):
            found = _known(cache, wanted)
            return found, self._ask_missing(guard, wanted, found, cache)

    def _unsafe(self, key: str) -> Trajectory:
        return Trajectory((0.0,) * len(self.requests[key].ends))

    def _ask_missing(
        self,
        guard: Guard,
        requests: Mapping[str, PrefixRequest],
        found: dict[str, Trajectory],
        cache: ScoreCache,
    ) -> set[str]:
        """Asks for every batch with a response that is not in `found`, and puts it there.

        Returns:
            The keys that the guard could not score. They are not remembered: the next run asks
            again.
        """
        keys, wanted = list(requests), list(requests.values())
        todo = [b for b in guard.plan(wanted) if any(keys[i] not in found for i in b)]
        bar = tqdm(
            total=sum(len(wanted[i].ends) for batch in todo for i in batch),
            desc=f"STAR scores by {guard.name}",
            unit="prefix",
            disable=not self.progress or not todo,
            smoothing=0,  # the data's order says nothing about what is left: the mean is the guess
        )
        started = flushed = time.monotonic()
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
                if now - flushed > _FLUSH_SECONDS:
                    cache.flush()
                    flushed = time.monotonic()
        finally:
            cache.flush()
            bar.close()
        return failed

    def _ask_batch(self, guard: Guard, batch: Mapping[str, PrefixRequest]) -> dict[str, Trajectory]:
        """The trajectories of a batch; unless `strict`, without what cannot be scored."""
        left = dict(batch)
        while left:
            keys, requests = list(left), list(left.values())
            try:
                results = guard.trajectories(requests)
            except GuardError as error:
                about = keys if error.request is None else [keys[error.request]]
                where = sorted({self.rows[key] for key in about})
                shown = ", ".join(map(str, where[:5])) + (", …" if len(where) > 5 else "")
                if self.strict or error.request is None:
                    raise GuardError(f"Row {shown}: {error}") from error
                logger.warning("Row %s counts as unsafe: %s", shown, error)
                del left[about[0]]
                continue
            check_trajectories(guard.name, requests, results)
            return dict(zip(keys, results, strict=True))
        return {}


def _known(cache: ScoreCache, keys: Iterable[str]) -> dict[str, Trajectory]:
    return {key: known for key in keys if (known := cache.get(key)) is not None}


def _check_label_mass(guard: Guard, found: Iterable[Trajectory]) -> None:
    masses = [m for t in found if t.label_mass is not None for m in t.label_mass]
    if masses and float(np.mean(masses)) < guard.min_label_mass:
        mean = float(np.mean(masses))
        raise low_label_mass(guard.name, mean, guard.min_label_mass, "the data")
