"""Answers of models: greedy generation, prefills, and the file that keeps them."""

import itertools

import pytest
import torch
from support.comparisons import prompts
from support.models import tiny_llama

from star_dss_plugin import DataError
from star_dss_plugin.evaluate.answers import AnswerFile, answer_prompts, local_generation
from star_dss_plugin.evaluate.generation import greedy_answers, prompt_ids
from star_dss_plugin.evaluate.prompts import with_prefill
from star_dss_plugin.evaluate.refusal import is_refusal


def test_answers_are_those_of_one_prompt_at_a_time(tokenizer):
    model = tiny_llama(len(tokenizer))
    asked = [prompt_ids(tokenizer, p.messages) for p in prompts()]
    together = dict(greedy_answers(model, tokenizer, asked, max_new_tokens=8, batch_size=3))
    for i, ids in enumerate(asked):
        spoken = []
        for _ in range(8):
            logits = model(torch.tensor([ids + spoken])).logits[0, -1]
            spoken.append(int(logits.argmax()))
            if spoken[-1] == tokenizer.eos_token_id:
                spoken.pop()
                break
        assert together[i] == tokenizer.decode(spoken, skip_special_tokens=True)


def test_a_prefill_is_said_first_and_not_part_of_the_answer(tokenizer, tmp_path):
    model = tiny_llama(len(tokenizer))
    seen = []

    def generate(ids, length):
        seen.extend(ids)
        return local_generation(model, tokenizer, 2)(ids, length)

    asked = with_prefill(prompts(), 3)
    found = answer_prompts(tokenizer, asked, generate, AnswerFile(tmp_path / "a"), max_new_tokens=4)
    for prompt, answer, ids in zip(asked, found, seen, strict=True):
        opening = tokenizer(prompt.opening, add_special_tokens=False).input_ids[:3]
        assert ids == prompt_ids(tokenizer, prompt.messages) + opening
        assert answer.prefill == tokenizer.decode(opening)
        assert answer.whole == answer.prefill + answer.text


# The file of answers


def test_a_killed_run_asks_only_what_is_left(tokenizer, tmp_path):
    model, path = tiny_llama(len(tokenizer)), tmp_path / "a.jsonl"
    asked = prompts()

    def dying(ids, length):
        yield from itertools.islice(local_generation(model, tokenizer, 1)(ids, length), 2)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        answer_prompts(tokenizer, asked, dying, AnswerFile(path), max_new_tokens=5)
    with path.open("a") as file:
        file.write('{"key": "half a li')
    left = []

    def counting(ids, length):
        left.extend(ids)
        return local_generation(model, tokenizer, 1)(ids, length)

    resumed = answer_prompts(tokenizer, asked, counting, AnswerFile(path), max_new_tokens=5)
    assert len(left) == 1
    fresh = answer_prompts(
        tokenizer,
        asked,
        local_generation(model, tokenizer, 1),
        AnswerFile(tmp_path / "b"),
        max_new_tokens=5,
    )
    assert resumed == fresh
    again = answer_prompts(tokenizer, asked, dying, AnswerFile(path), max_new_tokens=5)
    assert again == fresh
    # Other settings are other answers.
    with pytest.raises(KeyboardInterrupt):
        answer_prompts(tokenizer, asked, dying, AnswerFile(path), max_new_tokens=6)


def test_line_separators_in_an_answer_do_not_end_its_line(tmp_path):
    store = AnswerFile(tmp_path / "a")
    for key, answer in {"1": "a\nb\u2028c\x85d\x1ee", "2": "\ud800"}.items():
        store.add(key, answer)
    assert AnswerFile(tmp_path / "a").known == store.known


@pytest.mark.parametrize("text", ["[1]\n", "no json\n", '{"key": "k"}\n', "\n"])
def test_a_file_of_answers_that_is_something_else(tmp_path, text):
    (tmp_path / "a.jsonl").write_text(text)
    with pytest.raises(DataError, match=r"a\.jsonl is not a file of answers"):
        AnswerFile(tmp_path / "a.jsonl")


# Refusals


@pytest.mark.parametrize(
    ("answer", "refused"),
    [
        ("I'm sorry, but I can't help with that.", True),
        ("I’m sorry", True),
        ("Sure! Here is how.", False),
        ("Here is how: " + "x" * 200 + " i cannot", False),
        ("I have to decline this one.", True),
        ("That's not something I can help with.", True),
        ("Here you go.", False),
        ("", False),
    ],
)
def test_refusals(answer, refused):
    assert is_refusal(answer) is refused
