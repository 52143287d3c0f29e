"""Find the tokens of a guard's verdict labels, and read P(safe) from their log-probabilities."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from star_dss_plugin.data.requests import Trajectory
from star_dss_plugin.errors import ConfigError, GuardError
from star_dss_plugin.guards.base import non_finite_error
from star_dss_plugin.guards.prompting.template import GuardTemplate

__all__ = ["VerdictLabels", "other_verdicts"]


@dataclass(frozen=True)
class VerdictLabels:
    """Hold the first tokens of a guard's labels.

    Attributes:
        name: The guard's name, for errors.
        groups: Token ids of the safe, the unsafe and, if there is one, the controversial verdict.
        controversial_weight: Share of P(controversial) that counts as safe.
    """

    name: str
    groups: list[list[int]]
    controversial_weight: float

    @classmethod
    def from_spellings(
        cls,
        name: str,
        template: GuardTemplate,
        spellings: Sequence[Sequence[str]],
        controversial_weight: float,
    ) -> VerdictLabels:
        """Find the first token of each spelling at the verdict position.

        Args:
            name: The guard's name, for errors.
            template: The guard's template.
            spellings: The spellings of each verdict, in the order of `groups`.
            controversial_weight: As the attribute.

        Raises:
            ConfigError: A verdict has no spelling, or two verdicts begin with the same token.
        """
        groups = [_first_tokens(name, template, one) for one in spellings]
        ids = [i for group in groups for i in group]
        if len(set(ids)) != len(ids):
            raise ConfigError(
                f"Guard {name!r}: labels {[list(one) for one in spellings]} begin with the same "
                f"token ({groups}), so they cannot be told apart at the verdict "
                "position. Move their common beginning into 'prefill'."
            )
        return cls(name, groups, controversial_weight)

    @property
    def ids(self) -> list[int]:
        """Return the token ids of all groups, in order."""
        return [i for group in self.groups for i in group]

    def trajectory(self, index: int, logprobs: torch.Tensor) -> Trajectory:
        """Convert log-probabilities (prefixes, labels) of one response to its trajectory.

        Raises:
            GuardError: A score is NaN or infinite; the error carries the request's `index`.
        """
        logprobs = logprobs.double()
        groups = torch.split(logprobs, [len(g) for g in self.groups], -1)
        verdict = torch.stack([g.logsumexp(-1) for g in groups], -1).softmax(-1)
        safe = verdict[:, 0]
        if len(self.groups) == 3:
            safe = safe + self.controversial_weight * verdict[:, 2]
        mass = logprobs.exp().sum(-1).clamp(max=1)
        if not bool(safe.isfinite().all()):
            raise non_finite_error(self.name, index)
        return Trajectory(tuple(safe.clamp(0, 1).tolist()), tuple(mass.tolist()))


def _first_tokens(name: str, template: GuardTemplate, spellings: Sequence[str]) -> list[int]:
    if isinstance(spellings, str) or not spellings or not all(spellings):
        raise ConfigError(
            f"Guard {name!r}: labels must be a non-empty list of spellings, such as "
            f"[' Safe'], not {spellings!r}."
        )
    return template.label_ids(spellings)


def other_verdicts(name: str, tokenizer: Any, mapping: str, safe: Sequence[str]) -> list[str]:
    """Return the verdicts in a mapping of the tokenizer's configuration that are not safe.

    Args:
        name: The guard's name, for errors.
        tokenizer: The guard's tokenizer.
        mapping: Name of the mapping, whose keys are the guard's verdicts.
        safe: The safe verdicts.

    Raises:
        GuardError: There is no such mapping, or it lacks a safe verdict or any other.
    """
    verdicts = tokenizer.init_kwargs.get(mapping)
    if not isinstance(verdicts, Mapping) or not set(safe) < set(verdicts):
        raise GuardError(
            f"The tokenizer of guard {name!r} has no mapping {mapping!r} with {list(safe)} "
            "and other verdicts among its keys. Name the verdicts in 'unsafe_labels'."
        )
    return [verdict for verdict in verdicts if verdict not in safe]
