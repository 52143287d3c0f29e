"""A guard's chat template, with the training text kept apart from the template's own text.

The text that is judged is an attacker's input. It must never become a control token of the guard:
the template is rendered around placeholders, its control tokens are found in the *scaffold* alone,
and everything between them is tokenized by a tokenizer that knows no control tokens. For harmless
text the result is, token for token, what `apply_chat_template` gives; that is checked at load.
"""

from __future__ import annotations

import datetime as dt
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from star_dss_plugin.data.requests import Message
from star_dss_plugin.errors import ConfigError, GuardError
from star_dss_plugin.guards.prompting.content import ContentTokenizer, without_surrogates

__all__ = ["PINNED_DATE", "GuardTemplate"]

PINNED_DATE = dt.datetime(2024, 4, 1)
"""What `strftime_now` prints in guard prompts: scores must not depend on the day."""
_DATE_CALL = re.compile(r"\bstrftime_now\s*\(\s*(?:(['\"])(.*?)\1\s*\))?")

_MARK = "\ue0f0{}\ue0f1"  # private-use characters: no template looks for them
_MARKS = re.compile("\ue0f0([0-9]+)\ue0f1")
_TRIMS: tuple[Callable[[str], str], ...] = (  # the less is taken away, the earlier
    str,
    lambda text: text.lstrip("\n"),
    lambda text: text.rstrip("\n"),
    lambda text: text.strip("\n"),
    str.lstrip,
    str.rstrip,
)
_PROBE = (
    {"role": "user", "content": "What's 2 + 2?\nBriefly, please (no steps)."},
    {"role": "assistant", "content": "It is 4.\n\nÇa va? 👍 Done."},
)


