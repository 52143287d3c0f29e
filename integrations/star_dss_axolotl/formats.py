"""From the prompt of an instruction format (`type: alpaca`, a custom one) back to what was asked.

Axolotl's own strategies are given rows whose fields are marks; what stands between the marks is
scaffold. A prompt is read only where one reading fits, and Axolotl makes its tokens of that.
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

_FIRST_MARK = 0xE100  # private-use characters: formats do not write them
_MOST = 64
"""Readings of a prompt that are tried; with more of them there are two, or none."""
_LOADING = "axolotl.utils.data.wrappers"


def prompt_reader(cfg: Any, tokenizer: PreTrainedTokenizerBase) -> PromptReader | None:
    """Return what reads prompts of the run's instruction formats; None if it has none.

    Args:
        cfg: Axolotl's configuration.
        tokenizer: The run's.
    """
    formats = []
    for entry in [*(cfg.datasets or ()), *(cfg.test_datasets or ())]:
        strategy = _strategy(entry, cfg, tokenizer)
        if strategy is not None:
            # A format that cannot be taken apart leaves its prompts raw.
            with contextlib.suppress(Exception):
                formats.append(_Format(strategy))
    return PromptReader(tokenizer, formats) if formats else None


class PromptReader:
    """Read the tokens of a prompt.

    Args:
        tokenizer: The one that made them.
        formats: Those that may have.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, formats: Sequence[_Format]) -> None:
        self._chat = ChatTokenizer(tokenizer)
        self._formats = formats

    def __call__(self, ids: Sequence[int]) -> tuple[Message, ...] | None:
        """Return the messages of a prompt; None if no format makes it, or of several."""
        tokenizer = self._chat.tokenizer
        given = list(ids)
        bos = tokenizer.bos_token_id
        text = decode(tokenizer, given[bos is not None and given[:1] == [bos] :])
        tried = chain.from_iterable(one.readings(text) for one in self._formats)
        found: tuple[Message, ...] | None = None
        for n, (reading, made) in enumerate(islice(tried, _MOST + 1)):
            if n == _MOST:
                return None
            # A control token within a field ends a turn, or begins another: nobody asked that.
            held = any(self._chat.control.search(message["content"]) for message in reading)
            if held or made != given or not reading[-1]["content"].strip():
                continue
            if found not in (None, reading):
                return None
            found = reading
        return found


@dataclass(frozen=True)
class _Form:
    """A prompt of rows that have some fields.

    Attributes:
        pieces: What is written before, between and behind the fields.
        marks: Of the fields between.
        messages: What they say, with marks: a system turn or an empty text, and the question.
    """

    pieces: tuple[str, ...]
    marks: tuple[str, ...]
    messages: tuple[str, str]

    def fits(self, text: str) -> Iterator[dict[str, str]]:
        """Yield what the fields may be in a text, by mark."""
        if text.startswith(self.pieces[0]):
            yield from self._from(0, len(self.pieces[0]), text, {})

    def _from(self, n: int, at: int, text: str, found: dict[str, str]) -> Iterator[dict[str, str]]:
        if n == len(self.marks):
            if at == len(text):
                yield found
            return
        mark, piece = self.marks[n], self.pieces[n + 1]
        if mark in found:  # a field that is written twice
            ends = iter([at + len(found[mark])] if text.startswith(found[mark], at) else [])
        elif n + 1 == len(self.marks):
            ends = iter([max(at, len(text) - len(piece))])
        else:
            ends = _places(piece, text, at)
        for end in ends:
            if text.startswith(piece, end):
                yield from self._from(n + 1, end + len(piece), text, {**found, mark: text[at:end]})

    def said(self, fields: Mapping[str, str]) -> tuple[Message, ...]:
        """Return the messages that some fields make."""
        filled = str.maketrans(dict(fields))
        system, question = (content.translate(filled) for content in self.messages)
        asked = {"role": "user", "content": question}
        return ({"role": "system", "content": system}, asked) if system.strip() else (asked,)


def _places(piece: str, text: str, at: int) -> Iterator[int]:
    """Yield where a piece stands in a text from a character on."""
    while (at := text.find(piece, at)) >= 0:
        yield at
        at += 1


class _Row(dict[str, str]):
    """Stand for any row: a field that is asked for and not known is a mark.

    Args:
        marks: By field; grows.
        given: Fields that are known.
        absent: Fields that the row lacks.
    """

    def __init__(
        self, marks: dict[str, str], given: Mapping[str, str], absent: frozenset[str]
    ) -> None:
        super().__init__(given)
        self._marks, self._absent = marks, absent

    def __contains__(self, name: object) -> bool:
        return name not in self._absent

    def __missing__(self, name: str) -> str:
        if name in self._absent:
            raise KeyError(name)
        return self._marks.setdefault(name, chr(_FIRST_MARK + len(self._marks)))

    def get(self, name: str, default: Any = None) -> Any:
        try:
            return self[name]
        except KeyError:
            return default


