"""Store models' answers as they come, so that an interrupted run asks only the missing prompts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from star_dss_plugin.data.files.json_lines import append_lines, read_lines
from star_dss_plugin.data.fingerprints import content_key
from star_dss_plugin.errors import DataError
from star_dss_plugin.evaluate.generation import greedy_answers, prompt_ids
from star_dss_plugin.evaluate.prompts import Prompt

__all__ = ["Answer", "AnswerFile", "Generate", "answer_prompts", "local_generation"]


class Generate(Protocol):
    """Answer token ids greedily; yield pairs of (index, answer) in any order."""

    def __call__(
        self, prompts: Sequence[Sequence[int]], max_new_tokens: int
    ) -> Iterable[tuple[int, str]]: ...


@dataclass(frozen=True)
class Answer:
    """Hold one answer of a model.

    Attributes:
        text: Text that the model generated.
        prefill: Opening that was given to the model as its own, before `text`.
    """

    text: str
    prefill: str = ""

    @property
    def whole(self) -> str:
        """Return the complete answer, as readers see it and guards judge it."""
        return self.prefill + self.text


class AnswerFile:
    """Keep one model's answers in a JSON Lines file, by the key of the prompt.

    Args:
        path: The file; created by the first answer.

    Raises:
        DataError: The file is damaged.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self.known = {str(e["key"]): str(e["answer"]) for e in read_lines(path)}
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(
                f"{path} is not a file of answers that an evaluation has written ({error!r}). "
                "Remove it; the answers are then generated again."
            ) from error

    def add(self, key: str, answer: str) -> None:
        """Store an answer and write it to the file immediately."""
        self.known[key] = answer
        append_lines(self.path, [{"key": key, "answer": answer}])


def local_generation(model: Any, tokenizer: PreTrainedTokenizerBase, batch_size: int) -> Generate:
    """Return a generator of answers by a model in this process."""

    def generate(
        prompts: Sequence[Sequence[int]], max_new_tokens: int
    ) -> Iterable[tuple[int, str]]:
        return greedy_answers(
            model, tokenizer, prompts, max_new_tokens=max_new_tokens, batch_size=batch_size
        )

    return generate


def answer_prompts(
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    generate: Generate,
    store: AnswerFile,
    *,
    max_new_tokens: int,
    progress: Mapping[str, Any] | None = None,
) -> list[Answer]:
    """Return the answers to prompts, in order; only answers missing in the store are generated.

    Args:
        tokenizer: The model's tokenizer.
        prompts: The prompts to answer.
        generate: Generates the missing answers.
        store: The answers of the same model so far.
        max_new_tokens: Largest number of tokens in an answer, >= 1.
        progress: Arguments of the progress bar; None for no bar.
    """
    openings = [
        tokenizer(p.opening, add_special_tokens=False).input_ids[: p.prefill_tokens]
        for p in prompts
    ]
    asked = [
        prompt_ids(tokenizer, p.messages) + opening
        for p, opening in zip(prompts, openings, strict=True)
    ]
    keys = [content_key(ids, max_new_tokens) for ids in asked]
    missing = list(dict.fromkeys(key for key in keys if key not in store.known))
    ids_of = dict(zip(keys, asked, strict=True))
    found = generate([ids_of[key] for key in missing], max_new_tokens) if missing else ()
    bar = tqdm(found, total=len(missing), disable=progress is None, **(progress or {}))
    for i, answer in bar:
        store.add(missing[i], answer)
    return [
        Answer(store.known[key], str(tokenizer.decode(opening)))
        for key, opening in zip(keys, openings, strict=True)
    ]
