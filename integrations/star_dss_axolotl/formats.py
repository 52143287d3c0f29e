"""Recover the messages from a prompt of an instruction format (`type: alpaca`, a custom one).

The prompt templates are learned from Axolotl's own strategies: they render rows whose fields are
placeholder characters, and the text between the placeholders is the template's. A prompt is parsed
only if exactly one set of fields fits, and Axolotl tokenizes these fields to the prompt's tokens.
"""

from __future__ import annotations

import contextlib
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, islice, product
from typing import Any

from axolotl.utils.data.wrappers import get_dataset_wrapper
from datasets import IterableDataset
from transformers import PreTrainedTokenizerBase

from star_dss_plugin.data.decoding import decode
from star_dss_plugin.data.requests import Message
from star_dss_plugin.data.templates.chat import ChatTokenizer
from star_dss_plugin.logprobs import IGNORE_INDEX

__all__ = ["PromptReader", "prompt_reader"]

_FIRST_PLACEHOLDER = 0xE100  # private-use characters: formats do not write them
_MAX_READINGS = 64
"""Largest number of ways to parse a prompt that are tried; with more the prompt stays raw."""
_LOADING = "axolotl.utils.data.wrappers"


def prompt_reader(cfg: Any, tokenizer: PreTrainedTokenizerBase) -> PromptReader | None:
    """Return the reader for prompts of the run's instruction formats; None if it has none.

    Args:
        cfg: Axolotl's configuration.
        tokenizer: The run's tokenizer.
    """
    formats = []
    for entry in [*(cfg.datasets or ()), *(cfg.test_datasets or ())]:
        strategy = _strategy(entry, cfg, tokenizer)
        if strategy is not None:
            # The prompts of a format whose templates cannot be found stay raw.
            with contextlib.suppress(Exception):
                formats.append(_Format(strategy))
    return PromptReader(tokenizer, formats) if formats else None


