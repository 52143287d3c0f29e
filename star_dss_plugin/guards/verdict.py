"""Score prefixes with guards that answer a prompt with a verdict word (paper, section 3, V_safe).

P(safe) is computed from the raw next-token logits at the verdict position, right after the prefill,
in one forward pass: log-sum-exp over the spellings of each label, softmax over the labels. No token
is sampled, so no sampling setting can change the score.
"""

from __future__ import annotations

import hashlib
import logging
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from star_dss_plugin.data.requests import PrefixRequest, Trajectory
from star_dss_plugin.engines.base import Engine, Weights
from star_dss_plugin.engines.local import LocalEngine
from star_dss_plugin.engines.selection import choose_engine
from star_dss_plugin.guards.attempts import Markers, scaffold_lines
from star_dss_plugin.guards.base import Guard, lowest_trajectory, non_finite_error
from star_dss_plugin.guards.prompting.prompts import Prompts, policies
from star_dss_plugin.guards.prompting.template import PINNED_DATE, GuardTemplate
from star_dss_plugin.guards.self_check import run_self_check, self_check_identity
from star_dss_plugin.guards.verdict_labels import VerdictLabels, other_verdicts
from star_dss_plugin.models.devices import default_device, resolve_dtype
from star_dss_plugin.models.fingerprints import weights_fingerprint
from star_dss_plugin.models.loading import load_config, load_weights
from star_dss_plugin.smollm2 import resolve_model
from star_dss_plugin.validation import probability

__all__ = ["VerdictGuard"]

logger = logging.getLogger(__name__)

_PREFIXES_PER_CALL = 512


