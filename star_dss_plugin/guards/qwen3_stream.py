"""Score tokens with Qwen3Guard-Stream: token-level heads on a Qwen3, one pass per response.

The vendor's module needs remote code; this one uses transformers' Qwen3. The head's output at a
token rates the response up to that token (Qwen3Guard report, arXiv 2510.14276, section on the
stream variant).
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoTokenizer, Qwen3Config

from star_dss_plugin.data.requests import Message, PrefixRequest
from star_dss_plugin.engines.padding import padded
from star_dss_plugin.guards.attempts import Markers
from star_dss_plugin.guards.base import (
    StreamingGuard,
    batches,
    consecutive_batches,
    non_finite_error,
)
from star_dss_plugin.guards.prompting.prompts import Prompts
from star_dss_plugin.guards.prompting.template import GuardTemplate
from star_dss_plugin.guards.self_check import run_self_check, self_check_identity
from star_dss_plugin.models.devices import default_device, resolve_dtype
from star_dss_plugin.models.fingerprints import weights_fingerprint
from star_dss_plugin.models.loading import load_weights, not_loadable
from star_dss_plugin.unpatched import unpatched_module
from star_dss_plugin.validation import probability

__all__ = ["Qwen3GuardStreamModel", "Qwen3StreamGuard"]

logger = logging.getLogger(__name__)

_LABELS = ("Safe", "Unsafe", "Controversial")
_RESPONSES_PER_CALL = 64

_qwen3: Any = unpatched_module("transformers.models.qwen3.modeling_qwen3")


class Qwen3GuardStreamModel(_qwen3.Qwen3PreTrainedModel):  # type: ignore[misc]
    """Add four heads to a Qwen3. The heads named `query_` judge questions and are not used here."""

    def __init__(self, config: Qwen3Config) -> None:
        super().__init__(config)
        self.model = _qwen3.Qwen3Model(config)
        hidden, inner = config.hidden_size, config.guard_inner_size
        for query in ("", "query_"):
            risks = getattr(config, f"num_{query}risk_level")
            categories = getattr(config, f"num_{query}category")
            layers = {
                f"{query}risk_level_category_pre": nn.Linear(hidden, inner, bias=False),
                f"{query}risk_level_category_layernorm": _qwen3.Qwen3RMSNorm(
                    inner, config.rms_norm_eps
                ),
                f"{query}risk_level_head": nn.Linear(inner, risks, bias=False),
                f"{query}category_head": nn.Linear(inner, categories, bias=False),
            }
            for name, layer in layers.items():
                self.add_module(name, layer)
        self.post_init()

    def forward(self, input_ids: Tensor) -> Tensor:
        """Return risk logits, (B, T, levels), of the response up to each token of (B, T) ids."""
        states = self.model(input_ids, use_cache=False).last_hidden_state
        for name in ("risk_level_category_pre", "risk_level_category_layernorm", "risk_level_head"):
            states = self.get_submodule(name)(states)
        logits: Tensor = states
        return logits


class Qwen3StreamGuard(StreamingGuard):
    """Score each token of a response with Qwen3Guard-Stream.

    Args:
        model: Hugging Face Hub id or folder.
        controversial_weight: Share of P(controversial) that counts as safe: 0 strict, 1 loose.
        self_check: Whether the guard must rate a safe probe above an unsafe one before it is used.
        name: Name in the start-up line.
        revision: Hub revision.
        device: Torch device; None is the GPU if there is one.
        dtype: "auto" (bfloat16 on a GPU, float32 on a CPU) or a torch dtype's name.
        batch_tokens: Upper bound on the tokens of one forward pass, padding included.

    Raises:
        GuardError: The guard cannot be loaded, or its weights are incomplete or unexpected.
        ConfigError: `controversial_weight` is not in [0, 1].
    """

    def __init__(
        self,
        model: str,
        *,
        controversial_weight: float = 0.0,
        self_check: bool = True,
        name: str | None = None,
        revision: str | None = None,
        device: str | None = None,
        dtype: str | None = None,
        batch_tokens: int = 16384,
    ) -> None:
        probability("controversial_weight", controversial_weight)
        self.name = name or model
        self._source = model
        self._hub: dict[str, Any] = {"revision": revision}
        self._self_check = self_check
        self._batch_tokens = batch_tokens
        self._device = default_device(device)
        self._dtype = resolve_dtype(dtype, self._device)
        self._model: Any = None
        try:
            # AutoConfig would follow the model's reference to remote code, which is never run here.
            config = Qwen3Config.from_pretrained(model, **self._hub)
            tokenizer = AutoTokenizer.from_pretrained(model, **self._hub)
        except (OSError, ValueError, KeyError) as error:
            raise not_loadable(self.name, model, error) from error
        self._weights = self._level_weights(config, controversial_weight)
        self._template = GuardTemplate(
            tokenizer,
            name=self.name,
            chat_template=None,
            template_kwargs={"enable_thinking": False},
            prefill="",
        )
        longest = config.max_position_embeddings
        self._prompts = Prompts(self.name, [self._template], "all", longest)
        self.markers = Markers(self._template.control_tokens)
        self._identity = {
            "kind": "qwen3-stream",
            "version": 1,
            "model": model,
            "weights": weights_fingerprint(model, config),
            "template": hashlib.sha256(self._template.source.encode()).hexdigest(),
            "levels": self._weights,
            "dtype": str(self._dtype),
            **self_check_identity(self_check),
        }

    @property
    def identity(self) -> dict[str, Any]:
        return dict(self._identity)

    def plan(self, requests: Sequence[PrefixRequest]) -> list[list[int]]:
        """Return the responses in their order, up to 64 per batch."""
        return consecutive_batches(len(requests), _RESPONSES_PER_CALL)

    def token_scores(
        self, responses: Sequence[tuple[Sequence[Message], str]]
    ) -> list[list[tuple[int, float]]]:
        if self._model is None:
            self._load()
        rows = []
        for i, (context, text) in enumerate(responses):
            request = PrefixRequest(tuple(context), text, (len(text),))
            rows.append(
                self._template.prompt_with_response(self._prompts.fit_context(i, request), text)
            )
        found: list[list[tuple[int, float]]] = [[] for _ in rows]
        for batch in batches([len(ids) for ids, _ in rows], self._batch_tokens):
            for i, scores in zip(batch, self._forward([rows[i][0] for i in batch]), strict=True):
                ends = rows[i][1] or [0]  # an empty response: the score of the last context token
                if not all(0 <= score <= 1 for score in scores):
                    raise non_finite_error(self.name, i)
                found[i] = list(zip(ends, scores[-len(ends) :], strict=True))
        return found

    def truncates(self, request: PrefixRequest) -> bool:
        return self._prompts.truncates(request)

    def explained(self, request: PrefixRequest) -> dict[str, str]:
        ids, ends = self._template.prompt_with_response(
            self._prompts.fit_context(0, request), request.text
        )
        return {"prompt": self._template.decode(ids), "scores": f"at the last {len(ends)} tokens"}

    def close(self) -> None:
        self._model = None
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    @torch.inference_mode()
    def _forward(self, rows: Sequence[Sequence[int]]) -> list[list[float]]:
        """Return P(safe) at every token of each row."""
        # Padding follows the text and attention is causal, so no mask is needed.
        ids, _ = padded(rows, self._device)
        levels = self._model(ids).double().softmax(-1).cpu()
        safe = (levels @ torch.tensor(self._weights, dtype=torch.float64)).clamp(0, 1)
        return [scores[: len(row)].tolist() for scores, row in zip(safe, rows, strict=True)]

    def _load(self) -> None:
        logger.info("Loading guard %s on %s (%s)", self.name, self._device, self._dtype)
        self._model = load_weights(
            Qwen3GuardStreamModel,
            self.name,
            self._source,
            device=self._device,
            dtype=self._dtype,
            exact=True,
            **self._hub,
        )
        run_self_check(self, self_check=self._self_check)

    def _level_weights(self, config: Any, controversial_weight: float) -> list[float]:
        """Return the share of each risk level that counts as safe, in the order of the outputs."""
        names = getattr(config, "response_risk_level_map", None) or {}
        levels = {str(name): int(index) for index, name in names.items()}
        if sorted(levels) != sorted(_LABELS) or sorted(levels.values()) != [0, 1, 2]:
            raise not_loadable(
                self.name,
                self._source,
                ValueError(f"its response_risk_level_map is {names!r}, which is not {_LABELS}"),
            )
        weights = [0.0] * len(levels)
        weights[levels["Safe"]] = 1.0
        weights[levels["Controversial"]] = float(controversial_weight)
        return weights