class GuardTemplate:
    """Turns (context, response prefixes) into token ids.

    Args:
        tokenizer: The guard's fast tokenizer.
        name: The guard's name, for errors.
        chat_template: A Jinja template, or None for the tokenizer's own.
        template_kwargs: What the template is called with.
        prefill: Text after the generation prompt, up to the verdict position.
        question: A last user turn that asks for the verdict, for templates that do not ask.
        typed_content: Whether the template reads `[{"type": "text", "text": …}]`, not strings.

    Attributes:
        control_ids: Ids that no content can become.
        control_tokens: Their spellings.
        source: The template's text.

    Raises:
        GuardError: No template, a template that ignores its arguments or the answer, or a
            tokenizer for which content cannot be kept apart.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        name: str,
        chat_template: str | None,
        template_kwargs: Mapping[str, Any],
        prefill: str,
        question: str = "",
        typed_content: bool = False,
    ) -> None:
        self._tokenizer = tokenizer
        self._name = name
        self._kwargs = dict(template_kwargs)
        self._prefill = prefill
        self._question = question
        self._typed = typed_content
        try:
            self.source = tokenizer.get_chat_template(chat_template)
        except ValueError as error:
            raise GuardError(
                f"The tokenizer of guard {name!r} has no chat template, so there is no prompt to "
                "ask it with. Give one as 'chat_template' in the guard's mapping."
            ) from error
        self._dated = _DATE_CALL.sub(self._pinned_date, self.source)
        self._check_kwargs_are_read()
        self._content = ContentTokenizer(tokenizer, name)
        self._control = self._content.control
        self.control_ids = frozenset(self._control.values())
        self.control_tokens = tuple(sorted(self._control, key=len, reverse=True))
        self._splitter = re.compile("|".join(map(re.escape, self.control_tokens)) or r"(?!)")
        self._trims = {role: self._trim_of(role) for role in ("user", "assistant")}
        self._check_tokenization()

    def render(self, messages: Sequence[Message]) -> str:
        """The template's own rendering, with the prefill appended."""
        return self._render(messages, self._kwargs)

    def _render(self, messages: Sequence[Message], kwargs: Mapping[str, Any]) -> str:
        turns = [dict(m) for m in messages]
        if self._question:
            turns.append({"role": "user", "content": self._question})
        if self._typed:
            turns = [{**t, "content": [{"type": "text", "text": t["content"]}]} for t in turns]
        try:
            text = self._tokenizer.apply_chat_template(
                turns,
                chat_template=self._dated,
                tokenize=False,
                add_generation_prompt=True,
                **kwargs,
            )
        except TemplateError as error:
            raise GuardError(
                f"The chat template of guard {self._name!r} refuses what it is given: {error}. "
                "Check 'template_kwargs', and that the template is one that judges answers."
            ) from error
        assert isinstance(text, str)
        return text + self._prefill

    def decode(self, ids: Sequence[int]) -> str:
        """The text of some tokens, control tokens included."""
        return str(self._tokenizer.decode(list(ids)))

    def label_ids(self, spellings: Sequence[str]) -> list[int]:
        """The tokens with which these verdicts begin, right behind the prompt; sorted."""
        _, tail = self._split_last(self.render(_PROBE))
        before = self._content.ids(tail)
        found = set()
        for spelling in spellings:
            ids = self._content.ids(tail + spelling)
            if ids[: len(before)] == before and len(ids) > len(before):
                found.add(ids[len(before)])
        if not found:
            raise ConfigError(
                f"Guard {self._name!r}: the tokenizer joins the end of the prompt ({tail[-20:]!r}) "
                f"with the labels {list(spellings)}, so there is no verdict position between them. "
                "Move white space from the end of 'prefill' to the beginning of the labels."
            )
        return sorted(found)

    def prompts(
        self, context: Sequence[Message], text: str, ends: Sequence[int]
    ) -> list[list[int]]:
        """Token ids of one prompt per response prefix `text[:end]`, up to the verdict position."""
        head_ids, opening, closing, tail_ids = self._around_answer(context)
        answers = [opening + self._as_rendered(text[:end], "assistant") + closing for end in ends]
        return [head_ids + ids + tail_ids for ids in self._content.ids_of_all(answers)]

    def opened(self, context: Sequence[Message], text: str) -> tuple[list[int], list[int]]:
        """Token ids up to the end of the response, and where the last tokens end in its text.

        The ends are those of the tokens with characters of `text`, which are the prompt's last.
        """
        head_ids, opening, _, _ = self._around_answer(context)
        shown = self._as_rendered(text, "assistant")
        ids, ends = self._content.ids_and_ends(opening + shown)
        left_out = max(without_surrogates(text).find(shown), 0)
        return head_ids + ids, [end - len(opening) + left_out for end in ends if end > len(opening)]

    def _around_answer(self, context: Sequence[Message]) -> tuple[list[int], str, str, list[int]]:
        """Ids before the answer, plain text before and behind it, and ids after it.

        The plain text is what the tokenizer may join with the answer.
        """
        answer = _MARK.format(len(context))
        marked = [{"role": m["role"], "content": _MARK.format(i)} for i, m in enumerate(context)]
        scaffold = self.render([*marked, {"role": "assistant", "content": answer}])
        if scaffold.count(answer) != 1:
            raise GuardError(
                f"The chat template of guard {self._name!r} puts the answer into its prompt "
                f"{scaffold.count(answer)} times instead of once: it is not made to judge answers. "
                "Give the right one as 'chat_template' in the guard's mapping."
            )

        contents = [self._as_rendered(str(m["content"]), m["role"]) for m in context]

        def fill(piece: str) -> str:
            # One pass: a mark that stands in the content itself is not looked at again.
            return _MARKS.sub(lambda m: contents[int(m[1])], piece)

        before, after = scaffold.split(answer)
        head, opening = self._split_last(before)
        closing, tail = self._split_first(after)
        return self._encode(head, fill), fill(opening), fill(closing), self._encode(tail, fill)

    def _split_last(self, scaffold: str) -> tuple[str, str]:
        """Scaffold up to and with its last control token, and the plain text after it."""
        cut = max((m.end() for m in self._splitter.finditer(scaffold)), default=0)
        return scaffold[:cut], scaffold[cut:]

    def _split_first(self, scaffold: str) -> tuple[str, str]:
        """Plain text up to the scaffold's first control token, and the rest."""
        match = self._splitter.search(scaffold)
        cut = match.start() if match else len(scaffold)
        return scaffold[:cut], scaffold[cut:]

    def _encode(self, scaffold: str, fill: Any) -> list[int]:
        """Ids of scaffold text: its control tokens, and the filled plain text between them."""
        ids: list[int] = []
        position = 0
        for match in self._splitter.finditer(scaffold):
            ids += self._content.ids(fill(scaffold[position : match.start()]))
            ids.append(self._control[match[0]])
            position = match.end()
        return ids + self._content.ids(fill(scaffold[position:]))

    def _as_rendered(self, content: str, role: str) -> str:
        """What the template makes of a message's content."""
        return self._trims[role](without_surrogates(content))

    @property
    def ending(self) -> str:
        """The prompt's own words behind the response, up to the verdict."""
        return self.render([_PROBE[0], {**_PROBE[1], "content": _MARK.format(0)}]).split(
            _MARK.format(0)
        )[-1]

    def _trim_of(self, role: str) -> Callable[[str], str]:
        """What the template does to the white space around the messages of a role."""
        lines = "\n" * 9  # more than the template has of its own around a message
        padded = f"{lines}\t \n{_MARK.format(0)}\n \t{lines}"
        messages = [{**m, "content": padded} if m["role"] == role else m for m in _PROBE]
        rendered = self.render(messages)
        return next((trim for trim in _TRIMS if trim(padded) in rendered), str.strip)

    def _pinned_date(self, call: re.Match[str]) -> str:
        # In the template's text: transformers (5.23) passes no functions to templates any more.
        if call[2] is None:
            raise GuardError(
                f"The chat template of guard {self._name!r} prints the date in a format that it "
                "computes, so scores would depend on the day. Give a template without a date as "
                "'chat_template' in the guard's mapping."
            )
        return json.dumps(PINNED_DATE.strftime(call[2]))

    def _check_kwargs_are_read(self) -> None:
        prompt, unread = self.render(_PROBE), []
        for path, others in _altered(self._kwargs):
            try:
                if self._render(_PROBE, others) == prompt:
                    unread.append(path)
            except Exception:  # a template that refuses a value has read it
                continue
        if unread:
            raise GuardError(
                f"The chat template of guard {self._name!r} never reads {', '.join(unread)}: the "
                "guard would judge something else than it was told to. Use the template that "
                "belongs to these template_kwargs, or leave them out."
            )

    def _check_tokenization(self) -> None:
        padded = [{**m, "content": f"\n {m['content']} \n"} for m in _PROBE]
        for probe in (_PROBE, padded):
            whole = self._tokenizer(self.render(probe), add_special_tokens=False)["input_ids"]
            text = str(probe[1]["content"])
            if self.prompts(probe[:1], text, [len(text)]) != [whole]:
                raise GuardError(
                    f"The tokenizer of guard {self._name!r} gives other tokens when control tokens "
                    "and content are tokenized apart, or its template rewrites what it quotes. "
                    "Scores would not be those of the guard's own prompts; use another guard."
                )


def _altered(value: Any) -> Iterator[tuple[str, Any]]:
    """A value with one of its leaves changed, for each leaf that is not off: (its path, copy)."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            for path, other in _altered(inner):
                yield f"{key}.{path}".rstrip("."), {**value, key: other}
    elif value and isinstance(value, str | int | float):
        yield "", f"{value} (another)" if isinstance(value, str) else not value
    elif value:
        yield "", None
