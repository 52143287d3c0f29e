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


def test_batched_answers_equal_answers_to_single_prompts(tokenizer):
    model = tiny_llama(len(tokenizer))
    asked = [prompt_ids(tokenizer, p.messages) for p in prompts()]
    together = dict(greedy_answers(model, tokenizer, asked, max_new_tokens=8, batch_size=3))
    for i, ids in enumerate(asked):
        generated = []
        for _ in range(8):
            logits = model(torch.tensor([ids + generated])).logits[0, -1]
            generated.append(int(logits.argmax()))
            if generated[-1] == tokenizer.eos_token_id:
                generated.pop()
                break
        assert together[i] == tokenizer.decode(generated, skip_special_tokens=True)


def test_a_prefill_precedes_the_answer_and_is_not_part_of_it(tokenizer, tmp_path):
    model = tiny_llama(len(tokenizer))
    given = []

    def generate(ids, length):
        given.extend(ids)
        return local_generation(model, tokenizer, 2)(ids, length)

    asked = with_prefill(prompts(), 3)
    found = answer_prompts(tokenizer, asked, generate, AnswerFile(tmp_path / "a"), max_new_tokens=4)
    for prompt, answer, ids in zip(asked, found, given, strict=True):
        opening = tokenizer(prompt.opening, add_special_tokens=False).input_ids[:3]
        assert ids == prompt_ids(tokenizer, prompt.messages) + opening
        assert answer.prefill == tokenizer.decode(opening)
        assert answer.whole == answer.prefill + answer.text


# The file of answers


def test_a_resumed_run_generates_only_missing_answers(tokenizer, tmp_path):
    model, path = tiny_llama(len(tokenizer)), tmp_path / "a.jsonl"
    asked = prompts()

    def interrupted(ids, length):
        yield from itertools.islice(local_generation(model, tokenizer, 1)(ids, length), 2)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        answer_prompts(tokenizer, asked, interrupted, AnswerFile(path), max_new_tokens=5)
    with path.open("a") as file:
        file.write('{"key": "half a li')
    generated = []

    def counting(ids, length):
        generated.extend(ids)
        return local_generation(model, tokenizer, 1)(ids, length)

    resumed = answer_prompts(tokenizer, asked, counting, AnswerFile(path), max_new_tokens=5)
    assert len(generated) == 1
    fresh = answer_prompts(
        tokenizer,
        asked,
        local_generation(model, tokenizer, 1),
        AnswerFile(tmp_path / "b"),
        max_new_tokens=5,
    )
    assert resumed == fresh
    again = answer_prompts(tokenizer, asked, interrupted, AnswerFile(path), max_new_tokens=5)
    assert again == fresh
    # Answers with other settings are not reused.
    with pytest.raises(KeyboardInterrupt):
        answer_prompts(tokenizer, asked, interrupted, AnswerFile(path), max_new_tokens=6)


def test_line_separators_in_an_answer_do_not_end_its_line(tmp_path):
    store = AnswerFile(tmp_path / "a")
    for key, answer in {"1": "a\nb\u2028c\x85d\x1ee", "2": "\ud800"}.items():
        store.add(key, answer)
    assert AnswerFile(tmp_path / "a").known == store.known


@pytest.mark.parametrize("text", ["[1]\n", "no json\n", '{"key": "k"}\n', "\n"])
def test_a_file_of_another_kind_is_refused(tmp_path, text):
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
def test_refusals_are_recognized(answer, refused):
    assert is_refusal(answer) is refused
