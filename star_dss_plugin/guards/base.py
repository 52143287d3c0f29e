"""Define the interface of guards, which score how safe each prefix of a response is.

A guard gets the context of a conversation and one response, and returns P(safe) for the response
truncated at given characters: the STAR scores of the paper's section 3. Two kinds share this
interface: *verdict* guards read one prompt per prefix (`guards/verdict.py`), *streaming* guards
read a response once and score each token.
"""

from __future__ import annotations

import abc
import bisect
from collections.abc import Sequence
from typing import Any

from star_dss_plugin.data.requests import Message, PrefixRequest, Trajectory
from star_dss_plugin.errors import DataError, GuardError
from star_dss_plugin.guards.attempts import Markers
from star_dss_plugin.visible import visible_line

__all__ = [
    "Guard",
    "Message",
    "PrefixRequest",
    "StreamingGuard",
    "Trajectory",
    "ask",
    "batches",
    "check_trajectories",
    "consecutive_batches",
    "display_name",
    "lowest_trajectory",
    "non_finite_error",
]


def display_name(name: str, demonstration: bool) -> str:
    """Return a guard's name for users on one line, marked if the guard is a demonstration.

    Scored data names the guard that scored it, so the name is untrusted text.
    """
    name = visible_line(name)
    return f"{name} (DEMONSTRATION ONLY, protects nobody)" if demonstration else name


def ask(guard: Guard, requests: Sequence[PrefixRequest]) -> list[Trajectory]:
    """Return the guard's trajectories of requests, in order, computed in the plan's batches."""
    found: dict[int, Trajectory] = {}
    for batch in guard.plan(requests):
        try:
            results = guard.trajectories([requests[i] for i in batch])
        except GuardError as error:
            if error.request is not None:
                error.request = batch[error.request]
            raise
        check_trajectories(guard.name, [requests[i] for i in batch], results)
        found.update(zip(batch, results, strict=True))
    return [found[i] for i in range(len(requests))]


