"""Render a guard's chat template with the judged text kept apart from the template's own text.

The judged text is untrusted input and must never become a control token of the guard. So the
template is rendered with placeholders for all content. Control tokens are looked up in this
*scaffold* alone, and the text between them, content filled in, is tokenized without control tokens.
For ordinary text the result equals `apply_chat_template` token for token, which is checked at load.
"""

from __future__ import annotations

import datetime as dt
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from star_dss_plugin.data.requests import Message
from star_dss_plugin.engines.shared_prompts import SharedPrompts
from star_dss_plugin.errors import ConfigError, GuardError
from star_dss_plugin.guards.prompting.content import ContentTokenizer, without_surrogates
from star_dss_plugin.guards.prompting.trimming import Trim, detect_trim

__all__ = ["PINNED_DATE", "GuardTemplate"]

PINNED_DATE = dt.datetime(2024, 4, 1)
"""Date that `strftime_now` prints in guard prompts: scores must not depend on today's date."""
_DATE_CALL = re.compile(r"\bstrftime_now\s*\(\s*(?:(['\"])(.*?)\1\s*\))?")

_MARK = "\ue0f0{}\ue0f1"  # a placeholder of private-use characters, which no template looks for
_MARKS = re.compile("\ue0f0([0-9]+)\ue0f1")


_PROBE = (
    {"role": "user", "content": "What's 2 + 2?\nBriefly, please (no steps)."},
    {"role": "assistant", "content": "It is 4.\n\nÇa va? 👍 Done."},
)


class GuardTemplate:
    """Convert a context and the prefixes of a response to prompt token ids.

    Args:
        tokenizer: The guard's fast tokenizer.
        name: The guard's name, for errors.
        chat_template: A Jinja template, or None for the tokenizer's own.
        template_kwargs: Arguments of the template.
        prefill: Text after the generation prompt, up to the verdict position.
        question: A final user turn that asks for the verdict, for templates that do not ask.
        typed_content: Whether the template reads content as `[{"type": "text", "text": …}]` instead
            of a string.

    Attributes:
        control_ids: Ids of the guard's control tokens, which content never becomes.
        control_tokens: Spellings of `control_ids`, the longest first.
        source: The template's text.

    Raises:
        GuardError: There is no template, the template ignores its arguments or the answer, or the
            tokenizer cannot keep content apart from control tokens.
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
        self._trims = {role: self._detect_trim(role) for role in ("user", "assistant")}
        self._check_tokenization()

    def render(self, messages: Sequence[Message]) -> str:
        """Return the template's rendering with the prefill appended."""
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
        """Return the text of tokens, control tokens included."""
        return str(self._tokenizer.decode(list(ids)))

    def content_ids(self, text: str) -> list[int]:
        """Return the ids of a text, none of which is a control token."""
        return self._content.ids(text)

    def label_ids(self, spellings: Sequence[str]) -> list[int]:
        """Return the sorted first token ids of the given verdicts when they follow the prompt."""
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

    def prompts(self, context: Sequence[Message], text: str, ends: Sequence[int]) -> SharedPrompts:
        """Return the ids of one prompt per prefix `text[:end]`, up to the verdict position."""
        head_ids, opening, closing, tail_ids = self._around_answer(context)
        shown, cuts = self._trims["assistant"].prefixes(without_surrogates(text), ends)
        made = self._content.prefixes(
            opening + shown, [len(opening) + cut for cut in cuts], closing
        )
        return made.surrounded(head_ids, tail_ids)

    def prompt_with_response(
        self, context: Sequence[Message], text: str
    ) -> tuple[list[int], list[int]]:
        """Return the prompt's ids up to the end of the response, and the response tokens' ends.

        The ends are in characters of `text`, one for each token that contains some of it; these
        tokens are the last of the ids.
        """
        head_ids, opening, _, _ = self._around_answer(context)
        shown = self._as_rendered(text, "assistant")
        ids, ends = self._content.ids_and_ends(opening + shown)
        left_out = max(without_surrogates(text).find(shown), 0)
        return head_ids + ids, [end - len(opening) + left_out for end in ends if end > len(opening)]

    def _around_answer(self, context: Sequence[Message]) -> tuple[list[int], str, str, list[int]]:
        """Return ids before the answer, plain text before and after it, and ids after it.

        The tokenizer may merge the plain text with the answer, so both are tokenized together.
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
            # One pass, so that a placeholder inside the content itself is not replaced.
            return _MARKS.sub(lambda m: contents[int(m[1])], piece)

        before, after = scaffold.split(answer)
        head, opening = self._split_last(before)
        closing, tail = self._split_first(after)
        return self._encode(head, fill), fill(opening), fill(closing), self._encode(tail, fill)

    def _split_last(self, scaffold: str) -> tuple[str, str]:
        """Split the scaffold after its last control token; return both parts."""
        cut = max((m.end() for m in self._splitter.finditer(scaffold)), default=0)
        return scaffold[:cut], scaffold[cut:]

    def _split_first(self, scaffold: str) -> tuple[str, str]:
        """Split the scaffold before its first control token; return both parts."""
        match = self._splitter.search(scaffold)
        cut = match.start() if match else len(scaffold)
        return scaffold[:cut], scaffold[cut:]

    def _encode(self, scaffold: str, fill: Any) -> list[int]:
        """Return the ids of a scaffold: control tokens, and the filled plain text between them."""
        ids: list[int] = []
        position = 0
        for match in self._splitter.finditer(scaffold):
            ids += self._content.ids(fill(scaffold[position : match.start()]))
            ids.append(self._control[match[0]])
            position = match.end()
        return ids + self._content.ids(fill(scaffold[position:]))

    def _as_rendered(self, content: str, role: str) -> str:
        """Return a message's content as the template renders it."""
        return self._trims[role](without_surrogates(content))

    @property
    def ending(self) -> str:
        """Return the prompt's own text between the response and the verdict."""
        return self.render([_PROBE[0], {**_PROBE[1], "content": _MARK.format(0)}]).split(
            _MARK.format(0)
        )[-1]

    def _detect_trim(self, role: str) -> Trim:
        """Return the trimming that the template applies to the messages of a role."""

        def shown(content: str) -> str:
            turns = [{**m, "content": content} if m["role"] == role else m for m in _PROBE]
            return self.render(turns)

        return detect_trim(shown, _MARK.format(0))

    def _pinned_date(self, call: re.Match[str]) -> str:
        # The call is replaced in the template's text, because transformers 5.23 no longer passes
        # functions to templates.
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
            except Exception:  # a template that rejects a value has read it
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
            if list(self.prompts(probe[:1], text, [len(text)])) != [whole]:
                raise GuardError(
                    f"The tokenizer of guard {self._name!r} gives other tokens when control tokens "
                    "and content are tokenized apart, or its template rewrites what it quotes. "
                    "Scores would not be those of the guard's own prompts; use another guard."
                )


def _altered(value: Any) -> Iterator[tuple[str, Any]]:
    """Yield (path, copy) for each truthy leaf of `value`; the copy has another value there."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            for path, other in _altered(inner):
                yield f"{key}.{path}".rstrip("."), {**value, key: other}
    elif value and isinstance(value, str | int | float):
        yield "", f"{value} (another)" if isinstance(value, str) else not value
    elif value:
        yield "", None
