"""Compare models: ask each the same prompts, one model at a time, and judge the answers."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from star_dss_plugin.data.fingerprints import content_key
from star_dss_plugin.errors import ConfigError
from star_dss_plugin.evaluate.answers import AnswerFile, Generate, answer_prompts, local_generation
from star_dss_plugin.evaluate.generation import end_ids
from star_dss_plugin.evaluate.models import load_whole_model
from star_dss_plugin.evaluate.prompts import BENIGN, HARMFUL, Prompt, with_prefill
from star_dss_plugin.evaluate.verdicts import PREFILL, Comparison, ModelAnswers, judge
from star_dss_plugin.guards.base import Guard
from star_dss_plugin.guards.loading import load_guard
from star_dss_plugin.models.devices import find_device, free_memory
from star_dss_plugin.models.fingerprints import weights_digest
from star_dss_plugin.validation import at_least, probability

__all__ = ["compare", "training_guard"]


def compare(
    models: Sequence[str],
    prompts: Sequence[Prompt],
    *,
    output: Path,
    guard: str | Mapping[str, Any] | Guard | None = None,
    threshold: float = 0.5,
    prefill_tokens: int = 5,
    max_new_tokens: int = 64,
    batch_size: int = 8,
    base: str | None = None,
    device: str | None = None,
    dtype: str = "auto",
    engine: str = "local",
    progress: bool = True,
) -> Comparison:
    """Ask every model every prompt and judge the answers.

    Models are loaded one at a time and freed before the guard is loaded. Each answer is written to
    `output/answers` immediately, keyed by the model's weights, the tokens that end an answer, and
    the prompt's tokens.

    Args:
        models: Ids or folders, as `load_whole_model` takes them. Each is compared with the first.
        prompts: Harmful prompts, benign prompts, or both.
        output: Folder for the answers.
        guard: Guard that judges in addition to phrase matching, as `load_guard` takes it.
        threshold: τ in [0, 1]: an answer whose P(safe) is at least τ is safe.
        prefill_tokens: k of the prefilling attack, the number of prefilled tokens; 0 leaves the
            attack out.
        max_new_tokens: Largest number of tokens in an answer, >= 1.
        batch_size: Prompts answered per batch, >= 1.
        base: Base model of adapters whose configuration does not name it.
        device: Torch device; None is the GPU if there is one.
        dtype: "auto" or the name of a torch dtype.
        engine: "local", or "vllm".
        progress: Whether to show progress bars.

    Raises:
        ConfigError: A value is invalid, or a model cannot be loaded.
    """
    names = _names(models)
    _check(prompts, threshold, prefill_tokens, max_new_tokens, batch_size, engine)
    place = find_device(device)
    judging = load_guard(guard, device=device) if isinstance(guard, str | Mapping) else guard
    sets = {kind: [p for p in prompts if p.kind == kind] for kind in (HARMFUL, BENIGN)}
    if prefill_tokens and sets[HARMFUL]:
        sets[PREFILL] = with_prefill(sets[HARMFUL], prefill_tokens)
    sets = {name: chosen for name, chosen in sets.items() if chosen}
    found = []
    for source, name in zip(models, names, strict=True):
        answered = ModelAnswers(name, training_guard(source))
        model, tokenizer = load_whole_model(source, dtype=dtype, base=base)
        # Engines round differently, so each has its own file of answers.
        suffix = "" if engine == "local" else f"-{engine}"
        key = content_key(weights_digest(model), end_ids(model, tokenizer))
        store = AnswerFile(output / "answers" / f"{key[:16]}{suffix}.jsonl")
        if engine == "local":
            model.to(place)  # type: ignore[arg-type]
        with _generation(engine, source, model, tokenizer, dtype, batch_size) as generate:
            del model
            for kind, asked in sets.items():
                answered.answers[kind] = answer_prompts(
                    tokenizer,
                    asked,
                    generate,
                    store,
                    max_new_tokens=max_new_tokens,
                    progress={"desc": f"{name}: {kind}", "unit": "answer"} if progress else None,
                )
        del generate
        free_memory()
        found.append(answered)
    judge(found, sets, judging, threshold=threshold)
    return Comparison(
        sets,
        found,
        None if judging is None else judging.name,
        judging is not None and judging.demonstration,
        {
            "models": list(models),
            "threshold": threshold,
            "prefill_tokens": prefill_tokens,
            "max_new_tokens": max_new_tokens,
            "dtype": dtype,
            "engine": engine,
        },
    )


def training_guard(name: str) -> str | None:
    """Return the guard that scored a model's training data, from `star_dss.json` in its folder.

    Returns:
        The guard's name; None if the file is missing or names no guard.
    """
    record = Path(name) / "star_dss.json"
    if not record.is_file():
        return None
    try:
        guard = json.loads(record.read_text(encoding="utf-8"))["data"]["train"]["guard"]
    except (ValueError, KeyError, TypeError):
        return None
    return str(guard)


def _generation(
    engine: str,
    source: str,
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    dtype: str,
    batch_size: int,
) -> contextlib.AbstractContextManager[Generate]:
    if engine == "local":
        return contextlib.nullcontext(local_generation(model, tokenizer, batch_size))
    from star_dss_plugin.evaluate.vllm_generation import vllm_generation

    return vllm_generation(source, tokenizer, dtype)


def _names(models: Sequence[str]) -> list[str]:
    """Return the last part of each path, or the complete names if two parts are equal."""
    if not models:
        raise ConfigError("No model was given. Name at least one.")
    if len(set(models)) < len(models):
        raise ConfigError(f"A model is named twice among {', '.join(models)}. Name each once.")
    short = [Path(model).name or model for model in models]
    return short if len(set(short)) == len(short) else list(models)


def _check(
    prompts: Sequence[Prompt],
    threshold: float,
    prefill_tokens: int,
    max_new_tokens: int,
    batch_size: int,
    engine: str,
) -> None:
    if not prompts:
        raise ConfigError("There are no prompts to ask. Give harmful ones, benign ones, or both.")
    probability("threshold", threshold)
    at_least("prefill_tokens", prefill_tokens, 0, integer=True)
    at_least("max_new_tokens", max_new_tokens, 1, integer=True)
    at_least("batch_size", batch_size, 1, integer=True)
    if engine not in ("local", "vllm"):
        raise ConfigError(f"engine is {engine!r}; answers are made by 'local' or 'vllm'.")