class _Format:
    """An instruction format, taken apart.

    Args:
        strategy: Axolotl's, which no one else uses.

    Raises:
        Exception: It is none, or its prompts say something that cannot be told from its scaffold.
    """

    def __init__(self, strategy: Any) -> None:
        self._strategy = strategy
        self._marks: dict[str, str] = {}
        self._tokenized: list[tuple[str, list[int]]] = []
        tokenize = strategy._tokenize

        def watched(text: str, *args: Any, **kwargs: Any) -> Any:
            made = tokenize(text, *args, **kwargs)
            self._tokenized.append((text, list(made["input_ids"])))
            return made

        strategy._tokenize = watched
        question, system, _ = self._fields(_Row(self._marks, {}, frozenset()))
        # Each of the others may be there, be empty, or not be a field of the data.
        optional = [
            name
            for name, mark in self._marks.items()
            if mark in question[1] + system and mark not in question[0]
        ]
        self._forms: dict[_Form, tuple[dict[str, str], frozenset[str]]] = {}
        for kinds in product(("there", "empty", "absent"), repeat=len(optional)):
            of_kind = dict(zip(optional, kinds, strict=True))
            empty = {name: "" for name, kind in of_kind.items() if kind == "empty"}
            absent = frozenset(name for name, kind in of_kind.items() if kind == "absent")
            with contextlib.suppress(KeyError):  # a field that no row may lack
                form = self._form(_Row(self._marks, empty, absent))
                # Without scaffold there is nothing to take off: any text would fit.
                if any(piece.strip() for piece in form.pieces):
                    self._forms.setdefault(form, (empty, absent))

    def readings(self, text: str) -> Iterator[tuple[tuple[Message, ...], list[int]]]:
        """Yield what a prompt may say, with the tokens that Axolotl makes of that."""
        names = {mark: name for name, mark in self._marks.items()}
        for form, (empty, absent) in self._forms.items():
            for found in form.fits(text):
                fields = {names[mark]: value for mark, value in found.items()}
                _, ids = self._prompt(_Row(self._marks, empty | fields, absent))
                yield form.said(found), ids

    def _fields(self, row: _Row) -> tuple[tuple[str, str], str, str]:
        """Return what the strategy takes from a row: instruction and input, system, answer."""
        instruction, given, *others = self._strategy.parse_instruction_fields(row)
        system = others.pop() if len(others) == 2 else ""
        return (instruction, given or ""), system or "", "".join(others)

    def _prompt(self, row: _Row) -> tuple[str, list[int]]:
        """Return the text that is tokenized before the answer, and its tokens; nothing if none is.

        Formats may tokenize both as one.
        """
        self._tokenized.clear()
        made = self._strategy.tokenize_prompt(row)
        first = next((i for i, label in enumerate(made["labels"]) if label != IGNORE_INDEX), 0)
        before = list(made["input_ids"][:first])
        return next((one for one in self._tokenized if one[1] == before), ("", []))

    def _form(self, row: _Row) -> _Form:
        """Return the form of a row.

        Raises:
            KeyError: The row lacks a field.
            ValueError: What the prompt shows is not what the strategy takes from the row.
        """
        (instruction, given), system, answer = self._fields(row)
        text, _ = self._prompt(row)
        marks = re.compile("|".join(self._marks.values()))

        def shown(value: str) -> str:
            return value if value and value in text else ""

        given, system = shown(given), shown(system)
        question = "\n\n".join(filter(None, (shown(instruction), given)))
        found = marks.findall(text)
        told = set(marks.findall(question + system))
        if not shown(instruction) or set(found) != told or told & set(marks.findall(answer)):
            raise ValueError("the prompt shows other fields, or changes them")
        return _Form(tuple(marks.split(text)), tuple(found), (system, question))


class _NoRows(IterableDataset):  # type: ignore[misc]
    """Stand for a data set, and take the strategy that Axolotl would have it tokenized with."""

    features: Any = None
    strategy: Any = None

    def __init__(self) -> None:
        """Leave out what a data set with rows has."""
        self.features = {}

    def map(self, function: Any, *args: Any, **kwargs: Any) -> Any:
        self.strategy = getattr(function, "__self__", None)
        return self


def _strategy(entry: Any, cfg: Any, tokenizer: PreTrainedTokenizerBase) -> Any:
    """Return the strategy of an entry of `datasets`, if it is one for instructions; else None."""
    kind = entry.get("type")
    if not kind or (isinstance(kind, str) and kind.startswith("chat_template")):
        return None
    base, _, style = kind.partition(":") if isinstance(kind, str) else ("", "", "")
    rows = _NoRows()
    logger = logging.getLogger(_LOADING)
    level = logger.level
    logger.setLevel(logging.WARNING)  # it says that a data set is loaded, which is not so
    try:
        get_dataset_wrapper(
            dataset_config=entry,
            tokenizer=tokenizer,
            cfg=cfg,
            dataset_base_type=base or None,
            dataset=rows,
            dataset_prompt_style=style or None,
        )
    except Exception:  # what Axolotl cannot load without rows is no such strategy
        return None
    finally:
        logger.setLevel(level)
    strategy = rows.strategy
    instructs = hasattr(strategy, "parse_instruction_fields") and not strategy.supports_batched
    return strategy if instructs else None
