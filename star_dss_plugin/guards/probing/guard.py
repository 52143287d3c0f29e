"""Score most prefixes with a probe from one causal pass, and the uncertain ones with the guard.

A verdict guard reads the rest of its prompt again after every prefix. But its hidden states along
the response, which one pass computes for all prefixes, already predict most of its verdicts. So the
guard scores a sample of the data, and a linear probe is fitted to predict its log-odds from these
states. In all responses, the guard then scores only the prefixes for which the probe is not
accurate enough (`bounds.py`).
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from star_dss_plugin.data.fingerprints import content_key
from star_dss_plugin.data.requests import PrefixRequest, Trajectory
from star_dss_plugin.errors import ConfigError, GuardError
from star_dss_plugin.guards.base import Guard, StreamingGuard, ask, consecutive_batches
from star_dss_plugin.guards.combined import CalibratedGuard, CombinedGuard
from star_dss_plugin.guards.probing.bounds import Bounds, HeldOut, check_bounds, probabilities
from star_dss_plugin.guards.probing.fitted import FittedProbe
from star_dss_plugin.guards.probing.linear import FOLDS, Sample, choose_probe, features, summaries
from star_dss_plugin.guards.verdict import VerdictGuard
from star_dss_plugin.validation import at_least, probability

__all__ = ["ProbedGuard", "ProbingGuard", "make_probing"]

logger = logging.getLogger(__name__)

VERSION = 2
"""Increase when a probe's scores change for the same data."""
_DEPTHS = (0.5, 0.7, 0.9)
"""Depths of the blocks that a probe may read, as shares of the number of blocks."""
_RESPONSES_PER_CALL = 256
_RESPONSES_LEAST = 4 * FOLDS

_Bools = NDArray[np.bool_]


class ProbingGuard(Guard):
    """Wrap a guard for which a probe is to be fitted, before `fit_probe`.

    `scoring/probed.py` draws the sample, calls `fit_probe` and scores with `with_probe`. By itself
    this guard returns exact scores.

    Args:
        guard: A verdict guard of the local engine, or one with calibrated scores.
        sample: Number of responses to fit the probe on, at least 20.
        tolerance: Largest accepted difference of the probe's scores from the guard's, in (0, 1].
        threshold: τ in [0, 1]; if the interval around a probe's score contains it, the guard scores
            that prefix.

    Raises:
        ConfigError: The guard is of another kind, or a number is out of range.
    """

    def __init__(
        self, guard: Guard, sample: int = 256, tolerance: float = 0.05, threshold: float = 0.5
    ) -> None:
        at_least("probe_sample", sample, _RESPONSES_LEAST, integer=True)
        probability("probe_tolerance", tolerance)
        if tolerance == 0:
            raise ConfigError(
                "probe_tolerance is 0, and no probe is exact. Give a difference that does not "
                "matter to you, such as 0.05, or use trajectory='exact'."
            )
        probability("threshold", threshold)
        self.exact, self.sample = guard, sample
        self.tolerance, self.threshold = float(tolerance), float(threshold)
        self._verdict = _verdict_guard_of(guard)
        self.name, self.demonstration = guard.name, guard.demonstration
        self.min_label_mass, self.markers = self._verdict.min_label_mass, self._verdict.markers

    @property
    def identity(self) -> dict[str, Any]:
        how = {
            "version": VERSION,
            "sample": self.sample,
            "tolerance": self.tolerance,
            "threshold": self.threshold,
        }
        return {**self.exact.identity, "trajectory": {"probed": how}}

    def plan(self, requests: Sequence[PrefixRequest]) -> list[list[int]]:
        return self.exact.plan(requests)

    def trajectories(self, requests: Sequence[PrefixRequest]) -> list[Trajectory]:
        """Return the guard's own scores, because no probe is fitted yet."""
        return self.exact.trajectories(requests)

    def truncates(self, request: PrefixRequest) -> bool:
        return self._verdict.truncates(request)

    def close(self) -> None:
        self.exact.close()

    def fit_probe(
        self,
        requests: Sequence[PrefixRequest],
        asked: Sequence[Sequence[int]],
        trajectories: Sequence[Trajectory],
        weights: Sequence[float],
    ) -> FittedProbe:
        """Fit a probe on responses that the guard has scored, and test it by cross-validation.

        Args:
            requests: At least 20 responses, in an order that does not depend on that of the data.
            asked: For each response the indices of the prefixes that the guard scored, at least
                one.
            trajectories: The guard's scores of these prefixes.
            weights: For each response, how many prefixes of the data each of its prefixes
                represents.
        """
        blocks = self._candidates()
        samples = []
        for start in range(0, len(requests), _RESPONSES_PER_CALL):
            part = slice(start, start + _RESPONSES_PER_CALL)
            states = self._verdict.trunk_states(requests[part], blocks)
            scored = zip(states, asked[part], trajectories[part], weights[part], strict=True)
            for one, indices, known, weight in scored:
                inputs = summaries(one)[list(indices)]
                samples.append(Sample(inputs, np.array(known.scores), float(weight)))
        chosen = choose_probe(samples)
        held = [
            HeldOut(logits, sample.scores, sample.weight)
            for logits, sample in zip(chosen.held_out, samples, strict=True)
        ]
        facts = {
            **check_bounds(held, self.tolerance, self.threshold),
            "responses": len(samples),
            "blocks": [blocks[k] for k in chosen.blocks],
            "penalty": chosen.penalty,
            "tolerance": self.tolerance,
        }
        bounds = Bounds.from_held_out(held, self.tolerance, self.threshold)
        return FittedProbe(tuple(blocks[k] for k in chosen.blocks), chosen.probe, bounds, facts)

    def with_probe(self, learned: FittedProbe) -> ProbedGuard:
        """Return a guard that scores with a fitted probe."""
        return ProbedGuard(self, self._verdict, learned)

    def _candidates(self) -> list[int]:
        count = self._verdict.blocks
        if count < 2:
            raise ConfigError(
                f"Guard {self.name!r} has one block, so it has no states below its last one to "
                "learn from. Use trajectory='exact'."
            )
        return sorted({min(max(round(share * count) - 1, 0), count - 2) for share in _DEPTHS})


