"""Write requests of the completions API, and read label log-probabilities from the answers.

`return_tokens_as_token_ids` and `logprob_token_ids` are vLLM's extensions of OpenAI's API.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

from star_dss_plugin.engines.label_rows import label_row
from star_dss_plugin.errors import GuardError
from star_dss_plugin.validation import shortened
from star_dss_plugin.visible import visible_line

__all__ = ["completion_request", "read_completions"]

_TOKEN_ID = re.compile(r"(?:token_id:)?([0-9]{1,9})")


def completion_request(
    model: str, prompts: Sequence[Sequence[int]], label_ids: Sequence[int]
) -> dict[str, Any]:
    """Return the body of a request for the labels' log-probabilities after prompts."""
    return {
        "model": model,
        "prompt": prompts,
        "max_tokens": 1,
        "temperature": 0.0,
        "logprobs": len(label_ids),
        "logprob_token_ids": list(label_ids),
        "return_tokens_as_token_ids": True,
    }


def read_completions(
    answer: Any,
    prompts: Sequence[Sequence[int]],
    label_ids: Sequence[int],
    *,
    url: str,
    model: str,
) -> list[list[float]]:
    """Return the labels' log-probabilities after each prompt.

    Args:
        answer: The answer's JSON object.
        prompts: The prompts that were sent.
        label_ids: The label token ids that were sent.
        url: The server's address, for errors.
        model: The guard's name on the server, for errors.

    Raises:
        GuardError: The answer lacks log-probabilities, or is one to other prompts.
    """
    try:
        found = {
            choice["index"]: _token_logprobs(choice["logprobs"]["top_logprobs"][0])
            for choice in answer["choices"]
        }
        answers, tokens = len(answer["choices"]), answer["usage"]["prompt_tokens"]
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise GuardError(
            f"The server at {url} answered without log-probabilities of token ids "
            f"({type(error).__name__}: {visible_line(str(error))}). The engine needs vLLM 0.32 "
            f"or newer: vllm serve {model}"
        ) from error
    expected = sum(map(len, prompts))
    if answers != len(prompts) or tokens != expected:
        raise GuardError(
            f"The server at {url} read {shortened(tokens)} tokens in {answers} prompts; "
            f"it was sent {expected} in {len(prompts)}. It changes prompts: start it without "
            "truncation and with the guard's own model."
        )
    # A repeated number would leave another prompt without its answer.
    if any(type(i) is not int for i in found) or set(found) != set(range(len(prompts))):
        raise GuardError(
            f"The server at {url} numbers its answers "
            f"{shortened(list(found))}; they must be 0 to {len(prompts) - 1}, each once."
        )
    return [label_row(found[i], label_ids) for i in range(len(prompts))]


def _token_logprobs(listed: Any) -> dict[int, float]:
    """Return the log-probabilities of token ids from one choice of an answer.

    Raises:
        AttributeError, TypeError, ValueError: It is not a mapping from "token_id:N" to numbers.
    """
    found: dict[int, float] = {}
    for name, value in listed.items():
        match = _TOKEN_ID.fullmatch(name)
        if match is None or type(value) not in (int, float):
            raise ValueError(f"{shortened(name)}: {shortened(value)}")
        found[int(match[1])] = float(value) if abs(value) < 1e9 else math.nan
    return found
