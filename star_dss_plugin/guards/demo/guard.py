"""Provide the demonstration guard: a linear probe on SmolLM2-135M, which gives no protection.

It runs the whole pipeline on a laptop without network: one forward pass scores every token of a
response, as in a real streaming guard. Its scores are no real guard's scores: it recognizes the
kinds of text on which it was fitted and little else (docs/demo_guard.md). It warns whenever it is
loaded and is never a default.

At token t the probe reads the hidden state of that token, the mean of the states of the response so
far, the mean of the last few, and the state of the last context token, which reflects the question.
So P(safe) at t depends on no later token.
"""

from __future__ import annotations

import hashlib
import importlib.resources
import json
import logging
from collections.abc import Sequence
from typing import Any

import torch
from safetensors.torch import load as read_safetensors
from torch import Tensor

from star_dss_plugin.data.requests import Message, PrefixRequest
from star_dss_plugin.errors import GuardError
from star_dss_plugin.guards.attempts import Markers
from star_dss_plugin.guards.base import StreamingGuard, batches, non_finite_error
from star_dss_plugin.guards.demo.states import (
    LAYERS,
    MAX_CONTEXT,
    ROUND_A_TURN,
    Backbone,
    content_of,
)
from star_dss_plugin.models.devices import default_device, floating_dtype
from star_dss_plugin.smollm2 import gguf_fingerprint
from star_dss_plugin.validation import at_least

__all__ = ["RECENT", "DemoGuard", "probe_logits", "recent_mean", "running_mean"]

logger = logging.getLogger(__name__)

RECENT = 16
"""Window of the recent mean, in tokens: it reacts to a change faster than the running mean."""

_FORMAT = 2  # increase when the code here or in states.py changes a score


def running_mean(values: Tensor) -> Tensor:
    """Return the mean of rows 0 … t for each t, float64, shape (T + 1, D) like `values`."""
    counts = torch.arange(1, len(values) + 1, device=values.device)
    # A float32 sum would drift over a long response.
    return values.double().cumsum(0) / counts[:, None]


def recent_mean(values: Tensor) -> Tensor:
    """Return the mean of the last `RECENT` rows up to t for each t, shaped like `running_mean`."""
    sums = torch.nn.functional.pad(values.double().cumsum(0), (0, 0, 1, 0))
    ends = torch.arange(1, len(values) + 1, device=values.device)
    starts = (ends - RECENT).clamp(min=0)
    return (sums[ends] - sums[starts]) / (ends - starts)[:, None]


def probe_logits(states: Tensor, weight: Tensor, bias: float) -> Tensor:
    """Return the log-odds of "safe" at each token.

    Args:
        states: Shape (T + 1, H): the last context token, then each response token.
        weight: Shape (H, 4), one column each for a token's own state, the running mean, the recent
            mean, and the state of the last context token.
        bias: Added to every log-odds.

    Returns:
        float64 on the CPU, shape (T + 1,). Entry t depends on rows 0 … t of `states` alone.
    """
    # The mean of a projection equals the projection of the mean, and costs far less.
    own, running, recent, opening = (states @ weight).cpu().double().split(1, dim=1)
    logits: Tensor = own + running_mean(running) + recent_mean(recent) + opening[:1] + bias
    return logits[:, 0]


class DemoGuard(StreamingGuard):
    """Score each prefix of a response with a linear probe on SmolLM2-135M-Instruct.

    Args:
        device: Torch device; None is the GPU if there is one.
        dtype: Torch dtype of the model's weights. "auto" and None mean float32, in which the probe
            was fitted.
        batch_tokens: Upper bound on the tokens of one forward pass, padding included.

    Raises:
        ConfigError: An option has an invalid value.
    """

    name = "demo"
    demonstration = True
    markers = Markers(("<|im_start|>", "<|im_end|>", "<|endoftext|>"))

    def __init__(
        self,
        *,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype | None = None,
        batch_tokens: int = 16384,
    ) -> None:
        at_least("batch_tokens", batch_tokens, 1, integer=True)
        self._device = default_device(device)
        name = "float32" if dtype in (None, "auto") else str(dtype).removeprefix("torch.")
        self._dtype = floating_dtype("guard_dtype", name)
        self._batch_tokens = batch_tokens
        self._loaded: tuple[Backbone, Tensor, float] | None = None

    @property
    def identity(self) -> dict[str, Any]:
        return {
            "guard": self.name,
            "format": _FORMAT,
            "probe_sha256": hashlib.sha256(_probe_file()).hexdigest(),
            "backbone": gguf_fingerprint(),
            "dtype": str(self._dtype).removeprefix("torch."),
        }

    def plan(self, requests: Sequence[PrefixRequest]) -> list[list[int]]:
        """Batch requests of similar length, by an estimate of tokens that needs no tokenizer."""
        lengths = []
        for request in requests:
            context = sum(len(content_of(m)) for m in request.context)
            lengths.append(40 + (context + len(request.text)) // 3)
        return batches(lengths, self._batch_tokens)

    def token_scores(
        self, responses: Sequence[tuple[Sequence[Message], str]]
    ) -> list[list[tuple[int, float]]]:
        backbone, weight, bias = self._load()
        result = []
        for i, (char_ends, states) in enumerate(backbone.read(responses)):
            scores = torch.sigmoid(probe_logits(states, weight, bias)).tolist()
            if not all(0 <= s <= 1 for s in scores):
                raise non_finite_error(self.name, i)
            # scores[0] is that of the last context token, used if the response has no tokens.
            result.append(list(zip(char_ends, scores[1:], strict=True)) or [(0, scores[0])])
        return result

    def truncates(self, request: PrefixRequest) -> bool:
        # No token is shorter than a byte, so most conversations need neither tokenizer nor weights.
        contents = [content_of(m).encode("utf-8", "surrogatepass") for m in request.context]
        most = sum(map(len, contents)) + ROUND_A_TURN * (len(contents) + 1)
        return most > MAX_CONTEXT and self._load()[0].truncates(request.context)

    def close(self) -> None:
        self._loaded = None

    def _load(self) -> tuple[Backbone, Tensor, float]:
        if self._loaded is None:
            logger.warning(
                "The guard 'demo' is a demonstration and protects nobody: use it to try STAR-DSS "
                "out, never to make a model safer."
            )
            data = _probe_file()
            _check_backbone(_probe_card(data))
            probe = read_safetensors(data)
            backbone = Backbone(self._device, self._dtype, self._batch_tokens)
            weight = probe["weight"].float().to(self._device)  # (H, 4)
            self._loaded = (backbone, weight, probe["bias"].item())
        return self._loaded


def _probe_file() -> bytes:
    return importlib.resources.files(__package__).joinpath("probe.safetensors").read_bytes()


def _probe_card(data: bytes) -> dict[str, Any]:
    """Return a probe file's metadata from its bytes; safetensors reads metadata from paths only."""
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    card: dict[str, Any] = json.loads(header["__metadata__"]["card"])
    return card


def _check_backbone(card: dict[str, Any]) -> None:
    """Check that the installed model is the one that the probe was fitted on.

    On the states of another model the probe's scores would be meaningless.

    Raises:
        GuardError: The installed model file, or the blocks that are read, differ from the probe's.
    """
    found = {"backbone_sha256": gguf_fingerprint()["sha256"], "layers": list(LAYERS)}
    for key, value in found.items():
        if card[key] != value:
            raise GuardError(
                f"The demonstration guard's probe was fitted with {key} = {card[key]}, but here it "
                f"is {value}. Install the model file it was fitted on: pip install "
                f"{card['backbone_package']}"
            )