class ProbedGuard(Guard):
    """Score with a probe, and with the guard itself where the probe is not accurate enough.

    `label_mass` marks who computed a score: 0 the probe, 1 the guard.

    Attributes:
        asked: Number of prefixes that the guard has scored so far.
        wanted: Number of prefixes that callers requested so far.
    """

    def __init__(self, probing: ProbingGuard, verdict: VerdictGuard, learned: FittedProbe) -> None:
        self._probing, self._verdict, self._learned = probing, verdict, learned
        self.name, self.demonstration = probing.name, probing.demonstration
        self.markers = probing.markers
        self.asked = self.wanted = 0

    @cached_property
    def identity(self) -> dict[str, Any]:
        made = {"probe": content_key(self._learned.dump())}
        return {**self._probing.identity, **made}

    def plan(self, requests: Sequence[PrefixRequest]) -> list[list[int]]:
        """Group responses, in order, into batches larger than the guard's own.

        Most responses need one pass only, and the guard plans its own batches for the prefixes that
        it scores.
        """
        return consecutive_batches(len(requests), _RESPONSES_PER_CALL)

    def trajectories(self, requests: Sequence[PrefixRequest]) -> list[Trajectory]:
        states = self._verdict.trunk_states(requests, self._learned.blocks)
        scores, masks = [], []
        for one in states:
            logits = self._learned.linear.logits(features(summaries(one)))
            scores.append(probabilities(logits))
            masks.append(self._learned.bounds.needs_guard(logits))
        for i, found in self._ask(requests, masks).items():
            scores[i][masks[i]] = found.scores
        self.wanted += sum(map(len, masks))
        return [
            Trajectory(tuple(found.tolist()), tuple(mask.astype(float).tolist()))
            for found, mask in zip(scores, masks, strict=True)
        ]

    def _ask(
        self, requests: Sequence[PrefixRequest], masks: Sequence[_Bools]
    ) -> dict[int, Trajectory]:
        """Return the guard's own scores of the marked prefixes, by index of the request."""
        todo = [i for i, mask in enumerate(masks) if mask.any()]
        asked = []
        for i in todo:
            ends = np.array(requests[i].ends)[masks[i]].tolist()
            asked.append(PrefixRequest(requests[i].context, requests[i].text, tuple(ends)))
        self.asked += sum(len(request.ends) for request in asked)
        try:
            return dict(zip(todo, ask(self._probing.exact, asked), strict=True))
        except GuardError as error:
            if error.request is not None:
                error.request = todo[error.request]
            raise

    def truncates(self, request: PrefixRequest) -> bool:
        return self._probing.truncates(request)

    def close(self) -> None:
        self._probing.close()


def make_probing(guard: Guard, sample: int, tolerance: float, threshold: float) -> Guard:
    """Wrap a guard in a `ProbingGuard`; in an ensemble, wrap each member.

    A streaming guard already reads a response in one pass and is returned as it is.

    Raises:
        ConfigError: The guard, or a member, is not a verdict guard of the local engine.
    """
    if isinstance(guard, StreamingGuard):
        logger.info(
            "Guard %s reads a response in one pass, so trajectory='probed' saves nothing there.",
            guard.name,
        )
        return guard
    if isinstance(guard, CalibratedGuard) and isinstance(guard.parts[0], StreamingGuard):
        return guard
    if isinstance(guard, CombinedGuard) and not isinstance(guard, CalibratedGuard):
        parts = [make_probing(part, sample, tolerance, threshold) for part in guard.parts]
        return guard.with_parts(parts)
    return ProbingGuard(guard, sample, tolerance, threshold)


def _verdict_guard_of(guard: Guard) -> VerdictGuard:
    """Return the verdict guard whose hidden states the probe reads.

    Raises:
        ConfigError: The guard has no hidden states to read.
    """
    if isinstance(guard, CalibratedGuard):
        # The probe learns the calibrated scores, and the tolerance applies to them.
        [guard] = guard.parts
    if isinstance(guard, CombinedGuard):
        raise ConfigError(
            f"trajectory is 'probed', but {guard.name} calibrates the combined score of several "
            "guards, and a probe learns the scores of one guard. Calibrate each guard by itself, "
            "or use trajectory='exact'."
        )
    if not isinstance(guard, VerdictGuard):
        raise ConfigError(
            f"trajectory is 'probed', but guard {guard.name!r} is no causal guard that answers "
            "with a verdict, so it has no hidden states along a response for a probe to read. Use "
            "trajectory='exact' or 'adaptive'."
        )
    if not guard.reads_states:
        raise ConfigError(
            f"trajectory is 'probed', but guard {guard.name!r} is computed by vLLM or a server, "
            "which give no hidden states. Use engine='local', or trajectory='exact' or 'adaptive'."
        )
    return guard
