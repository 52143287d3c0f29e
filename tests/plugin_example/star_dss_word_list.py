"""A whole STAR-DSS plugin in one file: a guard and a weight map.

The entry point in `pyproject.toml` names this module. After its installation next to
star-dss-plugin, a configuration may say `guard: {preset: word-list, words: [...]}` and
`loss_type: star_dss_squared`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from star_dss_plugin import hookimpl
from star_dss_plugin.guards.base import Message, StreamingGuard
from star_dss_plugin.hookspecs import GuardInfo, Register, RegisterGuard

if TYPE_CHECKING:
    from torch import Tensor


class WordListGuard(StreamingGuard):
    """Divide P(safe), which starts at 1, by ten at every listed word of the response.

    Args:
        words: The listed words, in any case.
        options: The common options of guards (device, dtype, batch_tokens), which are not used.
    """

    name = "word-list"
    demonstration = True

    def __init__(self, words: Sequence[str], **options: Any) -> None:
        self.words = sorted({word.casefold() for word in words})

    @property
    def identity(self) -> dict[str, Any]:
        return {"guard": "star-dss-word-list", "version": 1, "words": self.words}

    def token_scores(
        self, responses: Sequence[tuple[Sequence[Message], str]]
    ) -> list[list[tuple[int, float]]]:
        return [self._score(text) for _, text in responses]

    def _score(self, text: str) -> list[tuple[int, float]]:
        scores, p_safe = [(0, 1.0)], 1.0
        for word in re.finditer(r"\w+", text):
            if word.group().casefold() in self.words:
                p_safe /= 10
            scores.append((word.end(), p_safe))
        return scores


def star_dss_squared(
    scores: Tensor, last_scores: Tensor, *, kl_coef: float, threshold: float
) -> tuple[Tensor, Tensor]:
    """Return s_t² and λ(1 − s_t²): like `star_dss`, with less weight for doubtful tokens."""
    return scores**2, kl_coef * (1 - scores**2)


@hookimpl
def star_dss_register_guards(register: RegisterGuard) -> None:
    register(
        "word-list",
        WordListGuard,
        summary="P(safe) falls with every listed word",
        info=GuardInfo(licence="Apache-2.0", reads="once"),
    )


@hookimpl
def star_dss_register_weight_maps(register: Register) -> None:
    register("star_dss_squared", star_dss_squared, summary="CE s_t², KL λ(1 − s_t²)")