class VerdictGuard(Guard):
    """Score responses with any causal guard that gives its verdict at a known position.

    Args:
        model: Hugging Face Hub id or folder.
        safe_labels: Spellings of the safe verdict, with their leading space if there is one. The
            first token of each spelling is read.
        unsafe_labels: Spellings of the unsafe verdict.
        labels_from: Name of a mapping in the tokenizer's configuration whose keys are the guard's
            verdicts. All keys except `safe_labels` become the unsafe labels.
        controversial_labels: Spellings of an intermediate verdict, if the guard has one.
        controversial_weight: Share of its probability that counts as safe: 0 strict, 1 loose.
        prefill: Text after the generation prompt, up to the verdict position.
        template_kwargs: Arguments of the chat template. A list of mappings, one per policy, gives
            one prompt per policy; a prefix gets the lowest of its scores.
        chat_template: A Jinja template that replaces the tokenizer's own.
        question: A final user turn that asks for the verdict, for templates that do not ask.
        typed_content: Whether the template reads content as `[{"type": "text", "text": …}]` instead
            of a string.
        turns: "all" for the whole conversation, "last" for the last question only.
        min_label_mass: Lowest acceptable mean probability of all label words together.
        self_check: Whether to check at loading that the guard rates a safe probe above an unsafe
            one. Only tests with random weights need to switch it off.
        name: Name in the start-up line.
        revision: Hub revision.
        trust_remote_code: Passed to transformers; off by default.
        device: Torch device; None is the GPU if there is one.
        dtype: "auto" (bfloat16 on a GPU, float32 on a CPU) or a torch dtype's name.
        batch_tokens: Upper bound on the tokens of one forward pass of the local engine.
        engine: "local", "vllm", or the address of a server (`http://host:port`).
        engine_options: Options of that engine; see docs/scale.md.

    Raises:
        GuardError: The guard cannot be loaded, or cannot be used with these options.
        ConfigError: Options are invalid or contradict each other.
    """

    def __init__(
        self,
        model: str,
        *,
        safe_labels: Sequence[str],
        unsafe_labels: Sequence[str] = (),
        labels_from: str | None = None,
        controversial_labels: Sequence[str] = (),
        controversial_weight: float = 0.0,
        prefill: str = "",
        template_kwargs: Mapping[str, Any] | Sequence[Mapping[str, Any]] | None = None,
        chat_template: str | None = None,
        question: str = "",
        typed_content: bool = False,
        turns: str = "all",
        min_label_mass: float = 0.5,
        self_check: bool = True,
        name: str | None = None,
        revision: str | None = None,
        trust_remote_code: bool = False,
        device: str | None = None,
        dtype: str | None = None,
        batch_tokens: int = 16384,
        engine: str = "local",
        engine_options: Mapping[str, Any] | str | None = None,
    ) -> None:
        probability("controversial_weight", controversial_weight)
        self.name = name or model
        self.min_label_mass = min_label_mass
        self._source = resolve_model(model)
        self._hub: dict[str, Any] = {"revision": revision, "trust_remote_code": trust_remote_code}
        self._self_check = self_check
        self._batch_tokens = batch_tokens
        self._choice = choose_engine(engine, engine_options, device=device, dtype=dtype)
        self._choice.check_installed()
        self._device = default_device(device)
        self._dtype = resolve_dtype(dtype, self._device)
        self._weights = Weights(self._source, revision, trust_remote_code, self._dtype)
        self._engine: Engine | None = None
        config, tokenizer = load_config(self.name, self._source, **self._hub)
        asked = policies(template_kwargs)
        templates = [
            GuardTemplate(
                tokenizer,
                name=self.name,
                chat_template=chat_template,
                template_kwargs=policy,
                prefill=prefill,
                question=question,
                typed_content=typed_content,
            )
            for policy in asked
        ]
        longest = getattr(config.get_text_config(), "max_position_embeddings", None)
        self._prompts = Prompts(self.name, templates, turns, longest)
        self._template = templates[0]
        if labels_from is not None:
            unsafe_labels = other_verdicts(self.name, tokenizer, labels_from, safe_labels)
        groups = [
            safe_labels,
            unsafe_labels,
            *([controversial_labels] if controversial_labels else []),
        ]
        self._labels = VerdictLabels.from_spellings(
            self.name, self._template, groups, controversial_weight
        )
        self.markers = Markers(
            self._template.control_tokens,
            scaffold_lines(self._template.ending, self._template.control_tokens),
            prefill.strip().rpartition("\n")[2],
            [label for group in groups for label in group],
        )
        self._identity = {
            "kind": "verdict",
            "version": 2,
            "model": model,
            "weights": weights_fingerprint(self._source, config),
            "template": hashlib.sha256(self._template.source.encode()).hexdigest(),
            "template_kwargs": [dict(policy) for policy in asked],
            "prefill": prefill,
            "question": question,
            "typed_content": typed_content,
            "labels": self._labels.groups,
            "controversial_weight": controversial_weight,
            "turns": turns,
            "dtype": str(self._dtype),
            "date": PINNED_DATE.date().isoformat(),
            **self._choice.identity(model),
            **self_check_identity(self_check),
        }

    @property
    def identity(self) -> dict[str, Any]:
        return dict(self._identity)

    def trajectories(self, requests: Sequence[PrefixRequest]) -> list[Trajectory]:
        if self._engine is None:
            self._load()
        assert self._engine is not None
        prompts = [self._prompts.of(i, request) for i, request in enumerate(requests)]
        found: list[list[Trajectory]] = []
        for of_policy in zip(*prompts, strict=True):
            answers = self._engine.label_logprobs(of_policy, self._labels.ids)
            found.append([self._labels.trajectory(i, answer) for i, answer in enumerate(answers)])
        return [lowest_trajectory(answers) for answers in zip(*found, strict=True)]

    def plan(self, requests: Sequence[PrefixRequest]) -> list[list[int]]:
        """Group responses, in order, into batches of up to 512 prefixes (or one response).

        Larger batches share more work between responses, but an interrupted run loses the batch
        that it was computing.
        """
        batches: list[list[int]] = []
        prefixes = _PREFIXES_PER_CALL
        for i, request in enumerate(requests):
            if prefixes + len(request.ends) > _PREFIXES_PER_CALL:
                batches.append([])
                prefixes = 0
            batches[-1].append(i)
            prefixes += len(request.ends)
        return batches

    @property
    def reads_states(self) -> bool:
        """Return whether the local engine runs the guard, so that its hidden states can be read."""
        return self._choice.kind == "local"

    @property
    def blocks(self) -> int:
        """Return how many decoder blocks the guard's model has."""
        return self._local.blocks

    def trunk_states(
        self, requests: Sequence[PrefixRequest], blocks: Sequence[int]
    ) -> list[torch.Tensor]:
        """Return the guard's hidden states along responses, from one causal pass over each.

        The pass reads the prompt (of the first policy) up to the end of the response. A prefix's
        state is that of its last complete token, so it depends on no later text. A prefix without
        a complete token has the state of the last token before the response.

        Args:
            requests: Responses and prefixes.
            blocks: Block indices, from 0; the last block is not allowed.

        Returns:
            Per request a float32 tensor on the CPU, shape (prefixes, blocks, hidden size).

        Raises:
            GuardError: A response does not fit; the error carries its index.
        """
        sequences, positions = [], []
        for i, request in enumerate(requests):
            ids, ends = self._template.prompt_with_response(
                self._prompts.fit_context(i, request), request.text
            )
            first = len(ids) - len(ends)
            sequences.append(ids)
            positions.append([first + bisect_right(ends, end) - 1 for end in request.ends])
        found = self._local.states(sequences, positions, blocks)
        for i, states in enumerate(found):
            if not bool(states.isfinite().all()):
                raise non_finite_error(self.name, i)
        return found

    @property
    def _local(self) -> LocalEngine:
        if self._engine is None:
            self._load()
        assert isinstance(self._engine, LocalEngine), "callers look at reads_states"
        return self._engine

    def close(self) -> None:
        if self._engine is not None:
            self._engine.close()
        self._engine = None
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    def truncates(self, request: PrefixRequest) -> bool:
        return self._prompts.truncates(request)

    def explained(self, request: PrefixRequest) -> dict[str, str]:
        shown = {}
        for i, prompts in enumerate(self._prompts.of(0, request)):
            prompt = prompts[0]
            which = f" {i + 1}" if len(self._prompts.templates) > 1 else ""
            shown[f"prompt{which}"] = self._template.decode(prompt)
            shown[f"verdict position{which}"] = f"after token {len(prompt)}"
        names = ("safe", "unsafe", "controversial")
        for name, ids in zip(names, self._labels.groups, strict=False):
            words = (f"{self._template.decode([i])!r} ({i})" for i in ids)
            shown[f"{name} labels"] = ", ".join(words)
        return shown

    def _load(self) -> None:
        if self._choice.kind == "local":
            self._engine = self._local_engine()
        else:
            # Engine options are not logged, because they may be private.
            computed_by = self._choice.url or self._choice.kind
            logger.info("Guard %s is computed by %s", self.name, computed_by)
            self._engine = self._choice.open(self._weights)
        run_self_check(self, self_check=self._self_check)

    def _local_engine(self) -> LocalEngine:
        logger.info("Loading guard %s on %s (%s)", self.name, self._device, self._dtype)
        model = load_weights(
            AutoModelForCausalLM,
            self.name,
            self._source,
            device=self._device,
            dtype=self._dtype,
            **self._hub,
        )
        return LocalEngine(model, batch_tokens=self._batch_tokens)
