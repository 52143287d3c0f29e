"""Score prefixes with encoders that classify a (prompt, response) pair, in batches."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForSequenceClassification

from star_dss_plugin.data.requests import PrefixRequest, Trajectory
from star_dss_plugin.errors import ConfigError, GuardError
from star_dss_plugin.guards.attempts import Markers
from star_dss_plugin.guards.base import Guard, batches, non_finite_error
from star_dss_plugin.guards.prompting.content import ContentTokenizer, without_surrogates
from star_dss_plugin.guards.self_check import run_self_check, self_check_identity
from star_dss_plugin.models.devices import default_device, resolve_dtype
from star_dss_plugin.models.fingerprints import weights_fingerprint
from star_dss_plugin.models.loading import load_config, load_weights

__all__ = ["ClassifierGuard"]

logger = logging.getLogger(__name__)

_POSITIONS_BEHIND_PADDING = frozenset(
    {
        *("roberta", "roberta-prelayernorm", "xlm-roberta", "xlm-roberta-xl", "camembert", "xmod"),
        *("data2vec-text", "ibert", "longformer", "luke", "mpnet", "esm", "markuplm"),
    }
)
"""Model types that count positions from the padding token's id plus 1: a text can use 512 of
RoBERTa's 514 positions."""


class ClassifierGuard(Guard):
    """Score responses with any `AutoModelForSequenceClassification` trained on (prompt, response).

    The prompt is the last question. If the pair is too long, the start of the prompt is cut.

    Args:
        model: Hugging Face Hub id or folder.
        unsafe_class: Index of the unsafe class; its softmax probability is 1 − P(safe). For a model
            with one output, the sigmoid of that output is 1 − P(safe).
        self_check: Whether the guard must rate a safe probe above an unsafe one before it is used.
        name: Name in the start-up line.
        revision: Hub revision.
        trust_remote_code: Passed to transformers; off by default.
        device: Torch device; None is the GPU if there is one.
        dtype: "auto" (bfloat16 on a GPU, float32 on a CPU) or a torch dtype's name.
        batch_tokens: Upper bound on the tokens of one forward pass, padding included.

    Raises:
        GuardError: The guard cannot be loaded.
        ConfigError: `unsafe_class` is not a class of the model.
    """

    def __init__(
        self,
        model: str,
        *,
        unsafe_class: int = 1,
        self_check: bool = True,
        name: str | None = None,
        revision: str | None = None,
        trust_remote_code: bool = False,
        device: str | None = None,
        dtype: str | None = None,
        batch_tokens: int = 16384,
    ) -> None:
        self.name = name or model
        self._source = model
        self._hub: dict[str, Any] = {"revision": revision, "trust_remote_code": trust_remote_code}
        self._unsafe_class = unsafe_class
        self._self_check = self_check
        self._batch_tokens = batch_tokens
        self._device = default_device(device)
        self._dtype = resolve_dtype(dtype, self._device)
        self._model: Any = None
        config, tokenizer = load_config(self.name, model, **self._hub)
        self._classes: int = config.num_labels
        # A single output is the logit of "unsafe".
        if unsafe_class not in range(max(self._classes, 2)) or (
            self._classes == 1 and unsafe_class != 1
        ):
            raise ConfigError(
                f"unsafe_class is {unsafe_class!r}, but guard {self.name!r} has {self._classes} "
                "classes. Give the index of the one that means unsafe."
            )
        # Decoder classifiers read the last token that is not padding, so a batch needs padding ids.
        padding = getattr(config.get_text_config(), "pad_token_id", None)
        self._padding: int | None = None if padding is None or padding < 0 else padding
        self._pairs = _Pairs(tokenizer, self.name, config)
        self.markers = Markers(self._pairs.control_tokens)
        self._identity = {
            "kind": "classifier",
            "version": 2,
            "model": model,
            "weights": weights_fingerprint(model, config),
            "unsafe_class": unsafe_class,
            "dtype": str(self._dtype),
            **self_check_identity(self_check),
        }

    @property
    def identity(self) -> dict[str, Any]:
        return dict(self._identity)

    def trajectories(self, requests: Sequence[PrefixRequest]) -> list[Trajectory]:
        if self._model is None:
            self._load()
        rows: list[tuple[list[int], list[int]]] = []
        for i, request in enumerate(requests):
            question = _last_question(request)
            for end in request.ends:
                try:
                    rows.append(self._pairs(question, request.text[:end]))
                except GuardError as error:
                    error.request = i
                    raise
        scores = iter(self._scores(rows))
        found = [Trajectory(tuple(next(scores) for _ in request.ends)) for request in requests]
        for i, trajectory in enumerate(found):
            if not all(map(math.isfinite, trajectory.scores)):
                raise non_finite_error(self.name, i)
        return found

    def truncates(self, request: PrefixRequest) -> bool:
        return self._pairs.truncates(_last_question(request), request.text)

    def explained(self, request: PrefixRequest) -> dict[str, str]:
        ids, _ = self._pairs(_last_question(request), request.text)
        return {"pair": self._pairs.decode(ids), "unsafe class": str(self._unsafe_class)}

    def close(self) -> None:
        self._model = None
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    def _scores(self, rows: Sequence[tuple[list[int], list[int]]]) -> list[float]:
        """Return P(safe) of each (ids, token types), in order."""
        found = [0.0] * len(rows)
        # Without a padding token, each pair runs alone.
        budget = 1 if self._padding is None else self._batch_tokens
        for batch in batches([len(ids) for ids, _ in rows], budget):
            scores = self._safe([rows[i] for i in batch])
            for i, score in zip(batch, scores, strict=True):
                found[i] = score
        return found

    @torch.inference_mode()
    def _safe(self, rows: Sequence[tuple[list[int], list[int]]]) -> list[float]:
        """Return P(safe) of B pairs of up to T tokens, computed in one forward pass."""
        longest = max(len(ids) for ids, _ in rows)
        types, real = (torch.zeros(len(rows), longest, dtype=torch.long) for _ in range(2))
        ids = torch.full_like(real, self._padding or 0)
        for i, (tokens, kinds) in enumerate(rows):
            ids[i, : len(tokens)] = torch.tensor(tokens)
            types[i, : len(tokens)] = torch.tensor(kinds)
            real[i, : len(tokens)] = 1
        inputs = {"input_ids": ids, "attention_mask": real}
        if self._pairs.has_types:
            inputs["token_type_ids"] = types
        inputs = {name: value.to(self._device) for name, value in inputs.items()}
        logits: Tensor = self._model(**inputs).logits.double().cpu()
        if self._classes == 1:
            unsafe = logits[:, 0].sigmoid()
        else:
            unsafe = logits.softmax(-1)[:, self._unsafe_class]
        return (1 - unsafe).tolist()

    def _load(self) -> None:
        logger.info("Loading guard %s on %s (%s)", self.name, self._device, self._dtype)
        self._model = load_weights(
            AutoModelForSequenceClassification,
            self.name,
            self._source,
            device=self._device,
            dtype=self._dtype,
            **self._hub,
        )
        run_self_check(self, self_check=self._self_check)