class PromptReader:
    """Recover messages from the tokens of a prompt.

    Args:
        tokenizer: The tokenizer that made the tokens.
        formats: The instruction formats that may have made the prompt.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, formats: Sequence[_Format]) -> None:
        self._chat = ChatTokenizer(tokenizer)
        self._formats = formats

    def __call__(self, ids: Sequence[int]) -> tuple[Message, ...] | None:
        """Return the messages of a prompt; None if no messages fit, or different ones do."""
        tokenizer = self._chat.tokenizer
        given = list(ids)
        bos = tokenizer.bos_token_id
        text = decode(tokenizer, given[bos is not None and given[:1] == [bos] :])
        tried = chain.from_iterable(one.parse(text) for one in self._formats)
        found: tuple[Message, ...] | None = None
        for n, (reading, made) in enumerate(islice(tried, _MAX_READINGS + 1)):
            if n == _MAX_READINGS:
                return None
            # A control token within a field would end or begin a turn, so this is a wrong reading.
            held = any(self._chat.control.search(message["content"]) for message in reading)
            if held or made != given or not reading[-1]["content"].strip():
                continue
            if found not in (None, reading):
                return None
            found = reading
        return found


@dataclass(frozen=True)
class _PromptTemplate:
    """Hold the prompt template of rows that have certain fields.

    Attributes:
        pieces: The template's own text before, between and after the fields; one more than fields.
        placeholders: The placeholder of each field, in the order of the prompt.
        messages: The system message ("" if there is none) and the user message, with placeholders.
    """

    pieces: tuple[str, ...]
    placeholders: tuple[str, ...]
    messages: tuple[str, str]

    def matches(self, text: str) -> Iterator[dict[str, str]]:
        """Yield each choice of field values, by placeholder, that makes a text of the template."""
        if text.startswith(self.pieces[0]):
            yield from self._match_from(0, len(self.pieces[0]), text, {})

    def _match_from(
        self, n: int, at: int, text: str, found: dict[str, str]
    ) -> Iterator[dict[str, str]]:
        if n == len(self.placeholders):
            if at == len(text):
                yield found
            return
        placeholder, piece = self.placeholders[n], self.pieces[n + 1]
        if placeholder in found:  # a field that is written twice
            ends = iter(
                [at + len(found[placeholder])] if text.startswith(found[placeholder], at) else []
            )
        elif n + 1 == len(self.placeholders):
            ends = iter([max(at, len(text) - len(piece))])
        else:
            ends = _occurrences(piece, text, at)
        for end in ends:
            if text.startswith(piece, end):
                yield from self._match_from(
                    n + 1, end + len(piece), text, {**found, placeholder: text[at:end]}
                )

    def messages_of(self, fields: Mapping[str, str]) -> tuple[Message, ...]:
        """Return the messages for fields, by placeholder."""
        filled = str.maketrans(dict(fields))
        system, question = (content.translate(filled) for content in self.messages)
        asked = {"role": "user", "content": question}
        return ({"role": "system", "content": system}, asked) if system.strip() else (asked,)


def _occurrences(piece: str, text: str, at: int) -> Iterator[int]:
    """Yield the positions at which a piece occurs in a text, from `at` on."""
    while (at := text.find(piece, at)) >= 0:
        yield at
        at += 1


class _ProbeRow(dict[str, str]):
    """Act as a row with any fields: looking an unknown field up returns a new placeholder.

    Args:
        placeholders: Placeholder of each field, by name; new ones are added.
        given: Fields with known values.
        absent: Fields that the row lacks.
    """

    def __init__(
        self, placeholders: dict[str, str], given: Mapping[str, str], absent: frozenset[str]
    ) -> None:
        super().__init__(given)
        self._placeholders, self._absent = placeholders, absent

    def __contains__(self, name: object) -> bool:
        return name not in self._absent

    def __missing__(self, name: str) -> str:
        if name in self._absent:
            raise KeyError(name)
        return self._placeholders.setdefault(
            name, chr(_FIRST_PLACEHOLDER + len(self._placeholders))
        )

    def get(self, name: str, default: Any = None) -> Any:
        try:
            return self[name]
        except KeyError:
            return default


class _Format:
    """Find the prompt templates of an instruction format.

    Args:
        strategy: Axolotl's prompt strategy, not shared with other code: its `_tokenize` is wrapped.

    Raises:
        Exception: The strategy is for no instruction format, or its prompts do not show the fields
            unchanged.
    """

    def __init__(self, strategy: Any) -> None:
        self._strategy = strategy
        self._placeholders: dict[str, str] = {}
        self._tokenized: list[tuple[str, list[int]]] = []
        tokenize = strategy._tokenize

        def watched(text: str, *args: Any, **kwargs: Any) -> Any:
            made = tokenize(text, *args, **kwargs)
            self._tokenized.append((text, list(made["input_ids"])))
            return made

        strategy._tokenize = watched
        question, system, _ = self._fields(_ProbeRow(self._placeholders, {}, frozenset()))
        # Each optional field may be there, be empty, or be no field of the data.
        optional = [
            name
            for name, placeholder in self._placeholders.items()
            if placeholder in question[1] + system and placeholder not in question[0]
        ]
        self._templates: dict[_PromptTemplate, tuple[dict[str, str], frozenset[str]]] = {}
        for kinds in product(("there", "empty", "absent"), repeat=len(optional)):
            of_kind = dict(zip(optional, kinds, strict=True))
            empty = {name: "" for name, kind in of_kind.items() if kind == "empty"}
            absent = frozenset(name for name, kind in of_kind.items() if kind == "absent")
            with contextlib.suppress(KeyError):  # the strategy requires the field
                template = self._template_of(_ProbeRow(self._placeholders, empty, absent))
                # A template without text of its own would fit any prompt.
                if any(piece.strip() for piece in template.pieces):
                    self._templates.setdefault(template, (empty, absent))

    def parse(self, text: str) -> Iterator[tuple[tuple[Message, ...], list[int]]]:
        """Yield the messages that may have made a prompt, and the tokens Axolotl makes of them."""
        names = {placeholder: name for name, placeholder in self._placeholders.items()}
        for template, (empty, absent) in self._templates.items():
            for found in template.matches(text):
                fields = {names[placeholder]: value for placeholder, value in found.items()}
                _, ids = self._prompt(_ProbeRow(self._placeholders, empty | fields, absent))
                yield template.messages_of(found), ids

    def _fields(self, row: _ProbeRow) -> tuple[tuple[str, str], str, str]:
        """Return the fields that the strategy reads: (instruction, input), system, answer."""
        instruction, given, *others = self._strategy.parse_instruction_fields(row)
        system = others.pop() if len(others) == 2 else ""
        return (instruction, given or ""), system or "", "".join(others)

    def _prompt(self, row: _ProbeRow) -> tuple[str, list[int]]:
        """Return the prompt's text and tokens for a row.

        Empty if the strategy tokenizes prompt and answer as one text.
        """
        self._tokenized.clear()
        made = self._strategy.tokenize_prompt(row)
        first = next((i for i, label in enumerate(made["labels"]) if label != IGNORE_INDEX), 0)
        before = list(made["input_ids"][:first])
        return next((one for one in self._tokenized if one[1] == before), ("", []))

    def _template_of(self, row: _ProbeRow) -> _PromptTemplate:
        """Return the prompt template of a row.

        Raises:
            KeyError: The row lacks a required field.
            ValueError: The prompt does not contain the fields as the strategy read them.
        """
        (instruction, given), system, answer = self._fields(row)
        text, _ = self._prompt(row)
        placeholders = re.compile("|".join(self._placeholders.values()))

        def shown(value: str) -> str:
            return value if value and value in text else ""

        given, system = shown(given), shown(system)
        question = "\n\n".join(filter(None, (shown(instruction), given)))
        found = placeholders.findall(text)
        told = set(placeholders.findall(question + system))
        if not shown(instruction) or set(found) != told or told & set(placeholders.findall(answer)):
            raise ValueError("the prompt shows other fields, or changes them")
        return _PromptTemplate(tuple(placeholders.split(text)), tuple(found), (system, question))


class _StrategyProbe(IterableDataset):  # type: ignore[misc]
    """Act as a data set, and keep the strategy whose method Axolotl passes to `map`."""

    features: Any = None
    strategy: Any = None

    def __init__(self) -> None:
        """Skip the base class's constructor, which needs rows."""
        self.features = {}

    def map(self, function: Any, *args: Any, **kwargs: Any) -> Any:
        self.strategy = getattr(function, "__self__", None)
        return self


def _strategy(entry: Any, cfg: Any, tokenizer: PreTrainedTokenizerBase) -> Any:
    """Return Axolotl's strategy for an entry of `datasets`; None unless it is for instructions."""
    kind = entry.get("type")
    if not kind or (isinstance(kind, str) and kind.startswith("chat_template")):
        return None
    base, _, style = kind.partition(":") if isinstance(kind, str) else ("", "", "")
    rows = _StrategyProbe()
    logger = logging.getLogger(_LOADING)
    level = logger.level
    logger.setLevel(logging.WARNING)  # its message that a data set is being loaded would be wrong
    try:
        get_dataset_wrapper(
            dataset_config=entry,
            tokenizer=tokenizer,
            cfg=cfg,
            dataset_base_type=base or None,
            dataset=rows,
            dataset_prompt_style=style or None,
        )
    except Exception:  # a strategy that cannot be made without rows is not for instructions
        return None
    finally:
        logger.setLevel(level)
    strategy = rows.strategy
    instructs = hasattr(strategy, "parse_instruction_fields") and not strategy.supports_batched
    return strategy if instructs else None