def batches(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Group indices into batches of similar length whose padded size is at most `budget` tokens."""
    found: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lambda i: (lengths[i], i)):
        if found and (len(found[-1]) + 1) * lengths[i] <= budget:
            found[-1].append(i)
        else:
            found.append([i])
    return found


def consecutive_batches(count: int, size: int) -> list[list[int]]:
    """Group `count` indices, in order, into batches of up to `size`."""
    return [list(range(i, min(i + size, count))) for i in range(0, count, size)]


def lowest_trajectory(answers: Sequence[Trajectory]) -> Trajectory:
    """Return the pointwise minimum of several trajectories for one request.

    Label masses are the minimum too, or None unless every trajectory has them.
    """
    masses = [a.label_mass for a in answers if a.label_mass is not None]
    return Trajectory(
        tuple(map(min, zip(*(a.scores for a in answers), strict=True))),
        tuple(map(min, zip(*masses, strict=True))) if len(masses) == len(answers) else None,
    )


def check_trajectories(
    name: str, requests: Sequence[PrefixRequest], results: Sequence[Trajectory]
) -> None:
    """Check a guard's results, because plugin code may be wrong and the loss relies on them.

    Raises:
        GuardError: The number of trajectories is not that of the requests, or a trajectory does not
            have one probability for each prefix.
    """
    if len(results) != len(requests):
        raise GuardError(
            f"Guard {name!r} returned {len(results)} trajectories for {len(requests)} "
            "responses; it must return one for each, in order."
        )
    for request, result in zip(requests, results, strict=True):
        masses = result.scores if result.label_mass is None else result.label_mass
        for what, values in (("scores", result.scores), ("label_mass", masses)):
            if len(values) != len(request.ends) or not all(0 <= v <= 1 for v in values):
                raise GuardError(
                    f"Guard {name!r} returned the {what} {values!r} for "
                    f"{len(request.ends)} prefixes; it must return one probability in [0, 1] for "
                    "each."
                )


def non_finite_error(name: str, request: int) -> GuardError:
    """Return the error for a guard that computed NaN or infinity for a request of its batch."""
    return GuardError(
        f"Guard {name!r} returned scores that are not numbers. Try guard_dtype='float32', or "
        "another guard.",
        request=request,
    )


class Guard(abc.ABC):
    """Score prefixes of responses with a safety model.

    Weights are loaded on first use, so that a fully cached run never loads them.

    Attributes:
        name: Name in the start-up line.
        demonstration: True for guards that give no protection; `display_name` marks their name.
        min_label_mass: Lowest acceptable mean of `Trajectory.label_mass` over the data.
        markers: Patterns of text that imitates the guard's prompt; responses with them are counted.
    """

    name: str
    demonstration: bool = False
    min_label_mass: float = 0.0
    markers: Markers = Markers()

    @property
    @abc.abstractmethod
    def identity(self) -> dict[str, Any]:
        """Return everything that changes a score, as JSON values.

        This is the guard's part of the cache key. It must be available without loading weights.
        """

    @abc.abstractmethod
    def trajectories(self, requests: Sequence[PrefixRequest]) -> list[Trajectory]:
        """Score all prefixes of one batch of `plan`: one trajectory per request, in order."""

    def plan(self, requests: Sequence[PrefixRequest]) -> list[list[int]]:
        """Return batches of indices into `requests`, each computed by one call of `trajectories`.

        The plan depends on the requests alone, never on the cache. So a resumed run computes the
        same batches, and hence the same floats, as an uninterrupted one.
        """
        return [[i] for i in range(len(requests))]

    def truncates(self, request: PrefixRequest) -> bool:
        """Return whether the guard leaves out the start of a context; called without weights."""
        return False

    def explained(self, request: PrefixRequest) -> dict[str, str]:
        """Return lines for `star-dss guards check`, by title; called without weights."""
        return {}

    def close(self) -> None:  # noqa: B027 (a guard that holds nothing has nothing to free)
        """Free the weights. The guard loads them again when it is used again."""

    def score(self, conversations: Sequence[Sequence[Message]]) -> list[float]:
        """Return P(safe) of the last assistant turn of each conversation.

        Args:
            conversations: Lists of messages, each ending with an assistant message.

        Returns:
            One float in [0, 1] per conversation.

        Raises:
            DataError: A conversation does not end with an assistant message, or is not text.
        """
        requests = []
        for i, messages in enumerate(conversations):
            if not messages or messages[-1]["role"] != "assistant":
                raise DataError(
                    f"Conversation {i} does not end with an assistant message, so there is no "
                    "response to score. End it with {'role': 'assistant', 'content': ...}."
                )
            if not all(isinstance(m["content"], str) for m in messages):
                raise DataError(
                    f"Conversation {i} has a message whose content is not text. Give each message "
                    "one string: join the parts of a typed content, leave tool calls out."
                )
            text = messages[-1]["content"]
            requests.append(PrefixRequest(tuple(messages[:-1]), text, (len(text),)))
        return [trajectory.scores[-1] for trajectory in ask(self, requests)]


class StreamingGuard(Guard):
    """Read each response once and score every token of it."""

    @abc.abstractmethod
    def token_scores(
        self, responses: Sequence[tuple[Sequence[Message], str]]
    ) -> list[list[tuple[int, float]]]:
        """Score the tokens of each (context, response text) pair.

        Returns:
            For each response a list of (char_end, p_safe), one per token of the guard, char_end
            non-decreasing: P(safe) of the response up to that character. At least one entry, even
            for an empty response.
        """

    def trajectories(self, requests: Sequence[PrefixRequest]) -> list[Trajectory]:
        tokens = self.token_scores([(r.context, r.text) for r in requests])
        if len(tokens) != len(requests):
            raise GuardError(
                f"Guard {self.name!r} returned the token scores of {len(tokens)} responses for "
                f"{len(requests)}; token_scores must return a list for each, in order."
            )
        return [_at_ends(self.name, r, t) for r, t in zip(requests, tokens, strict=True)]


def _at_ends(name: str, request: PrefixRequest, tokens: list[tuple[int, float]]) -> Trajectory:
    """Return the score of each prefix: that of the last guard token that ends within it.

    A prefix shorter than the first guard token gets the score of that token.
    """
    if not tokens:
        raise GuardError(
            f"Guard {name!r} returned no token score for a response of {len(request.text)} "
            "characters. token_scores must return at least one (char_end, p_safe) per response."
        )
    char_ends = [end for end, _ in tokens]
    places = [0, *char_ends, len(request.text)]
    if places != sorted(places):
        # With ends counted from the prompt's start, every prefix would silently get the first
        # token's score.
        raise GuardError(
            f"Guard {name!r} returned token scores that end at the characters {char_ends[:3]} … "
            f"{char_ends[-1]} of a response of {len(request.text)}. token_scores must count from "
            "the beginning of the response, in ascending order."
        )
    last = [bisect.bisect_right(char_ends, end) - 1 for end in request.ends]
    return Trajectory(tuple(tokens[max(i, 0)][1] for i in last))
