"""Measure what preparing rows costs, as multiples of rendering and tokenizing them once.

    python benchmarks/preparation.py                    # 300 rows of 40 + 150 words
    python benchmarks/preparation.py --rows 2000 --tokenizer MODEL
    python benchmarks/preparation.py --tokenizer MODEL --template FILE    # a chat template (Jinja)

Each figure is CPU time of one process (user and system): the median of several rounds, in each of
which all contenders run in turn.
"Plain" renders a conversation with its chat template and tokenizes the text, as every trainer must.
The other lines are everything that STAR-DSS does before a guard is asked, by the form of the rows:
labels, responses, contexts, chunks. The second part shows that time grows no faster than the length
of the data: long conversations cut to 256 tokens, and one long response. The third part checks that
two processes give the same result as one, and compares their time for several numbers of rows.
"""

from __future__ import annotations

import argparse
import random
import resource
import time
from collections.abc import Callable
from functools import partial
from importlib.resources import files
from pathlib import Path
from statistics import median
from typing import Any

from datasets import Dataset
from transformers import AutoTokenizer

from star_dss_plugin.data.responses import find_responses
from star_dss_plugin.data.row_responses import RowOptions, read_responses
from star_dss_plugin.data.templates.chat import ChatTokenizer
from star_dss_plugin.data.tokenization import tokenize_row
from star_dss_plugin.segmenters import tokens
from star_dss_plugin.smollm2 import load_smollm2

ROUNDS = 5
HOW = RowOptions(tokens, 5)


def words() -> list[str]:
    """Return words of the demonstration's data."""
    return files("star_dss_plugin.data").joinpath("assets", "demo_mix.jsonl").read_text().split()


def conversations(count: int, seed: int = 0) -> list[list[dict[str, str]]]:
    """Return conversations with a question of 40 words and an answer of 150."""
    chance, known = random.Random(seed), words()
    return [
        [
            {"role": "user", "content": " ".join(chance.choices(known, k=40))},
            {"role": "assistant", "content": " ".join(chance.choices(known, k=150))},
        ]
        for _ in range(count)
    ]


def ways(chat: ChatTokenizer, count: int) -> None:
    """Print the time of preparing each form of rows as a multiple of plain tokenization."""
    talks = conversations(count)
    forms = {
        "messages": [{"messages": talk} for talk in talks],
        "prompt and completion": [{"prompt": talk[:1], "completion": talk[1:]} for talk in talks],
        "tokenized by a host": [
            {"messages": talk, **tokenize_row({"messages": talk}, chat)} for talk in talks
        ],
        "tokens alone": [tokenize_row({"messages": talk}, chat) for talk in talks],
    }
    work: dict[str, Callable[[], Any]] = {
        "plain": lambda: [
            chat.tokenizer(chat.render(talk), add_special_tokens=False) for talk in talks
        ]
    }
    for name, rows in forms.items():
        work[name] = partial(read_responses, Dataset.from_list(rows), chat, HOW)
    found: dict[str, list[float]] = {name: [] for name in work}
    for _ in range(ROUNDS):
        for name, one in work.items():
            begin = time.process_time()
            one()
            found[name].append(time.process_time() - begin)
    plain = median(found["plain"])
    for name, taken in found.items():
        shown = median(taken)
        print(f"{name}: {shown / count * 1e3:.3f} ms a row, {shown / plain:.2f} x plain")


def lengths(chat: ChatTokenizer) -> None:
    """Print the time of truncated conversations and of responses of doubling length."""
    for turns in (1000, 2000, 4000):
        talk = [{"role": ("user", "assistant")[i % 2], "content": "ok"} for i in range(turns)]
        row = {"messages": talk}
        begin = time.process_time()
        made = tokenize_row(row, chat, max_length=256)
        found = find_responses({**row, **made}, chat, tokens, 5)
        taken = time.process_time() - begin
        print(f"{turns} turns cut to 256 tokens: {taken:.3f} s, {len(found)} responses")
    for size in (40_000, 80_000, 160_000):
        text = " ".join(words() * 20)[:size]
        row = {
            "messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": text}]
        }
        begin = time.process_time()
        made = tokenize_row(row, chat)
        (response,) = find_responses({**row, **made}, chat, tokens, 5)
        taken = time.process_time() - begin
        print(
            f"a response of {size} characters: {taken:.3f} s, {len(response.chunk_ends)} prefixes"
        )


def processes(chat: ChatTokenizer, count: int) -> None:
    """Print the time of two processes as a multiple of one process's, for several numbers of rows.

    Wall-clock time depends on the load of the machine. "CPU" is its lower bound: the CPU time of
    the parent process plus half of the children's.
    """
    for rows in (count // 3, count, 3 * count, 10 * count):
        dataset = Dataset.from_list([{"messages": talk} for talk in conversations(rows)])
        wall: dict[int, list[float]] = {1: [], 2: []}
        least: dict[int, list[float]] = {1: [], 2: []}
        found = {}
        for _ in range(ROUNDS):
            for number in wall:
                begin, own, other = time.perf_counter(), time.process_time(), _of_children()
                found[number] = read_responses(dataset, chat, HOW, num_proc=number)
                wall[number].append(time.perf_counter() - begin)
                own, other = time.process_time() - own, _of_children() - other
                least[number].append(own + other / number)
        ratios = [median(taken[2]) / median(taken[1]) for taken in (wall, least)]
        same = (
            found[1].responses == found[2].responses
            and found[1].dataset.data.table == found[2].dataset.data.table
        )
        print(
            f"{rows} rows by two processes: {ratios[0]:.2f} x the time, "
            f"{ratios[1]:.2f} x by CPU, same: {same}"
        )


def _of_children() -> float:
    """Return the CPU seconds of child processes that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def main() -> None:
    """Run all parts."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rows", type=int, default=300)
    parser.add_argument("--tokenizer", help="id or folder; default: the bundled demonstration's")
    parser.add_argument("--template", type=Path, help="a chat template's file; default: its own")
    given = parser.parse_args()
    if given.tokenizer:
        tokenizer = AutoTokenizer.from_pretrained(given.tokenizer)
    else:
        _, tokenizer = load_smollm2()
    template = given.template.read_text(encoding="utf-8") if given.template else None
    chat = ChatTokenizer(tokenizer, template)
    ways(chat, given.rows)
    lengths(chat)
    processes(chat, given.rows)


if __name__ == "__main__":
    main()