class _Pairs:
    """Build the ids of (prompt, response) as the tokenizer does, without control tokens in content.

    Attributes:
        has_types: Whether the model takes token type ids.
        control_tokens: Spellings of the control tokens, which content never becomes.
    """

    def __init__(self, tokenizer: Any, name: str, config: Any) -> None:
        self._tokenizer = tokenizer
        # The unknown token is harmless in content: it does not separate prompt and response.
        self._content = ContentTokenizer(tokenizer, name, {tokenizer.unk_token_id})
        self._name = name
        self.control_tokens = tuple(self._content.control)
        limits = (tokenizer.model_max_length, getattr(config, "max_position_embeddings", None))
        self._most: int = min(limit for limit in limits if limit)
        if config.model_type in _POSITIONS_BEHIND_PADDING and limits[1]:
            self._most = min(self._most, limits[1] - (config.pad_token_id or 0) - 1)
        encoded = tokenizer("good", "fine")
        parts = encoded.sequence_ids()
        ids, self.has_types = encoded["input_ids"], "token_type_ids" in encoded
        types = encoded.get("token_type_ids", [0] * len(ids))
        first, second = parts.index(0), parts.index(1)
        behind = [len(parts) - parts[::-1].index(part) for part in (0, 1)]
        cuts = ((0, first), (behind[0], second), (behind[1], len(ids)))
        self._frame = [(ids[a:b], types[a:b]) for a, b in cuts]
        self._types = (types[first], types[second])
        # An empty response is not checked, because tokenizers treat it as a missing second part.
        for prompt, response in (("What's 2 + 2?", "It is 4. Done."), (" Hi ", "\nÇa va? ")):
            if self(prompt, response)[0] != tokenizer(prompt, response)["input_ids"]:
                raise GuardError(
                    f"The tokenizer of guard {name!r} gives other tokens when control tokens and "
                    "content are tokenized apart. Use another guard."
                )

    def __call__(self, prompt: str, response: str) -> tuple[list[int], list[int]]:
        """Return ids and token types of a pair, with the prompt cut at its start to fit."""
        one, two = self._encoded(prompt), self._encoded(response)
        room = self._room(two)
        if room < 0:
            raise GuardError(
                f"A response of {len(two)} tokens does not fit guard {self._name!r}, which reads "
                f"{self._most}. Shorten the data (max_length), use a guard with a longer context, "
                "or set on_guard_error='unsafe'."
            )
        one = one[max(0, len(one) - room) :]
        (before, a), (between, b), (behind, c) = self._frame
        ids = [*before, *one, *between, *two, *behind]
        types = [*a, *(self._types[0] for _ in one), *b, *(self._types[1] for _ in two), *c]
        return ids, types

    def decode(self, ids: list[int]) -> str:
        """Return the text of a pair, control tokens included."""
        return str(self._tokenizer.decode(ids))

    def truncates(self, prompt: str, response: str) -> bool:
        """Return whether the start of the prompt is cut."""
        return 0 <= self._room(self._encoded(response)) < len(self._encoded(prompt))

    def _room(self, response: list[int]) -> int:
        return self._most - sum(len(ids) for ids, _ in self._frame) - len(response)

    def _encoded(self, text: str) -> list[int]:
        return self._content.ids(without_surrogates(text))


def _last_question(request: PrefixRequest) -> str:
    questions = [m["content"] for m in request.context if m["role"] == "user"]
    return str(questions[-1]) if questions else ""
